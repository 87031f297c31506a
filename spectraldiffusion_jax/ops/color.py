"""Colour and image primitives: CIELAB, Gaussian blur, pooling to a grid."""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

# IEC 61966-2-1 primaries to CIE XYZ, and the D65 white (2 degree observer).
_RGB_TO_XYZ = np.array(
  [
    [0.412453, 0.357580, 0.180423],
    [0.212671, 0.715160, 0.072169],
    [0.019334, 0.119193, 0.950227],
  ]
)
_WHITE = np.array([0.95047, 1.0, 1.08883])
# XYZ / white -> (L, a, b) / 100 after the cube-root curve f; L misses -0.16.
_CURVE_TO_LAB = np.array([[0, 1.16, 0], [5.0, -5.0, 0], [0, 2.0, -2.0]])
_KNEE = 6.0 / 29.0
# Accelerators multiply float32 matrices in fewer bits unless asked not to.
_EXACT = "highest"


def _mix(values: Float[Array, "*S 3"], matrix: np.ndarray) -> Array:
  """Multiplies each colour by a 3x3 matrix."""
  matrix = jnp.asarray(matrix, values.dtype)
  return jnp.einsum("...i,ji->...j", values, matrix, precision=_EXACT)


def srgb_to_lab(image: Float[Array, "*S 3"]) -> Float[Array, "*S 3"]:
  """Converts sRGB to CIELAB divided by 100.

  Args:
    image: Gamma-coded sRGB in [0, 1]; values outside are clipped.

  Returns:
    (L, a, b) / 100 under D65: L in [0, 1], a and b roughly in [-1, 1], so that
    a Euclidean distance of 0.023 is one just noticeable difference.

  Source: IEC 61966-2-1 (sRGB) and CIE 15:2004, section 8.2.1.
  """
  image = jnp.clip(image, 0.0, 1.0)
  linear = jnp.where(
    image > 0.04045,
    ((jnp.maximum(image, 0.04045) + 0.055) / 1.055) ** 2.4,
    image / 12.92,
  )
  ratio = _mix(linear, _RGB_TO_XYZ / _WHITE[:, None])
  curve = jnp.where(
    ratio > _KNEE**3,
    jnp.cbrt(jnp.maximum(ratio, _KNEE**3)),
    ratio / (3 * _KNEE**2) + 4.0 / 29.0,
  )
  lab = _mix(curve, _CURVE_TO_LAB)
  return jnp.stack([lab[..., 0] - 0.16, lab[..., 1], lab[..., 2]], axis=-1)


def lab_to_srgb(lab: Float[Array, "*S 3"]) -> Float[Array, "*S 3"]:
  """Inverts `srgb_to_lab`; colours outside the sRGB gamut are clipped."""
  lab = jnp.stack([lab[..., 0] + 0.16, lab[..., 1], lab[..., 2]], axis=-1)
  curve = _mix(lab, np.linalg.inv(_CURVE_TO_LAB))
  ratio = jnp.where(
    curve > _KNEE, curve**3, 3 * _KNEE**2 * (curve - 4.0 / 29.0)
  )
  inverse = np.linalg.inv(_RGB_TO_XYZ) @ np.diag(_WHITE)
  linear = jnp.clip(_mix(ratio, inverse), 0.0, 1.0)
  return jnp.where(
    linear > 0.0031308,
    1.055 * jnp.maximum(linear, 0.0031308) ** (1 / 2.4) - 0.055,
    12.92 * linear,
  )


def gaussian_blur(
  image: Float[Array, "H W C"], *, sigma: float
) -> Float[Array, "H W C"]:
  """Blurs with a Gaussian of `sigma` pixels cut at 4 sigma, edges repeated.

  A sigma of 0 returns the image unchanged.
  """
  if sigma <= 0:
    return image
  radius = math.ceil(4 * sigma)
  tap = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
  tap = tap / tap.sum()
  for axis in (0, 1):
    size = image.shape[axis]
    # A banded matrix per axis: a matmul beats 2r+1 shifted copies everywhere.
    source = np.clip(
      np.arange(size)[:, None] + np.arange(-radius, radius + 1), 0, size - 1
    )
    band = np.zeros((size, size))
    np.add.at(band, (np.arange(size)[:, None], source), tap)
    band = jnp.asarray(band, image.dtype)
    image = jnp.moveaxis(
      jnp.tensordot(band, image, (1, axis), precision=_EXACT), 0, axis
    )
  return image


def _cell_average(size: int, cells: int) -> np.ndarray:
  """Matrix [cells size] averaging pixels over equal cells, exact overlap."""
  edge = np.linspace(0, size, cells + 1)
  pixel = np.arange(size)
  high = np.minimum(edge[1:, None], pixel + 1.0)
  low = np.maximum(edge[:-1, None], pixel)
  return np.maximum(high - low, 0) * cells / size


def pool_to_grid(
  image: Float[Array, "H W C"], *, grid: tuple[int, int]
) -> Float[Array, "h w C"]:
  """Averages an image over the cells of a grid.

  Cells need not be whole pixels: a pixel cut by a border counts with the
  share of its area, so any grid works for any size.

  Args:
    image: Values per pixel.
    grid: Rows and columns (h, w) of the result.

  Returns:
    Mean of each cell.
  """
  height, width, _ = image.shape
  if height % grid[0] == 0 and width % grid[1] == 0:
    # Whole pixels: a mean, far cheaper on wide features than two products.
    split = (grid[0], height // grid[0], grid[1], width // grid[1], -1)
    return jnp.mean(image.reshape(split), axis=(1, 3))
  rows = jnp.asarray(_cell_average(image.shape[0], grid[0]), image.dtype)
  columns = jnp.asarray(_cell_average(image.shape[1], grid[1]), image.dtype)
  return jnp.einsum("hH,HWC,wW->hwC", rows, image, columns, precision=_EXACT)
