"""The objective's sample of tokens, in which modularity is counted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spectraldiffusion_jax import losses, objective
from spectraldiffusion_jax.ops import vote_partition

SIDE = 32


def scene():
  """Two objects that vote for their centres, and who they belong to."""
  owner = np.zeros((1, SIDE, SIDE), int)
  owner[:, 4:15, 3:14], owner[:, 16:30, 15:29] = 1, 2
  votes = np.array([[0, 0], [2.3, 2.0], [5.6, 5.4]], np.float32)[owner]
  votes += np.random.default_rng(0).normal(0, 0.05, votes.shape)
  chance = np.where(owner > 0, 0.95, 0.02)[..., None]
  features = np.concatenate([chance, votes], -1).astype(np.float32)
  share = jax.nn.one_hot(owner.reshape(1, -1), 3).swapaxes(1, 2)
  return jnp.asarray(features), 0.8 * share + 0.2 / 3


@pytest.mark.parametrize(("grid", "step"), [(16, 1), (31, 1), (32, 2), (49, 3)])
def test_tokens_and_their_attention_stay_together(grid, step):
  index = jnp.arange(grid * (grid + 1.0)).reshape(1, grid, grid + 1)
  features, attention = objective.thinned(
    index[..., None], index.reshape(1, 1, -1)
  )
  assert features.shape[1:3] == (-(-grid // step), -(-(grid + 1) // step))
  np.testing.assert_array_equal(features.reshape(-1), attention.reshape(-1))


def test_a_sixteenth_of_the_pairs_has_the_modularity_of_all():
  features, attention = scene()

  def loss(features, attention):
    graph = jax.vmap(lambda f: vote_partition.vote_graph(f, sigma=0.22))
    return losses.spectral_consistency(attention, graph(features))

  whole = loss(features, attention)
  some = loss(*objective.thinned(features, attention))
  assert whole < -0.2
  np.testing.assert_allclose(some, whole, rtol=0.05)
  mixed = jnp.full_like(attention, 1 / 3)
  assert abs(loss(*objective.thinned(features, mixed))) < 1e-5
