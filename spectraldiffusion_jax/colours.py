"""Colours of labels and numbers: arrays in, uint8 [... H W 3] out.

Images are [H W 3] or [H W], uint8 or float in [0, 1]. Label maps are
integers; 0, the background, is dark grey, negative ids are black.
"""

import functools

import numpy as np
from jaxtyping import Bool, Float, Integer, Num, UInt8

from spectraldiffusion_jax.errors import UserError

BACKGROUND = (58, 62, 70)  # dark grey of label 0
# Okabe and Ito's colours, told apart by all common kinds of colour vision.
OKABE_ITO = (
  (230, 159, 0),
  (86, 180, 233),
  (0, 158, 115),
  (240, 228, 66),
  (0, 114, 178),
  (213, 94, 0),
  (204, 121, 167),
)
# Eight steps of matplotlib's magma, from 0 to 1.
MAGMA = (
  (0, 0, 4),
  (35, 17, 81),
  (95, 24, 127),
  (152, 45, 128),
  (211, 67, 110),
  (248, 118, 92),
  (254, 187, 129),
  (252, 253, 191),
)
# Linear RGB as seen without the red, and without the green, cones.
# Vienot, Brettel and Mollon, 1999.
DICHROMATS = (
  ((0.11238, 0.88762, 0.0), (0.11238, 0.88762, 0.0), (0.00401, -0.00401, 1.0)),
  ((0.29275, 0.70725, 0.0), (0.29275, 0.70725, 0.0), (-0.02234, 0.02234, 1.0)),
)


def label_colours(num: int) -> UInt8[np.ndarray, "num 3"]:
  """Colours of labels 0..num-1, at most 256; a shorter list is a prefix."""
  return _palette()[:num].copy()


def to_uint8(image: Num[np.ndarray, "H W *C"]) -> UInt8[np.ndarray, "H W 3"]:
  """Picture of an image: floats in [0, 1] are clipped, grey becomes RGB."""
  image = np.asarray(image)
  if image.dtype != np.uint8:
    image = np.nan_to_num(image.astype(np.float32)).clip(0, 1)
    image = (image * 255).round().astype(np.uint8)
  if image.ndim == 2:
    image = image[..., None]
  if image.ndim != 3 or image.shape[-1] not in (1, 3):
    raise UserError(
      f"image {list(image.shape)} must be [H W], [H W 1] or [H W 3]"
    )
  return np.broadcast_to(image, (*image.shape[:2], 3))


def colour_masks(
  labels: Integer[np.ndarray, "*B H W"],
) -> UInt8[np.ndarray, "*B H W 3"]:
  """Each label in its colour; ids from 256 on reuse the colours of 1..255."""
  labels = np.asarray(labels).astype(np.int64)
  index = np.where(labels > 255, (labels - 1) % 255 + 1, labels)
  return np.where(
    (labels < 0)[..., None], np.uint8(0), _palette()[index.clip(0)]
  )


def outlines(labels: Integer[np.ndarray, "H W"]) -> Bool[np.ndarray, "H W"]:
  """Pixels whose right or lower neighbour has another label."""
  edge = np.zeros(labels.shape, bool)
  edge[:, :-1] |= labels[:, :-1] != labels[:, 1:]
  edge[:-1] |= labels[:-1] != labels[1:]
  return edge


def overlay(
  image: Num[np.ndarray, "H W *C"],
  labels: Integer[np.ndarray, "H W"],
  *,
  opacity: float = 0.45,
) -> UInt8[np.ndarray, "H W 3"]:
  """Image tinted by its labels, a white line between two segments.

  The background keeps its own colours.
  """
  picture = to_uint8(image).astype(np.float32)
  if picture.shape[:2] != labels.shape:
    raise UserError(
      f"labels {list(labels.shape)} and image {list(picture.shape[:2])} must "
      "have one size; resize the labels (nearest) to the image"
    )
  share = np.where(labels != 0, np.float32(opacity), 0)[..., None]
  picture = picture * (1 - share) + colour_masks(labels) * share
  picture[outlines(labels)] = 255
  return picture.round().astype(np.uint8)


def attention_maps(
  attn: Float[np.ndarray, "*B h w"],
) -> UInt8[np.ndarray, "*B h w 3"]:
  """Attention from black (0) over magenta to pale yellow (1).

  On an absolute scale, so that undecided attention also looks undecided.
  """
  position = np.nan_to_num(attn).clip(0, 1) * (len(MAGMA) - 1)
  steps, stops = np.arange(len(MAGMA)), np.array(MAGMA, float)
  channels = [np.interp(position, steps, stop) for stop in stops.T]
  return np.stack(channels, -1).round().astype(np.uint8)


@functools.cache
def _palette() -> np.ndarray:
  """Greedily, the colour farthest from all before it, for every eye."""
  steps = np.linspace(35, 255, 9)
  grid = np.stack(np.meshgrid(steps, steps, steps), -1).reshape(-1, 3)
  # Dark ones drown in the background, pale ones in the paper.
  grid = grid[(grid.max(1) > 110) & (grid.sum(1) < 600)]
  colours = np.array([BACKGROUND, *OKABE_ITO], float)
  # A dichromat's differences count half more: they are the smaller ones.
  views = [_oklab(grid), *(1.5 * _oklab(grid, eye) for eye in DICHROMATS)]
  seen = [_oklab(colours), *(1.5 * _oklab(colours, e) for e in DICHROMATS)]
  distance = np.min(
    [
      np.linalg.norm(v[:, None] - s[None], axis=-1).min(1)
      for v, s in zip(views, seen, strict=True)
    ],
    axis=0,
  )
  while len(colours) < 256:
    best = distance.argmax()
    colours = np.concatenate([colours, grid[best : best + 1]])
    for view in views:
      near = np.linalg.norm(view - view[best], axis=-1)
      distance = np.minimum(distance, near)
  return colours.round().astype(np.uint8)


def _oklab(colours, eye=None):
  """SRGB [N 3] in 0..255 to Oklab (Ottosson, 2020), perceptually uniform."""
  srgb = np.asarray(colours) / 255
  linear = np.where(
    srgb < 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4
  )
  if eye is not None:
    linear = np.clip(linear @ np.array(eye).T, 0, 1)
  cones = linear @ np.array(
    [
      [0.41222147, 0.21190350, 0.08830246],
      [0.53633254, 0.68069955, 0.28171884],
      [0.05144599, 0.10739696, 0.62997870],
    ]
  )
  return np.cbrt(cones) @ np.array(
    [
      [0.21045426, 1.97799850, 0.02590404],
      [0.79361779, -2.42859221, 0.78277177],
      [-0.00407205, 0.45059371, -0.80867577],
    ]
  )
