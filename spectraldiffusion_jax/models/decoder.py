"""Mixture decoders: the simple, non-diffusion baseline.

Each slot paints an RGB image and a mask logit; masks are a softmax over
slots (Locatello et al. 2020, section 3.1; Watters et al. 2019).
"""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float

from spectraldiffusion_jax.models import layers
from spectraldiffusion_jax.types import Decoded, Features, Slots


def mixture(
  rgba: Float[Array, "B K H W 4"],
  active: Bool[Array, "B K"],
  image: Float[Array, "B H W 3"],
) -> Decoded:
  """Softmax over active slots of the last channel, then the mixture."""
  logits = rgba[..., 3].astype(jnp.float32)
  logits = jnp.where(active[:, :, None, None], logits, -1e9)
  masks = jax.nn.softmax(logits, axis=1)
  image_hat = jnp.einsum("BKHWC,BKHW->BHWC", rgba[..., :3], masks)
  return Decoded(
    masks=masks,
    prediction=image_hat.astype(jnp.float32),
    target=image,
    weight=jnp.ones(image.shape[:1], jnp.float32),
  )


class SpatialBroadcastDecoder(nn.Module):
  """Broadcasts a slot over a coarse grid and up-samples by convolutions."""

  width: int = 32  # channels of each layer
  upsamplings: int = 3  # factor-2 steps; the image side is grid * 2**this
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(
    self,
    slots: Slots,
    image: Float[Array, "B H W 3"],
    features: Features,
    *,
    train: bool = False,
  ) -> Decoded:
    """Paints the image from slots alone."""
    del features, train
    slots, active = slots.slots, slots.active
    b, k, _ = slots.shape
    height, width = image.shape[1:3]
    scale = 2**self.upsamplings
    x = nn.Dense(self.width, dtype=self.dtype)(slots).reshape(b * k, 1, 1, -1)
    x = jnp.broadcast_to(
      x, (b * k, -(-height // scale), -(-width // scale), self.width)
    )
    x = layers.PositionEmbedding()(x)
    for _ in range(self.upsamplings):
      x = nn.relu(
        nn.ConvTranspose(self.width, (4, 4), (2, 2), dtype=self.dtype)(x)
      )
    rgba = nn.Conv(4, (3, 3), dtype=self.dtype)(x)[:, :height, :width]
    return mixture(rgba.reshape(b, k, height, width, 4), active, image)


class PatchMLPDecoder(nn.Module):
  """One MLP for each (slot, patch): no path between patches but the slot.

  The decoder of DINOSAUR (Seitzer et al. 2023, section 3.2), painting the
  pixels of a patch instead of its features.
  """

  patch: int = 4  # pixels a side
  width: int = 64
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(
    self,
    slots: Slots,
    image: Float[Array, "B H W 3"],
    features: Features,
    *,
    train: bool = False,
  ) -> Decoded:
    """Paints the image from slots alone."""
    del features, train
    slots, active = slots.slots, slots.active
    b, k, _ = slots.shape
    height, width = image.shape[1:3]
    h, w = -(-height // self.patch), -(-width // self.patch)
    x = nn.Dense(self.width, dtype=self.dtype)(slots)[:, :, None, None]
    x = jnp.broadcast_to(x, (b, k, h, w, self.width)).reshape(b * k, h, w, -1)
    x = nn.relu(layers.PositionEmbedding()(x))
    x = layers.MLP((self.width, self.width, 4 * self.patch**2), self.dtype)(x)
    x = layers.depth_to_space(x, self.patch)[:, :height, :width]
    return mixture(x.reshape(b, k, height, width, 4), active, image)
