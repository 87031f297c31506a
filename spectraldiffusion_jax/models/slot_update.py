"""Slot updates of one signature: the selective state-space cell and the GRU.

  cell(slots, update, state) -> (slots, state, gate)

`update` is what the attention brings each slot, `gate` the step its mixture
mean takes. Parameters are shared over slots, so cells are equivariant to
their order.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from spectraldiffusion_jax.models.ssm import SelectiveSSM, scaled_dense


class _Feedforward(nn.Module):
  """Residual branch MLP(LayerNorm(x)) with one hidden layer."""

  hidden: int
  dtype: DTypeLike

  @nn.compact
  def __call__(self, x: Float[Array, "B K D"]) -> Float[Array, "B K D"]:
    y = nn.LayerNorm(dtype=self.dtype)(x)
    y = nn.relu(nn.Dense(self.hidden, dtype=self.dtype)(y))
    return nn.Dense(x.shape[-1], dtype=self.dtype)(y).astype(x.dtype)


class SlotSSMCell(nn.Module):
  """Slot update by a selective SSM along the rounds, slots as the batch.

    u = W_u [LN(update), LN(s)];   (z, x, B, C, dt) = W_in u
    h <- exp(dt A) h + gain B x;   y = C h + skip x
    s <- s + W_o RMSNorm(y silu(z));   s <- s + MLP(LN(s))
    g = 1 - exp(-softplus(W_g u))

  Steps are far larger than in language models (dt in [0.2, 1] with -A in
  [1, 4] writes 18 to 98 % of the state a round): with theirs slots would not
  move within the 3 to 5 rounds there are. The gate g is the step of the
  mixture means in ops/em.py; it is a sigmoid, the exact zero-order-hold step
  of a leaky integrator (Gu & Dao 2023, theorem 1).
  """

  num_heads: int = 4  # M
  head_dim: int = 16  # P, channels of a head
  d_state: int = 64  # S
  gate_dim: int = 64  # E, key width of the mixture
  gate_bias: float = 2.0  # g starts at sigmoid of it, 0.88
  mlp_ratio: int = 2  # hidden width of the MLP over D
  dtype: DTypeLike = jnp.float32

  def initial_state(
    self, slots: Float[Array, "B K D"]
  ) -> Float[Array, "B K M P S"]:
    """The state before the first round: zero, float32."""
    shape = (*slots.shape[:2], self.num_heads, self.head_dim, self.d_state)
    return jnp.zeros(shape, jnp.float32)

  @nn.compact
  def __call__(
    self,
    slots: Float[Array, "B K D"],
    update: Float[Array, "B K D"],
    state: Float[Array, "B K M P S"],
  ) -> tuple[
    Float[Array, "B K D"], Float[Array, "B K M P S"], Float[Array, "B K E"]
  ]:
    """One round: new slots, new state, and the gate g in (0, 1]."""
    batch, count, features = slots.shape
    parts = [
      nn.LayerNorm(dtype=self.dtype, name="update_norm")(update),
      nn.LayerNorm(dtype=self.dtype, name="slot_norm")(slots),
    ]
    u = nn.Dense(features, dtype=self.dtype, name="mix")(
      jnp.concatenate(parts, axis=-1)
    )
    ssm = SelectiveSSM(
      num_heads=self.num_heads,
      head_dim=self.head_dim,
      d_state=self.d_state,
      rate_range=(1.0, 4.0),
      dt_range=(0.2, 1.0),
      activate=False,
      dtype=self.dtype,
      name="ssm",
    )
    y, z, state = ssm.step(
      u.reshape(batch * count, features),
      state.reshape(batch * count, *state.shape[2:]),
    )
    y = nn.RMSNorm(dtype=self.dtype, name="out_norm")(y * nn.silu(z))
    y = scaled_dense(features, 0.1, self.dtype)(y)
    slots = slots + y.reshape(slots.shape).astype(slots.dtype)
    slots += _Feedforward(self.mlp_ratio * features, self.dtype, name="mlp")(
      slots
    )
    gate = nn.Dense(
      self.gate_dim,
      kernel_init=nn.initializers.zeros,
      bias_init=nn.initializers.constant(self.gate_bias),
      dtype=self.dtype,
      name="gate",
    )(u)
    gate = -jnp.expm1(-jax.nn.softplus(gate.astype(jnp.float32)))
    return slots, state.reshape(batch, count, *state.shape[1:]), gate


class GRUSlotCell(nn.Module):
  """The baseline update: GRU and MLP (Locatello et al. 2020, algorithm 1).

  Called as `SlotSSMCell`: the slots are its only state, and its gate is 1,
  the full M-step.
  """

  gate_dim: int = 64  # E, key width of the mixture
  mlp_ratio: int = 2  # hidden width of the MLP over D
  dtype: DTypeLike = jnp.float32

  def initial_state(
    self, slots: Float[Array, "B K D"]
  ) -> Float[Array, "B K 0"]:
    """An empty array."""
    return jnp.zeros((*slots.shape[:2], 0), jnp.float32)

  @nn.compact
  def __call__(
    self,
    slots: Float[Array, "B K D"],
    update: Float[Array, "B K D"],
    state: Float[Array, "B K 0"],
  ) -> tuple[
    Float[Array, "B K D"], Float[Array, "B K 0"], Float[Array, "B K E"]
  ]:
    """One round: new slots, the empty state, and a gate of ones."""
    gru = nn.GRUCell(slots.shape[-1], dtype=self.dtype, name="gru")
    new, _ = gru(slots, update)
    slots = new.astype(slots.dtype)
    slots += _Feedforward(
      self.mlp_ratio * slots.shape[-1], self.dtype, name="mlp"
    )(slots)
    return slots, state, jnp.ones((*slots.shape[:2], self.gate_dim))


CELLS = {"ssm": SlotSSMCell, "gru": GRUSlotCell}
