"""U-Net encoder with an instance field: a key for every pixel.

A 2x2 space-to-depth stem makes the finest level half the image side, and the
field is read out with four sub-pixels a cell: pixel-exact keys at a quarter
of the price. Ronneberger et al., MICCAI 2015; residual pre-activation blocks
after He et al., ECCV 2016.
"""

from collections.abc import Sequence

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from spectraldiffusion_jax.models import layers
from spectraldiffusion_jax.types import Features

STEM = 2  # pixels a side that the stem folds into channels


class Block(nn.Module):
  """Residual pre-activation convolutions, layer-normalised at entry.

  Without normalisation the block starts as the identity.
  """

  width: int
  depth: int
  normalise: bool
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, "B h w D"]) -> Float[Array, "B h w D"]:
    """Same shape."""
    y = nn.LayerNorm(dtype=self.dtype)(x) if self.normalise else x
    for i in range(self.depth):
      identity = i == self.depth - 1 and not self.normalise
      y = nn.Conv(
        self.width,
        (3, 3),
        kernel_init=nn.initializers.zeros
        if identity
        else nn.initializers.lecun_normal(),
        dtype=self.dtype,
      )(nn.relu(y))
    return x + y


class UNetEncoder(nn.Module):
  """Image to tokens at `stride` pixels and a field at every pixel.

  Normalisation costs more than convolution on the finest level, so only the
  coarser ones have it. `fusion`, if given, is applied to the grid of 8 STEM
  pixels a side, where each token sees the whole image for little.
  """

  widths: Sequence[int] = (24, 48, 96, 128)  # channels, fine to coarse
  stride: int = 4  # pixels a side of a token: STEM times a power of 2
  embedding: int = 4  # channels of the field beside foreground and vote
  fusion: nn.Module | None = None
  dtype: jnp.dtype = jnp.float32
  remat: str = "none"  # of blocks, see layers.REMAT

  @nn.compact
  def __call__(self, image: Float[Array, "B H W 3"]) -> Features:
    """Tokens [B h w F] and field [B H W 3 + embedding]."""
    x = layers.space_to_depth(2 * image - 1, STEM).astype(self.dtype)
    row = jnp.linspace(-1, 1, x.shape[1], dtype=self.dtype)[None, :, None, None]
    x = jnp.concatenate([x, jnp.broadcast_to(row, (*x.shape[:3], 1))], -1)
    x = nn.Conv(self.widths[0], (3, 3), dtype=self.dtype)(x)
    skips = []
    for level, width in enumerate(self.widths):
      if level:
        x = nn.Conv(width, (2, 2), (2, 2), dtype=self.dtype)(nn.relu(x))
      x = self._block(level, level)(x)
      skips.append(x)
    if self.fusion is not None:
      x = self.fusion(x)
    tokens = x
    for level in reversed(range(len(self.widths) - 1)):
      x = nn.Conv(self.widths[level], (1, 1), dtype=self.dtype)(nn.relu(x))
      x = x.repeat(2, axis=1).repeat(2, axis=2) + skips[level]
      x = self._block(level, 2 * (len(self.widths) - 1) - level)(x)
      if STEM * 2**level == self.stride:
        tokens = x
    field = nn.Conv(
      STEM**2 * (3 + self.embedding), (3, 3), dtype=self.dtype, name="field"
    )(nn.relu(x))
    field = layers.depth_to_space(field, STEM).astype(jnp.float32)
    return Features(tokens=tokens, field=field)

  def _block(self, level: int, number: int) -> Block:
    return layers.remat(Block, self.remat)(
      width=self.widths[level],
      depth=2 if level else 1,
      normalise=level > 0,
      dtype=self.dtype,
      name=f"Block_{number}",
    )
