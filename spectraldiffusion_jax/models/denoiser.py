"""Slot-conditioned denoisers of feature latents: the diffusion decoder.

Both predict v = alpha eps - sigma x0 (Salimans & Ho 2022) for every token
from the noised token, the noise level and the slots; no image feature ever
enters, so what is not in the noised token has to come through the slots.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from spectraldiffusion_jax.models import layers
from spectraldiffusion_jax.types import Slots


def time_embedding(t: Float[Array, " B"], width: int) -> Float[Array, "B D"]:
  """Sines and cosines of t in [0, 1] at frequencies 1 to 1000."""
  frequency = jnp.exp(jnp.linspace(0.0, jnp.log(1000.0), width // 2))
  angle = t[:, None] * frequency[None]
  return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], -1)


class CompositionalDenoiser(nn.Module):
  """One prediction and one mask logit for each (slot, token); mixed by masks.

  Tokens do not see each other, so slots carry all non-local information. Masks
  are the slots' attention times a factor of slot and position that starts at
  one: they never see the noise, and one evaluation gives them. Starting from
  nothing, the masks came too slowly for slots to be of use (docs/results.md).
  """

  width: int = 256
  depth: int = 3  # hidden layers
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(
    self,
    noised: Float[Array, "B N C"],
    t: Float[Array, " B"],
    slots: Slots,
    position: Float[Array, "B N 4"],
  ) -> tuple[Float[Array, "B N C"], Float[Array, "B K N"]]:
    """Predicted v, and masks that sum to 1 over active slots."""

    def dense(width, name, **options):
      return nn.Dense(width, dtype=self.dtype, name=name, **options)

    slots, attention, active = slots.slots, slots.attention, slots.active
    time = dense(self.width, "time")(time_embedding(t, 32))[:, None, None]
    slot = dense(self.width, "slot")(slots)[:, :, None]
    place = dense(self.width, "position")(position)[:, None]
    token = dense(self.width, "token")(noised)[:, None]
    factor = dense(1, "mask", kernel_init=nn.initializers.zeros)(
      nn.relu(
        dense(self.width, "mask_slot")(slots)[:, :, None]
        + dense(self.width, "mask_position")(position)[:, None]
      )
    )[..., 0]
    mask = jnp.log(attention + 1e-4) + factor.astype(jnp.float32)
    masks = jax.nn.softmax(jnp.where(active[:, :, None], mask, -1e9), axis=1)
    x = nn.relu(token + slot + place + time)
    x = layers.MLP(
      (self.width,) * (self.depth - 1) + (noised.shape[-1],), self.dtype
    )(x)
    v = jnp.einsum("BKNC,BKN->BNC", x.astype(jnp.float32), masks)
    return v, masks


class CrossAttentionDenoiser(nn.Module):
  """Tokens query slots and a few registers; masks are the last attention.

  Registers are image-independent keys that take up residual attention (CODA,
  Nguyen et al. 2026); the masks are renormalised over the real slots.
  """

  width: int = 256
  depth: int = 2  # blocks
  heads: int = 4
  registers: int = 4
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(
    self,
    noised: Float[Array, "B N C"],
    t: Float[Array, " B"],
    slots: Slots,
    position: Float[Array, "B N 4"],
  ) -> tuple[Float[Array, "B N C"], Float[Array, "B K N"]]:
    """Predicted v, and masks that sum to 1 over active slots."""
    slots, active = slots.slots, slots.active
    b, k, _ = slots.shape

    def dense(width, name):
      return nn.Dense(width, dtype=self.dtype, name=name)

    time = dense(self.width, "time")(time_embedding(t, 32))[:, None]
    x = dense(self.width, "token")(noised) + dense(self.width, "position")(
      position
    )
    register = self.param(
      "registers", nn.initializers.normal(1.0), (self.registers, self.width)
    )
    register = jnp.broadcast_to(register, (b, *register.shape))
    memory = jnp.concatenate([dense(self.width, "slot")(slots), register], 1)
    valid = jnp.concatenate([active, jnp.ones((b, self.registers), bool)], 1)
    for i in range(self.depth):
      query = nn.LayerNorm(dtype=self.dtype)(x + time)
      out, attention = self._attend(query, memory, valid, f"block{i}")
      x = x + out
      hidden = nn.LayerNorm(dtype=self.dtype)(x + time)
      x = x + layers.MLP((2 * self.width, self.width), self.dtype)(hidden)
    v = dense(noised.shape[-1], "out")(x).astype(jnp.float32)
    masks = attention[:, :k] + 1e-6 * active[:, :, None]
    return v, masks / masks.sum(1, keepdims=True)

  def _attend(self, query, memory, valid, name):
    """Multi-head attention; also returns its weights [B K+R N], head mean."""

    def split(name, x):
      width = self.width // self.heads
      return nn.DenseGeneral((self.heads, width), dtype=self.dtype, name=name)(
        x
      )

    q = split(f"{name}_query", query)
    k, v = split(f"{name}_key", memory), split(f"{name}_value", memory)
    logits = jnp.einsum("BNMD,BKMD->BMNK", q, k).astype(jnp.float32)
    logits = logits / q.shape[-1] ** 0.5
    logits = jnp.where(valid[:, None, None], logits, -1e9)
    weights = jax.nn.softmax(logits, -1)
    out = jnp.einsum("BMNK,BKMD->BNMD", weights.astype(self.dtype), v)
    out = nn.DenseGeneral(
      self.width, axis=(-2, -1), dtype=self.dtype, name=f"{name}_out"
    )(out)
    return out, weights.mean(1).swapaxes(1, 2)


DENOISERS = {
  "compositional": CompositionalDenoiser,
  "cross_attention": CrossAttentionDenoiser,
}
