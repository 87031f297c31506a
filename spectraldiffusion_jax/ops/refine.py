"""From token masks to pixel masks by local colour, without training."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from spectraldiffusion_jax.ops import color

_EXACT = "highest"


def refine_pixels(
  image_lab: Float[Array, "H W C"],
  assignment: Float[Array, "N K"],
  *,
  grid: tuple[int, int],
  reach: int = 1,
  window: int = 2,
  stickiness: float = 0.01,
) -> Float[Array, "K H W"]:
  """Sharpens token masks to pixels by local colour.

  A pixel goes to the slot, among those present within `reach` tokens, whose
  mean colour over the surrounding (2 window + 1)^2 tokens is nearest, less a
  small bonus for the slot that the interpolated token mask names.

  Args:
    image_lab: Pixel features, unsmoothed.
    assignment: Responsibilities of the tokens.
    grid: Token rows and columns (h, w), N = h w.
    reach: How far from its token a pixel may look for slots.
    window: Radius of the neighbourhood a local mean is taken over.
    stickiness: Bonus of the interpolated mask, in feature units.

  Returns:
    One-hot masks.
  """
  height, width, channels = image_lab.shape
  slots = assignment.shape[1]
  share = assignment.reshape(*grid, slots)
  pooled = color.pool_to_grid(image_lab, grid=grid)
  weighted = (share[..., None] * pooled[:, :, None, :]).reshape(*grid, -1)
  mass = _box_sum(share, window)
  mean = _box_sum(weighted, window).reshape(*grid, slots, channels)
  mean = mean / jnp.maximum(mass, 1e-6)[..., None]
  present = _box_sum(share, reach) > 1e-6
  row = (jnp.arange(height) * grid[0] // height)[:, None]
  column = (jnp.arange(width) * grid[1] // width)[None, :]
  step = image_lab[:, :, None, :] - mean[row, column]
  soft = jax.image.resize(share, (height, width, slots), "linear")
  cost = jnp.sqrt(jnp.sum(step**2, axis=-1)) - stickiness * soft
  best = jnp.argmin(jnp.where(present[row, column], cost, jnp.inf), axis=-1)
  return jnp.moveaxis(jax.nn.one_hot(best, slots), -1, 0)


def _box_sum(x: Float[Array, "h w C"], radius: int) -> Float[Array, "h w C"]:
  """Sums over a (2 radius + 1)^2 window, zeros outside."""
  for axis in (0, 1):
    place = jnp.arange(x.shape[axis])
    band = jnp.abs(place[:, None] - place[None, :]) <= radius
    x = jnp.tensordot(band.astype(x.dtype), x, (1, axis), precision=_EXACT)
    x = jnp.moveaxis(x, 0, axis)
  return x
