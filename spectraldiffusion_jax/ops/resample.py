"""Bicubic resampling of grids, equal to torch's in both of its conventions.

A resampling is linear and separable, so it is written as one matrix per axis.
The matrices depend on sizes only: numpy makes them while a function is traced.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def _cubic(x: np.ndarray, a: float) -> np.ndarray:
  """Keys' cubic convolution kernel (IEEE ASSP 1981, equation 15)."""
  x = np.abs(x)
  near = (a + 2) * x**3 - (a + 3) * x**2 + 1
  far = a * (x**3 - 5 * x**2 + 8 * x - 4)
  return np.where(x <= 1, near, np.where(x < 2, far, 0.0))


def bicubic_matrix(
  size_in: int,
  size_out: int,
  *,
  antialias: bool,
  step: float | None = None,
) -> Float[np.ndarray, "J I"]:
  """Matrix that resamples one axis from `size_in` to `size_out` samples.

  Output sample j reads around the source coordinate step * (j + 1/2) - 1/2.

  Args:
    size_in: samples of the source axis, I.
    size_out: samples of the result, J.
    antialias: True: the kernel (a = -1/2) is stretched by the step where that
      exceeds one, and renormalised at the borders, as PIL does and torch with
      antialias=True. False: four taps (a = -3/4), the border repeated, as
      torch without antialias.
    step: source samples per result sample, size_in / size_out if None. Torch
      given a scale_factor uses 1 / scale_factor, even where the result's size
      was rounded.

  Returns:
    The weights, float32; every row sums to one.
  """
  step = size_in / size_out if step is None else step
  centre = step * (np.arange(size_out) + 0.5) - 0.5
  if antialias:
    offset = np.arange(size_in)[None, :] - centre[:, None]
    weights = _cubic(offset / max(step, 1.0), -0.5)
    weights /= weights.sum(axis=1, keepdims=True)
    return weights.astype(np.float32)
  weights = np.zeros((size_out, size_in))
  for tap in range(-1, 3):
    source = np.floor(centre) + tap
    column = np.clip(source, 0, size_in - 1).astype(int)
    weights[np.arange(size_out), column] += _cubic(source - centre, -0.75)
  return weights.astype(np.float32)


def resize_bicubic(
  image: Float[Array, "B H W C"],
  size: tuple[int, int],
  *,
  antialias: bool,
  step: tuple[float, float] | None = None,
) -> Float[Array, "B J I C"]:
  """Resamples rows and columns; see `bicubic_matrix` for the options.

  Args:
    image: any float array in [B H W C]; computed in float32.
    size: rows and columns of the result.
    antialias: which of the two conventions.
    step: source samples per result sample, rows and columns.

  Returns:
    The resampled array, float32. Cubic kernels overshoot: the result may leave
    the source's range by a few per cent at edges.
  """
  steps = (None, None) if step is None else step
  rows, columns = (
    jnp.asarray(bicubic_matrix(n_in, n_out, antialias=antialias, step=s))
    for n_in, n_out, s in zip(image.shape[1:3], size, steps, strict=True)
  )
  image = image.astype(jnp.float32)
  image = jnp.einsum("JH,BHWC->BJWC", rows, image, precision="highest")
  return jnp.einsum("IW,BJWC->BJIC", columns, image, precision="highest")
