"""Encoders that are trained here: image in, a grid of tokens out."""

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from spectraldiffusion_jax.models import layers
from spectraldiffusion_jax.types import Features


class CNNEncoder(nn.Module):
  """Convolutions, position code and an MLP for each token.

  The encoder of Slot Attention (Locatello et al. 2020, appendix E.3) behind
  a space-to-depth stem, so that no layer runs at image resolution.
  """

  width: int = 64  # channels of every layer
  stride: int = 4  # pixels a side of one token
  depth: int = 3  # 3x3 convolutions
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, image: Float[Array, "B H W 3"]) -> Features:
    """Tokens [B h w F]; there is no field."""
    x = layers.space_to_depth(2 * image - 1, self.stride).astype(self.dtype)
    for _ in range(self.depth):
      x = nn.relu(nn.Conv(self.width, (3, 3), dtype=self.dtype)(x))
    x = layers.PositionEmbedding()(x)
    x = nn.LayerNorm(dtype=self.dtype)(x)
    return Features(layers.MLP((self.width, self.width), self.dtype)(x))


class ViTEncoder(nn.Module):
  """A small vision transformer trained from scratch; there is no field.

  Args:
    vit: of models/vit_variants.py; its patch is the token's side in pixels.
  """

  vit: nn.Module

  @nn.compact
  def __call__(self, image: Float[Array, "B H W 3"]) -> Features:
    """Tokens [B h w F] after the last norm."""
    return Features(self.vit(2 * image - 1).tokens)
