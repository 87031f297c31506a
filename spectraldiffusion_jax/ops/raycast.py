"""Where rays meet spheres, upright cylinders and turned cubes, in closed form.

The world is CLEVR's (Johnson et al. 2017, arXiv:1612.06890, section 3): objects
stand above the ground z = 0, z points up, and the camera looks at the origin.

Vectors are triples of separate x, y and z arrays: as [n 3] arrays the same
arithmetic runs six times slower on a CPU. For the same reason a loop over the
objects picks one formula per object instead of a vmap computing all three.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

Vector = tuple[Array, Array, Array]

SPHERE, CYLINDER, CUBE = 1, 2, 3
FAR = 1e9
# Points on the ground belong to no object.
GROUND = -1
# Share of the half size that the round edge of a shape takes.
CUBE_BEVEL, CYLINDER_BEVEL = 0.16, 0.06


class Scene(NamedTuple):
  """One scene of at most O objects in world units; unused rows have shape 0.

  Attributes:
    shape: SPHERE, CYLINDER, CUBE, or 0 after the last object.
    metal: True for a mirror, False for matt rubber.
    center: middle of each object.
    radius: of the sphere or cylinder (half as high), half side of the cube.
    angle: turn about the vertical in radians.
    color: albedo in [0, 1], linear light.
    camera: position; it looks at the origin.
    lamps: positions, in the order of `render.LAMPS`.
  """

  shape: Int[Array, " O"]
  metal: Bool[Array, " O"]
  center: Float[Array, "O 3"]
  radius: Float[Array, " O"]
  angle: Float[Array, " O"]
  color: Float[Array, "O 3"]
  camera: Float[Array, " 3"]
  lamps: Float[Array, "4 3"]


def add(a: Vector, b: Vector) -> Vector:
  """Sum of two vectors."""
  return a[0] + b[0], a[1] + b[1], a[2] + b[2]


def scale(a: Vector, factor: Array | float) -> Vector:
  """Vector times a factor."""
  return a[0] * factor, a[1] * factor, a[2] * factor


def dot(a: Vector, b: Vector) -> Array:
  """Inner product of two vectors."""
  return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def unit(a: Vector) -> Vector:
  """Vector at length one."""
  return scale(a, lax.rsqrt(dot(a, a) + 1e-12))


def triple(a: Float[Array, " 3"]) -> Vector:
  """The three numbers of an array as a vector."""
  return a[0], a[1], a[2]


def seen_from(center: Float[Array, " 3"], point: Vector) -> Vector:
  """Vector from a centre to a point."""
  return add(point, scale(triple(center), -1.0))


def turned(a: Vector, angle: Array) -> Vector:
  """Vector in the frame of an object that was turned by angle."""
  c, s = jnp.cos(angle), jnp.sin(angle)
  return c * a[0] + s * a[1], c * a[1] - s * a[0], a[2]


def _slab(q: Array, d: Array, half: Array) -> tuple[Array, Array]:
  """Where q + t d lies between -half and half: the interval of t."""
  inverse = 1 / jnp.where(jnp.abs(d) < 1e-7, 1e-7, d)
  middle, width = -q * inverse, half * jnp.abs(inverse)
  return middle - width, middle + width


def _disc(q: Vector, d: Vector, radius: Array) -> tuple[Array, Array]:
  """Where the ray is above or below a disc: the interval of t."""
  a = jnp.maximum(d[0] * d[0] + d[1] * d[1], 1e-9)
  b = q[0] * d[0] + q[1] * d[1]
  root2 = b * b - a * (q[0] * q[0] + q[1] * q[1] - radius * radius)
  root = jnp.sqrt(jnp.maximum(root2, 0))
  return (
    jnp.where(root2 > 0, (-b - root) / a, FAR),
    jnp.where(root2 > 0, (-b + root) / a, -FAR),
  )


def _square(q: Vector, d: Vector, half: Array) -> tuple[Array, Array]:
  """Where the ray is above or below a square: the interval of t."""
  x_in, x_out = _slab(q[0], d[0], half)
  y_in, y_out = _slab(q[1], d[1], half)
  return jnp.maximum(x_in, y_in), jnp.minimum(x_out, y_out)


def _hit_sphere(q: Vector, d: Vector, radius: Array) -> Array:
  b = dot(q, d)
  root2 = b * b - dot(q, q) + radius * radius
  return jnp.where(root2 > 0, -b - jnp.sqrt(jnp.maximum(root2, 0)), FAR)


def _hit_prism(section):
  def hit(q: Vector, d: Vector, half: Array) -> Array:
    t_in, t_out = section(q, d, half)
    z_in, z_out = _slab(q[2], d[2], half)
    t_in, t_out = jnp.maximum(t_in, z_in), jnp.minimum(t_out, z_out)
    return jnp.where(t_in < t_out, t_in, FAR)

  return hit


_HITS = (_hit_sphere, _hit_prism(_disc), _hit_prism(_square))


def trace(
  origin: Vector, ray: Vector, scene: Scene, *, own: Array | int = GROUND
) -> tuple[Float[Array, " P"], Int[Array, " P"]]:
  """First surface on each ray.

  Args:
    origin: start points, arrays [P] or scalars.
    ray: unit directions, arrays [P].
    scene: what there is to hit.
    own: [P] object a ray starts on, which it cannot meet again: all are convex.

  Returns:
    Distance (FAR for the sky) and object index (GROUND also for the sky).
  """
  down = jnp.minimum(ray[2], -1e-6)
  ground = jnp.where(ray[2] < -1e-6, -origin[2] / down, FAR)

  def nearer(k, best):
    distance, index = best
    angle = scene.angle[k]
    q = turned(seen_from(scene.center[k], origin), angle)
    d = turned(ray, angle)
    t = lax.switch(scene.shape[k] - 1, _HITS, q, d, scene.radius[k])
    closer = (t < distance) & (t > 1e-4) & (own != k)
    return jnp.where(closer, t, distance), jnp.where(closer, k, index)

  nothing = jnp.full(ground.shape, GROUND, jnp.int32)
  return lax.fori_loop(0, jnp.sum(scene.shape > 0), nearer, (ground, nothing))


def normals(point: Vector, index: Int[Array, " P"], scene: Scene) -> Vector:
  """Outward unit normals at points of the objects index; up on the ground.

  Near an edge the normal swings over to the other face, as on a round edge.
  """
  k = jnp.maximum(index, 0)
  angle, shape = scene.angle[k], scene.shape[k]
  local = turned(tuple(point[i] - scene.center[k, i] for i in range(3)), angle)
  x, y, z = scale(local, 1 / scene.radius[k])

  def edge(value, bevel):
    return jnp.sign(value) * jax.nn.relu(jnp.abs(value) - 1 + bevel) / bevel

  # The lower rim stays sharp: its light comes from a strip of dark ground.
  def top(bevel):
    return jax.nn.relu(z - 1 + bevel) / bevel

  around = jnp.sqrt(x * x + y * y + 1e-9)
  side = jax.nn.relu(around - 1 + CYLINDER_BEVEL) / CYLINDER_BEVEL / around
  kinds = [shape == SPHERE, shape == CYLINDER]
  bent = (
    jnp.select(kinds, [x, x * side], edge(x, CUBE_BEVEL)),
    jnp.select(kinds, [y, y * side], edge(y, CUBE_BEVEL)),
    jnp.select(kinds, [z, top(CYLINDER_BEVEL)], top(CUBE_BEVEL)),
  )
  normal = turned(unit(bent), -angle)
  on_ground = index == GROUND
  return tuple(
    jnp.where(on_ground, up, n)
    for up, n in zip((0.0, 0.0, 1.0), normal, strict=True)
  )


def _fraction(miss: Array, halfwidth: Array) -> Array:
  """Share of a lamp that is hidden, from how far its middle is missed."""
  x = jnp.clip(0.5 - 0.5 * miss / (halfwidth + 2e-3), 0, 1)
  return x * x * (3 - 2 * x)


def _hide_sphere(q: Vector, d: Vector, radius: Array, angle: Array) -> Array:
  t = -dot(q, d)
  miss = jnp.sqrt(jax.nn.relu(dot(q, q) - t * t)) - radius
  return jnp.where(t > 0, _fraction(miss, angle * t), 0.0)


def _hide_prism(section, reach):
  """As a sphere, with the nearer of two edges: the side and the upper rim.

  Lamps are above all objects, so a ray never leaves through the bottom. The
  line misses a convex section by its offset less the section's reach.
  """

  def hide(q: Vector, d: Vector, half: Array, angle: Array) -> Array:
    flat2 = d[0] * d[0] + d[1] * d[1] + 1e-9
    flat = jnp.sqrt(flat2)
    offset = jnp.abs(q[0] * d[1] - q[1] * d[0]) / flat
    middle = -(q[0] * d[0] + q[1] * d[1]) / flat2
    t_in, t_out = section(q, d, half)
    t_in, t_out = jnp.minimum(t_in, middle), jnp.maximum(t_out, middle)
    rise = jnp.maximum(d[2], 1e-3)
    over = (t_in - (half - q[2]) / rise) * flat * rise
    miss = jnp.maximum(offset - reach(d, half, flat), over)
    hidden = _fraction(miss, angle * jax.nn.relu(t_in))
    return jnp.where(t_out > 0, hidden, 0.0)

  return hide


_HIDES = (
  _hide_sphere,
  _hide_prism(_disc, lambda d, half, flat: half),
  _hide_prism(
    _square,
    lambda d, half, flat: half * (jnp.abs(d[0]) + jnp.abs(d[1])) / flat,
  ),
)


def visibility(
  point: Vector,
  normal: Vector,
  lamps: list[tuple[Vector, Array]],
  scene: Scene,
  *,
  own: Int[Array, " P"],
) -> tuple[tuple[Array, ...], Array]:
  """Soft shadows and contact shadows at points.

  Args:
    point: arrays [P].
    normal: unit normals, arrays [P].
    lamps: for each lamp the unit direction to it, and its angular radius.
    scene: what casts shadows.
    own: [P] object of each point; convex, so it does not shadow itself.

  Returns:
    Share in [0, 1] of each lamp that is seen, and of the sky: an object takes
    the form factor of a sphere, (r / distance)^2 cos(angle to the normal).
  """

  def darken(k, seen):
    direct, sky = seen
    angle, radius = scene.angle[k], scene.radius[k]
    q = seen_from(scene.center[k], point)
    towards = tuple((turned(way, angle), wide) for way, wide in lamps)

    def with_shape(hide):
      return lambda q: tuple(hide(q, d, radius, wide) for d, wide in towards)

    hidden = lax.switch(
      scene.shape[k] - 1, [with_shape(h) for h in _HIDES], turned(q, angle)
    )
    apart2 = dot(q, q)
    cover = jax.nn.relu(-dot(normal, q)) * lax.rsqrt(apart2)
    cover *= jnp.minimum(radius * radius / apart2, 1.0)
    other = own != k
    return (
      tuple(
        v * jnp.where(other, 1 - h, 1.0)
        for v, h in zip(direct, hidden, strict=True)
      ),
      sky * jnp.where(other, 1 - cover, 1.0),
    )

  full = jnp.ones_like(point[0])
  start = (tuple(full for _ in lamps), full)
  return lax.fori_loop(0, jnp.sum(scene.shape > 0), darken, start)
