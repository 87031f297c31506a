"""Encoders: image in, a grid of tokens out."""

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from spectraldiffusion_jax.models import layers, vit_input
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
  """A small vision transformer trained from scratch.

  Args:
    vit: of models/vit_variants.py; its patch is the token's side in pixels.
    field: channels of the instance field that each token spreads over its
      pixels; 0 = there is none.
  """

  vit: nn.Module
  field: int = 0

  @nn.compact
  def __call__(self, image: Float[Array, "B H W 3"]) -> Features:
    """Tokens [B h w F] after the last norm, and field [B H W field]."""
    tokens = self.vit(2 * image - 1).tokens
    if not self.field:
      return Features(tokens)
    # Neighbours join in, or the field would break at the edges of patches.
    patch = self.vit.patch
    x = nn.Conv(patch**2 * self.field, (3, 3), name="field")(tokens)
    return Features(tokens, field=layers.depth_to_space(x, patch))


class BackboneEncoder(nn.Module):
  """A pretrained vision transformer, and a fusion of its tokens if wanted.

  What is frozen in it is `vit.tuned`'s business; its parameters are at `vit`.

  Args:
    vit: of models/vit_variants.py.
    features: "tokens" (after the final norm) or "keys" (of the last block).
    size: pixels of the longer side that it sees, see `vit_input.input_size`.
    fusion: trained, applied to the features before slots compete for them.
  """

  vit: nn.Module
  features: str = "tokens"
  size: int = 0
  fusion: nn.Module | None = None

  @nn.compact
  def __call__(self, image: Float[Array, "B H W 3"]) -> Features:
    """Tokens [B h w F] of images of any size; there is no field."""
    seen = vit_input.normalised(image, patch=self.vit.patch, longest=self.size)
    found = getattr(self.vit(seen), self.features)
    tokens = found if self.fusion is None else self.fusion(found)
    return Features(tokens, backbone=found)
