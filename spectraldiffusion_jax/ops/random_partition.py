"""Random starts for slots that are Gaussians: the control of the spectral step.

Tokens drawn at random are the first means and every token goes to the nearest
one, as k-means and mixtures start without further knowledge (Bishop 2006,
section 9.1). No object is counted: every slot is used.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from spectraldiffusion_jax.ops.partition import Partition
from spectraldiffusion_jax.ops.vote_partition import LEAST


def random_partition(
  features: Float[Array, "h w E"],
  *,
  num_slots: int,
  field: bool,
  seed: int = 0,
) -> Partition:
  """Shares tokens out by the nearest of randomly drawn ones.

  Args:
    features: of the token grid; with `field`, chance of being foreground,
      mean vote, and what else there is, which does not count.
    num_slots: K.
    field: whether slot 0 is the background and K - 1 tokens are drawn from
      the foreground; else K tokens are drawn from all.
    seed: of the draw, which is the same for every image.
  """
  features = jnp.nan_to_num(jax.lax.stop_gradient(features))
  tokens = features.reshape(-1, features.shape[-1])
  size, wanted = tokens.shape[0], max(1, num_slots - int(field))
  draw = np.random.RandomState(seed).random_sample(size).astype(np.float32)
  chance = jnp.ones((size, 1))
  if field:
    chance = jnp.where(tokens[:, :1] > LEAST, tokens[:, :1], 0.0)
    draw = jnp.where(chance[:, 0] > 0, 1 + draw, draw)
    tokens = tokens[:, 1:3]
  seeds = tokens[jax.lax.top_k(jnp.asarray(draw), min(wanted, size))[1]]
  step = tokens[:, None] - seeds[None]
  nearest = jnp.argmin((step**2).sum(-1), axis=1)
  share = jax.nn.one_hot(nearest, wanted) * chance
  if field:
    share = jnp.concatenate([1 - chance, share], axis=1)[:, :num_slots]
  active = share.sum(0) > 0
  return Partition(share, active, active.sum())
