"""A picture and the exact instance labels of one CLEVR-like scene.

Light is linear until the last line. Each surface takes four lamps with soft
shadows, the sky, and light from the ground; metal mirrors what one more ray
meets. The strengths were fitted by non-negative least squares to Blender
renders of known CLEVR scenes, lamp jitter left out (at 80 scenes 0.87 of the
variance of the ground and 0.93 of that of rubber objects), then set by hand
within a few percent until mean Lab colours agreed: within 1.1 for the ground
and each colour and material at 120 scenes, within 1.4 at 120 others.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from spectraldiffusion_jax.ops import raycast
from spectraldiffusion_jax.ops.raycast import Scene, Vector


class Frame(NamedTuple):
  """What part of the picture plane is drawn, in units of the image height."""

  focal: float
  middle_row: float


# The whole 320x240 picture, and the square of its rows 29:221, columns 64:256
# that is the custom for unsupervised segmentation.
FULL = Frame(focal=350 / 240, middle_row=0.5)
CROP = Frame(focal=350 / 192, middle_row=91 / 192)


class Lamp(NamedTuple):
  """One light: where it stands and what it does to each kind of surface."""

  position: tuple[float, float, float]
  radius: float
  tint: tuple[float, float, float]
  on_ground: float
  on_objects: float
  gloss: float


LAMPS = (
  Lamp((6.45, -2.91, 4.26), 0.3, (1.10, 1.01, 0.88), 5.13, 8.3, 0.38),
  Lamp((-4.67, -4.01, 3.01), 0.3, (0.88, 0.95, 1.18), 1.36, 1.4, 0.16),
  Lamp((-1.17, 2.65, 5.82), 0.3, (1.0, 1.0, 1.0), 2.21, 3.0, 0.15),
  # So far away that it shines alike everywhere.
  Lamp((116.6, -66.3, 258.2), 36.0, (1.0, 1.0, 1.0), 8550.0, 1700.0, 0.28),
)
SKY_ON_GROUND, SKY_ON_OBJECTS, FROM_GROUND = 0.045, 0.116, 0.147
# The sky, as metal spheres show it: dark but for a wide glow behind the scene
# and a narrower one before it, each given by direction, strength, exponent.
SKY_DARK = 0.015
SKY_GLOWS = (((-0.71, 0.71), 0.105, 3), ((0.93, -0.37), 0.2, 9))
MIRROR, METAL_MATT = 0.9, 0.06
SHEEN = 0.004
LAMP_GLARE = 8.0
GLOSS_EXPONENT = 100
# Metal is not quite smooth: each sample of a pixel mirrors a little off.
TILTS = (
  (0.035, 0.035, 0.035),
  (0.035, -0.035, -0.035),
  (-0.035, 0.035, -0.035),
  (-0.035, -0.035, 0.035),
)
CHUNK = 2048
# The centre, which alone decides the label, and three points around it.
SHIFTS = ((0.0, 0.0), (0.33, 0.19), (-0.33, 0.19), (0.0, -0.38))


def _camera_rays(
  camera: Float[Array, " 3"],
  shifts: tuple[tuple[float, float], ...],
  *,
  height: int,
  width: int,
  frame: Frame,
) -> Vector:
  """Unit directions through every pixel, for one shift after the other."""
  shift = jnp.asarray(shifts)[:, :, None, None] / height
  column = (jnp.arange(width)[None, None] + 0.5 - width / 2) / height
  row = (jnp.arange(height)[None, :, None] + 0.5) / height
  shape = (len(shifts), height, width)
  right = jnp.broadcast_to(column + shift[:, 0], shape).ravel() / frame.focal
  down = jnp.broadcast_to(row + shift[:, 1], shape).ravel()
  up = (frame.middle_row - down) / frame.focal
  ahead = raycast.unit(raycast.triple(-camera))
  x_axis = raycast.unit((ahead[1], -ahead[0], jnp.zeros_like(ahead[0])))
  y_axis = (
    x_axis[1] * ahead[2],
    -x_axis[0] * ahead[2],
    x_axis[0] * ahead[1] - x_axis[1] * ahead[0],
  )
  return raycast.unit(
    tuple(ahead[i] + right * x_axis[i] + up * y_axis[i] for i in range(3))
  )


def _lamp(point: Vector, position: Float[Array, " 3"], lamp: Lamp):
  """Direction to a lamp, its angular radius, and its fall-off."""
  apart = raycast.scale(raycast.seen_from(position, point), -1.0)
  distance2 = raycast.dot(apart, apart)
  inverse = jax.lax.rsqrt(distance2)
  way = raycast.scale(apart, inverse)
  # An area lamp that faces the origin.
  facing = jax.nn.relu(raycast.dot(way, raycast.unit(raycast.triple(position))))
  return way, lamp.radius * inverse, facing / distance2


def _matt(point: Vector, normal: Vector, index: Int[Array, " P"], scene: Scene):
  """Light leaving matt surfaces for each channel, and what lamps are seen."""
  lamps = [_lamp(point, scene.lamps[i], lamp) for i, lamp in enumerate(LAMPS)]
  ways = [(way, wide) for way, wide, _ in lamps]
  seen, sky = raycast.visibility(point, normal, ways, scene, own=index)
  ground = index == raycast.GROUND
  up = 0.5 + 0.5 * normal[2]
  # Light from below fades towards the foot, where the ground is in shadow.
  foot = point[2] / (point[2] + 0.15)
  ambient = sky * jnp.where(ground, SKY_ON_GROUND, up * SKY_ON_OBJECTS)
  ambient += jnp.where(ground, 0.0, FROM_GROUND * foot * (1 - up))
  albedo = scene.color[jnp.maximum(index, 0)]
  strengths = [
    jnp.where(ground, lamp.on_ground, lamp.on_objects)
    * part
    * fall
    * jax.nn.relu(raycast.dot(normal, way))
    for lamp, part, (way, _, fall) in zip(LAMPS, seen, lamps, strict=True)
  ]
  light = []
  for c in range(3):
    total = ambient + sum(
      lamp.tint[c] * s for lamp, s in zip(LAMPS, strengths, strict=True)
    )
    light.append(jnp.where(ground, total, total * albedo[:, c] + SHEEN))
  return tuple(light), seen


def _mirrored(
  point: Vector,
  ray: Vector,
  index: Int[Array, " P"],
  seen: tuple[Array, ...],
  tilt: Vector,
  *,
  scene: Scene,
) -> Vector:
  """Light that metal at points sends back along the rays, before its colour."""
  normal = raycast.normals(point, index, scene)
  bounce = raycast.scale(normal, -2 * raycast.dot(ray, normal))
  bounce = raycast.unit(raycast.add(raycast.add(ray, bounce), tilt))
  distance, met = raycast.trace(point, bounce, scene, own=index)
  other = raycast.add(point, raycast.scale(bounce, distance))
  image, _ = _matt(other, raycast.normals(other, met, scene), met, scene)
  sky = SKY_DARK
  flat = jax.lax.rsqrt(bounce[0] ** 2 + bounce[1] ** 2 + 1e-6)
  for (x, y), strength, exponent in SKY_GLOWS:
    towards = jax.nn.relu((x * bounce[0] + y * bounce[1]) * flat)
    sky += strength * towards**exponent
  gloss = 0.0
  for i, lamp in enumerate(LAMPS):
    way, wide, _ = _lamp(point, scene.lamps[i], lamp)
    half = raycast.unit(raycast.add(way, raycast.scale(ray, -1.0)))
    lobe = jax.nn.relu(raycast.dot(half, normal)) ** GLOSS_EXPONENT
    gloss += lamp.gloss * seen[i] * lobe
    # For small angles a: 1 - cos(a) = a^2 / 2.
    off = jnp.sqrt(jax.nn.relu(2 - 2 * raycast.dot(bounce, way)))
    sky += LAMP_GLARE * seen[i] * jnp.clip((wide + 0.03 - off) / 0.04, 0, 1)
  open_sky = distance >= raycast.FAR
  return tuple(
    MIRROR * jnp.where(open_sky, sky, light) + gloss for light in image
  )


def _mirrored_where(metal: Array, *args: Array | Vector | tuple, **kwargs):
  """`_mirrored` for the few points on metal only, others zero."""
  n = metal.size
  rank = jnp.where(metal, jnp.cumsum(metal) - 1, n)
  rows = jnp.full(-(-n // CHUNK) * CHUNK, n, jnp.int32)
  rows = rows.at[rank].set(jnp.arange(n, dtype=jnp.int32), mode="drop")

  def chunk(i, light):
    row = jax.lax.dynamic_slice(rows, (i * CHUNK,), (CHUNK,))
    some = jax.tree.map(lambda a: a[jnp.minimum(row, n - 1)], args)
    return jax.tree.map(
      lambda full, new: full.at[row].set(new, mode="drop"),
      light,
      _mirrored(*some, **kwargs),
    )

  chunks = (jnp.sum(metal) + CHUNK - 1) // CHUNK
  return jax.lax.fori_loop(0, chunks, chunk, (jnp.zeros(n),) * 3)


def _seen_along(
  ray: Vector, tilt: Vector, scene: Scene
) -> tuple[Vector, Int[Array, " P"]]:
  """Light that comes to the camera along each ray, and the object met."""
  camera = raycast.triple(scene.camera)
  distance, index = raycast.trace(camera, ray, scene)
  point = raycast.add(camera, raycast.scale(ray, distance))
  normal = raycast.normals(point, index, scene)
  matt, seen = _matt(point, normal, index, scene)
  k = jnp.maximum(index, 0)
  metal = scene.metal[k] & (index != raycast.GROUND)
  mirrored = _mirrored_where(metal, point, ray, index, seen, tilt, scene=scene)
  light = tuple(
    jnp.where(
      metal, mirrored[c] * scene.color[k, c] + METAL_MATT * matt[c], matt[c]
    )
    for c in range(3)
  )
  return light, index


def _to_srgb(light: Array) -> Array:
  """Standard transfer curve of linear light (IEC 61966-2-1)."""
  light = jnp.clip(light, 0, 1)
  curved = 1.055 * jnp.maximum(light, 1e-4) ** (1 / 2.4) - 0.055
  return jnp.where(light <= 0.0031308, 12.92 * light, curved)


def instance_ids(
  scene: Scene, *, height: int, width: int, frame: Frame = CROP
) -> Int[Array, "H W"]:
  """Object whose surface the ray through each pixel's centre meets first.

  Args:
    scene: what to draw.
    height: rows.
    width: columns.
    frame: part of the picture plane.

  Returns:
    Index in the scene plus one; 0 for the background.
  """
  ray = _camera_rays(
    scene.camera, SHIFTS[:1], height=height, width=width, frame=frame
  )
  index = raycast.trace(raycast.triple(scene.camera), ray, scene)[1]
  return index.reshape(height, width) + 1


def render(
  scene: Scene, *, height: int, width: int, frame: Frame = CROP
) -> tuple[Float[Array, "H W 3"], Int[Array, "H W"]]:
  """Draws one scene; batches go through `jax.lax.map`, see raycast.

  Args:
    scene: what to draw.
    height: rows.
    width: columns.
    frame: part of the picture plane.

  Returns:
    Image in [0, 1], and the labels of `instance_ids`.
  """
  ray = _camera_rays(
    scene.camera, SHIFTS, height=height, width=width, frame=frame
  )
  tilt = jnp.repeat(jnp.asarray(TILTS).T, height * width, axis=1)
  light, index = _seen_along(ray, raycast.triple(tilt), scene)
  light = [c.reshape(len(SHIFTS), height, width).mean(axis=0) for c in light]
  ids = index.reshape(len(SHIFTS), height, width)[0] + 1
  return _to_srgb(jnp.stack(light, axis=-1)), ids
