"""Slot attention: slots compete for tokens and are updated by a cell."""

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float

from spectraldiffusion_jax.types import Slots


class SlotAttention(nn.Module):
  """T rounds of dot-product competition (Locatello et al. 2020, alg. 1).

  `cell(slots, update, state) -> (slots, state, gate)` is the GRU baseline or
  the selective state-space cell; this module ignores the gate, which only
  the probabilistic form (models/em_attention.py) has a use for.
  """

  num_iterations: int
  slot_dim: int
  cell: nn.Module
  epsilon: float = 1e-8
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(
    self,
    tokens: Float[Array, "B N F"],
    slots: Float[Array, "B K D"],
    active: Bool[Array, "B K"],
  ) -> Slots:
    """Slots after T rounds, and the attention of the last."""
    x = nn.LayerNorm(dtype=self.dtype)(tokens)
    dense = functools.partial(
      nn.Dense, self.slot_dim, use_bias=False, dtype=self.dtype
    )
    key, value = dense(name="key")(x), dense(name="value")(x)
    query, norm = (
      dense(name="query"),
      nn.LayerNorm(dtype=self.dtype, name="norm"),
    )
    state = self.cell.initial_state(slots)
    for _ in range(self.num_iterations):
      logits = jnp.einsum("BND,BKD->BKN", key, query(norm(slots)))
      logits = logits.astype(jnp.float32) / self.slot_dim**0.5
      logits = jnp.where(active[:, :, None], logits, -1e9)
      attention = jax.nn.softmax(logits, axis=1)
      share = attention + self.epsilon
      share = share / share.sum(-1, keepdims=True)
      update = jnp.einsum("BKN,BND->BKD", share.astype(self.dtype), value)
      slots, state, _ = self.cell(slots, update, state)
    return Slots(slots=slots, attention=attention, active=active)
