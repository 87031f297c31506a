"""Small scenes, and a pinhole camera of its own, for the ray caster's tests."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from spectraldiffusion_jax.ops import raycast, render

SIZE = 48
CAMERA = np.asarray([7.4, -6.5, 5.3])
RED, BLUE, WHITE = (0.7, 0.1, 0.1), (0.1, 0.1, 0.8), (0.9, 0.9, 0.9)


def make_scene(*objects, lamps=None, rows=3):
  """Scene of (shape, place, radius, angle, metal, colour) tuples."""
  full = [*objects, *[(0, (0, 0, 0), 0, 0, False, (0, 0, 0))] * rows][:rows]
  shape, place, radius, angle, metal, color = zip(*full, strict=True)
  if lamps is None:
    lamps = [lamp.position for lamp in render.LAMPS]
  return raycast.Scene(
    shape=jnp.asarray(shape, jnp.int32),
    metal=jnp.asarray(metal),
    center=jnp.asarray(place, jnp.float32),
    radius=jnp.asarray(radius, jnp.float32),
    angle=jnp.asarray(angle, jnp.float32),
    color=jnp.asarray(color, jnp.float32),
    camera=jnp.asarray(CAMERA, jnp.float32),
    lamps=jnp.asarray(lamps, jnp.float32),
  )


@functools.cache
def drawing(draw, height, width, frame):
  return jax.jit(
    functools.partial(draw, height=height, width=width, frame=frame)
  )


def draw(scene, size=SIZE):
  image, ids = drawing(render.render, size, size, render.CROP)(scene)
  return np.asarray(image), np.asarray(ids)


def ids_of(scene, height=SIZE, width=SIZE, frame=render.CROP):
  return np.asarray(drawing(render.instance_ids, height, width, frame)(scene))


def project(points, camera=CAMERA):
  """Column and row in the 320x240 picture, and depth: float64, on its own."""
  ahead = -camera / np.linalg.norm(camera)
  right = np.cross(ahead, [0, 0, 1])
  right /= np.linalg.norm(right)
  down = np.cross(ahead, right)
  offset = points - camera
  depth = offset @ ahead
  focal = 35 / 32 * 320  # millimetres of lens over those of the sensor
  return np.stack(
    [
      160 + focal * (offset @ right) / depth,
      120 + focal * (offset @ down) / depth,
      depth,
    ],
    axis=-1,
  )
