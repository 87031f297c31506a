"""Small layers shared by encoders and decoders."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float

REMAT = {
  "none": None,
  "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
  "full": jax.checkpoint_policies.nothing_saveable,
}
"""What is kept for the backward pass: everything, the results of products
with parameters, or nothing but the inputs; the rest is computed again."""


def remat(
  module: type[nn.Module], policy: str, *, prevent_cse: bool = True
) -> type[nn.Module]:
  """The same module under a policy of REMAT, with the same parameters.

  Its class has another name: where flax would number submodules, name them.

  Args:
    module: the class.
    policy: key of REMAT.
    prevent_cse: False inside a scan, where nothing can be merged anyway.
  """
  if REMAT[policy] is None:
    return module
  return nn.remat(module, policy=REMAT[policy], prevent_cse=prevent_cse)


def position_grid(height: int, width: int) -> Float[np.ndarray, "h w 4"]:
  """Distances to the four borders, each in [0, 1].

  The soft position code of Slot Attention (Locatello et al. 2020, appendix
  E.2): (y, x, 1 - y, 1 - x) at pixel centres.
  """
  y = (np.arange(height, dtype=np.float32) + 0.5) / height
  x = (np.arange(width, dtype=np.float32) + 0.5) / width
  y, x = np.meshgrid(y, x, indexing="ij")
  return np.stack([y, x, 1 - y, 1 - x], -1)


class PositionEmbedding(nn.Module):
  """Adds a linear map of the position code to a grid of features."""

  @nn.compact
  def __call__(self, x: Float[Array, "B h w D"]) -> Float[Array, "B h w D"]:
    """Same shape and dtype."""
    grid = jnp.asarray(position_grid(*x.shape[1:3]), x.dtype)
    return x + nn.Dense(x.shape[-1], dtype=x.dtype)(grid)[None]


class MLP(nn.Module):
  """Dense layers with ReLU between them."""

  widths: Sequence[int]
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... E"]:
    """Applies the layers to the last axis."""
    for width in self.widths[:-1]:
      x = nn.relu(nn.Dense(width, dtype=self.dtype)(x))
    return nn.Dense(self.widths[-1], dtype=self.dtype)(x)


def space_to_depth(
  x: Float[Array, "B H W C"], size: int
) -> Float[Array, "B h w c"]:
  """Folds size x size pixels into channels; H and W must be multiples."""
  b, height, width, c = x.shape
  x = x.reshape(b, height // size, size, width // size, size, c)
  return x.transpose(0, 1, 3, 2, 4, 5).reshape(
    b, height // size, width // size, size * size * c
  )


def depth_to_space(
  x: Float[Array, "B h w c"], size: int
) -> Float[Array, "B H W C"]:
  """Inverse of `space_to_depth`."""
  b, h, w, c = x.shape
  x = x.reshape(b, h, w, size, size, c // size**2)
  return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, h * size, w * size, -1)
