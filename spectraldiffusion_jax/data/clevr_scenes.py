"""Random scenes by the rules of the CLEVR generator, as plain numbers.

Johnson et al. 2017 (arXiv:1612.06890, section 3) and the public generator:
sizes, shapes, materials, colours, jitter of the camera and of three lamps, and
gaps between objects. A scene is a function of (level, seed, index, attempt).
"""

from typing import NamedTuple

import numpy as np

from spectraldiffusion_jax.errors import UserError
from spectraldiffusion_jax.ops import raycast, render

# Codes of the public CLEVR-with-masks files; 0 is background and padding.
COLORS = {
  "red": (173, 35, 35),
  "cyan": (41, 208, 208),
  "green": (29, 105, 20),
  "blue": (42, 75, 215),
  "brown": (129, 74, 25),
  "gray": (87, 87, 87),
  "purple": (129, 38, 192),
  "yellow": (255, 238, 51),
}
# The generator takes these numbers for linear light, and so does this one.
ALBEDO = np.asarray([(0, 0, 0), *COLORS.values()], np.float32) / 255
GRAY = list(COLORS).index("gray") + 1
NOMINAL_RADIUS = {1: 0.7, 2: 0.35}
# The generator's meshes fill this share of their nominal box, by shape code,
# and hover by the rest: labels then meet those of Blender at an IoU of 0.98.
MESH_SCALE = np.asarray([0.0, 1.0, 0.988, 0.953], np.float32)
MAX_OBJECTS = 10

CAMERA, CAMERA_JITTER, LAMP_JITTER = (7.481, -6.508, 5.344), 0.5, 1.0
EXTENT, MIN_GAP, MARGIN, TRIES = 3.0, 0.25, 0.4, 200


class Level(NamedTuple):
  """How many objects of which colours a scene has."""

  objects: tuple[int, int]
  colors: tuple[int, ...]
  repeats: bool


LEVELS = {
  "easy": Level((3, 6), tuple(c for c in range(1, 9) if c != GRAY), False),
  "hard": Level((3, MAX_OBJECTS), tuple(range(1, 9)), True),
}


SIZES = range(16, 513)


def check(level: str, size: int) -> None:
  """Raises UserError unless pictures of this level and size are offered."""
  if level not in LEVELS:
    levels = ", ".join(LEVELS)
    raise UserError(f"procedural_clevr: level {level!r} is not one of {levels}")
  if size not in SIZES:
    raise UserError(
      f"procedural_clevr: size {size} is not within {SIZES[0]}..{SIZES[-1]}"
    )


class Drawn(NamedTuple):
  """A scene and the CLEVR-with-masks codes of its objects, [11] uint8 each."""

  scene: raycast.Scene
  codes: dict[str, np.ndarray]

  @property
  def num_objects(self) -> int:
    """Objects in the scene."""
    return int(np.count_nonzero(self.scene.shape))


def _on_screen(
  places: np.ndarray, radii: np.ndarray, camera: np.ndarray
) -> np.ndarray:
  """Middle and apparent radius [... 3] of balls, in heights of the crop."""
  ahead = -camera / np.linalg.norm(camera)
  right = np.cross(ahead, (0.0, 0.0, 1.0))
  right /= np.linalg.norm(right)
  axes = np.stack([right, np.cross(right, ahead), ahead], axis=-1)
  points = np.concatenate([places, radii[..., None]], axis=-1)
  x, y, depth = np.moveaxis((points - camera) @ axes, -1, 0)
  seen = np.stack([x, -y, radii], axis=-1) * render.CROP.focal
  seen /= depth[..., None]
  return seen + (0.5, render.CROP.middle_row, 0.0)


def _places(
  rng: np.random.Generator, radii: np.ndarray, camera: np.ndarray
) -> np.ndarray | None:
  """Ground positions [n 2] that keep CLEVR's gaps; None when one is stuck.

  Besides the gap between surfaces, no two objects may be nearly level in the
  camera's view: neither left-right nor front-behind. Places that surely hide an
  object, out of the picture or behind another, are not tried.
  """
  right, ahead = np.asarray([(-camera[1], camera[0]), -camera[:2]])
  tries = rng.uniform(-EXTENT, EXTENT, (len(radii), TRIES, 2))
  x, y = (tries @ (axis / np.linalg.norm(axis)) for axis in (right, ahead))
  column, row, size = np.moveaxis(
    _on_screen(tries, np.repeat(radii[:, None], TRIES, 1), camera), -1, 0
  )
  off_center = np.maximum(np.abs(column - 0.5), np.abs(row - 0.5))
  inside = off_center < 0.5 + 0.5 * size
  chosen = np.zeros(len(radii), int)
  for k, radius in enumerate(radii):
    before = np.arange(k), chosen[:k]

    def apart(values, k=k, before=before):
      return values[k][:, None] - values[before]

    gap = radius + radii[:k] + MIN_GAP
    big = np.maximum(size[k][:, None], size[before])
    small = np.minimum(size[k][:, None], size[before])
    good = (np.abs(apart(x)) > MARGIN) & (np.abs(apart(y)) > MARGIN)
    good &= apart(x) ** 2 + apart(y) ** 2 > gap**2
    good &= apart(column) ** 2 + apart(row) ** 2 > (big - 0.5 * small) ** 2
    good = good.all(axis=1) & inside[k]
    if not good.any():
      return None
    chosen[k] = good.argmax()
  return tries[np.arange(len(radii)), chosen]


def sample_scene(
  level: str, seed: int, index: int, *, attempt: int = 0
) -> Drawn | None:
  """One candidate for scene index; what it shows is not looked at yet.

  Args:
    level: key of LEVELS.
    seed: stream of scenes, at least 0.
    index: position in the stream, at least 0.
    attempt: which candidate; all have the same number of objects.

  Returns:
    The scene and its codes, or None when its objects found no place.
  """
  (low, high), colors, repeats = LEVELS[level]
  n = int(np.random.default_rng([seed, index]).integers(low, high + 1))
  rng = np.random.default_rng([seed, index, attempt + 1])
  code = {
    "size": rng.integers(1, 3, n),
    "material": rng.integers(1, 3, n),
    "shape": rng.integers(1, 4, n),
    "color": rng.choice(colors, n, replace=repeats),
  }
  nominal = np.asarray([NOMINAL_RADIUS[size] for size in code["size"]])
  camera = np.asarray(CAMERA) + rng.uniform(-1, 1, 3) * CAMERA_JITTER
  lamps = np.asarray([lamp.position for lamp in render.LAMPS])
  lamps[:3] += rng.uniform(-1, 1, (3, 3)) * LAMP_JITTER
  turns = rng.uniform(0, 2 * np.pi, n)
  places = _places(rng, nominal, camera)
  if places is None:
    return None

  def padded(values, dtype=np.float32):
    out = np.zeros((MAX_OBJECTS, *np.shape(values)[1:]), dtype)
    out[:n] = values
    return out

  scene = raycast.Scene(
    shape=padded(code["shape"], np.int32),
    metal=padded(code["material"] == 2, np.bool_),
    center=padded(np.concatenate([places, nominal[:, None]], axis=1)),
    radius=padded(nominal * MESH_SCALE[code["shape"]]),
    angle=padded(turns),
    color=padded(ALBEDO[code["color"]]),
    camera=camera.astype(np.float32),
    lamps=lamps.astype(np.float32),
  )
  codes = {k: np.pad(v, (1, MAX_OBJECTS - n)) for k, v in code.items()}
  return Drawn(scene, {k: v.astype(np.uint8) for k, v in codes.items()})
