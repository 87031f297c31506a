"""Where slots start when no spectral step places them."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float


class GaussianInit(nn.Module):
  """Slots drawn from one learned Gaussian (Locatello et al. 2020, sec. 2.1).

  Exchangeable: every slot has the same law. Needs the rng stream `slots`.
  """

  num_slots: int
  slot_dim: int

  @nn.compact
  def __call__(
    self, tokens: Float[Array, "B N F"]
  ) -> tuple[Float[Array, "B K D"], Bool[Array, "B K"]]:
    """Slots, all of them active."""
    shape = (tokens.shape[0], self.num_slots, self.slot_dim)
    mean = self.param("mean", nn.initializers.normal(1.0), shape[-1:])
    log_std = self.param("log_std", nn.initializers.zeros, shape[-1:])
    noise = jax.random.normal(self.make_rng("slots"), shape)
    slots = mean[None, None] + jnp.exp(log_std)[None, None] * noise
    return slots, jnp.ones(shape[:2], bool)


class LearnedInit(nn.Module):
  """One learned vector for each slot (BO-QSA, Jia et al. ICLR 2023).

  Deterministic, but slots are no longer exchangeable.
  """

  num_slots: int
  slot_dim: int

  @nn.compact
  def __call__(
    self, tokens: Float[Array, "B N F"]
  ) -> tuple[Float[Array, "B K D"], Bool[Array, "B K"]]:
    """Slots, all of them active."""
    shape = (tokens.shape[0], self.num_slots, self.slot_dim)
    slots = self.param("slots", nn.initializers.normal(1.0), shape[1:])
    return jnp.broadcast_to(slots, shape), jnp.ones(shape[:2], bool)
