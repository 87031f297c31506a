"""The ray caster against plane geometry and Monte Carlo."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ray_scenes import CAMERA, RED, SIZE, ids_of, make_scene, project
from scipy.spatial import ConvexHull

from spectraldiffusion_jax.ops import raycast


def crop_pixels(size=SIZE):
  """Picture coordinates of the centres of the crop's pixels, [size^2 2]."""
  steps = (np.arange(size) + 0.5) * 192 / size
  row, column = np.meshgrid(29 + steps, 64 + steps, indexing="ij")
  return np.stack([column.ravel(), row.ravel()], axis=-1)


def surface(shape, place, radius, angle):
  """Points whose convex hull is the object."""
  if shape == raycast.CUBE:
    points = np.asarray(list(itertools.product([-1.0, 1.0], repeat=3)))
    c, s = np.cos(angle), np.sin(angle)
    points = points @ np.asarray([[c, s, 0], [-s, c, 0], [0, 0, 1]])
  else:
    turn = np.linspace(0, 2 * np.pi, 4000)
    rim = np.stack([np.cos(turn), np.sin(turn)], axis=-1)
    points = np.concatenate(
      [np.pad(rim, ((0, 0), (0, 1)), constant_values=z) for z in (-1, 1)]
    )
  return np.asarray(place) + radius * points


@pytest.mark.parametrize("shape", [raycast.CYLINDER, raycast.CUBE])
@pytest.mark.parametrize("place", [(0.5, 0.3, 0.7), (1.5, -2.0, 0.6)])
def test_silhouette_is_the_hull_of_the_projected_surface(shape, place):
  what = (shape, place, 0.6, 0.4)
  hull = ConvexHull(project(surface(*what))[:, :2])
  outside = hull.equations[:, :2] @ crop_pixels().T + hull.equations[:, 2:]
  distance = outside.max(axis=0)
  ids = ids_of(make_scene((*what, False, RED))).ravel()
  clear = np.abs(distance) > 1e-3
  assert 60 < (distance < 0).sum() < SIZE**2 - 60
  np.testing.assert_array_equal(ids[clear], (distance < 0)[clear])


@pytest.mark.parametrize("place", [(0.5, 0.3, 0.7), (-1.0, 2.2, 0.5)])
def test_sphere_is_seen_within_its_cone(place):
  radius = 0.5
  towards = np.asarray(place) - CAMERA
  ahead = -CAMERA / np.linalg.norm(CAMERA)
  right = np.cross(ahead, [0, 0, 1])
  right /= np.linalg.norm(right)
  column, row = (crop_pixels() - [160, 120]).T / 350
  ray = ahead + column[:, None] * right + row[:, None] * np.cross(ahead, right)
  cosine = ray @ towards / np.linalg.norm(ray, axis=1)
  angle = np.arccos(cosine / np.linalg.norm(towards))
  # A ball fills the cone of half angle asin(radius / distance).
  excess = angle - np.arcsin(radius / np.linalg.norm(towards))
  scene = make_scene((raycast.SPHERE, place, radius, 0.0, False, RED))
  clear = np.abs(excess) > 1e-5
  ids = ids_of(scene).ravel()
  np.testing.assert_array_equal(ids[clear], (excess < 0)[clear])


def test_the_nearer_object_hides_the_other():
  near, far = (2.0, -1.8, 0.5), (1.2, -1.0, 0.5)
  assert project(np.asarray(near))[2] < project(np.asarray(far))[2]
  for order in ((near, far), (far, near)):
    objects = [(1, place, 0.5, 0.0, False, RED) for place in order]
    both = ids_of(make_scene(*objects))
    alone = [ids_of(make_scene(objects[k])) == 1 for k in range(len(objects))]
    front, back = (0, 1) if order[0] == near else (1, 0)
    assert (alone[0] & alone[1]).sum() > 20
    np.testing.assert_array_equal(both == front + 1, alone[front])
    np.testing.assert_array_equal(both == back + 1, alone[back] & ~alone[front])


SHAPES = [raycast.SPHERE, raycast.CYLINDER, raycast.CUBE]


@jax.jit
def lit(scene, points, lamp, wide):
  """Shares of one lamp and of the sky that points [P 3] on the ground see."""
  apart = (lamp[None] - points).T
  length = jnp.linalg.norm(apart, axis=0)
  way = tuple(apart / length[None])
  zero = jnp.zeros(len(points))
  ground = jnp.full(len(points), raycast.GROUND)
  seen, sky = raycast.visibility(
    tuple(points.T),
    (zero, zero, zero + 1),
    [(way, wide / length)],
    scene,
    own=ground,
  )
  return seen[0], sky


@jax.jit
def hit(scene, points, lamps):
  """Whether the straight way from each point to each lamp meets an object."""

  def one(lamp):
    apart = (lamp[None] - points).T
    ray = tuple(apart / jnp.linalg.norm(apart, axis=0)[None])
    return raycast.trace(tuple(points.T), ray, scene)[1] != raycast.GROUND

  return jax.lax.map(one, lamps)


def f32(values):
  return jnp.asarray(values, jnp.float32)


@pytest.mark.parametrize("shape", SHAPES)
def test_shadows_agree_with_rays_to_the_lamp(shape):
  rng = np.random.default_rng(0)
  scene = make_scene((shape, (0.2, -0.3, 0.6), 0.6, 0.5, False, RED))
  points = np.pad(rng.uniform(-3, 3, (4000, 2)), ((0, 0), (0, 1)))
  # Not under the object, where no lamp shines anyway.
  points = points[np.linalg.norm(points[:, :2] - [0.2, -0.3], axis=1) > 0.9]
  points, lamp = f32(points[:2000]), f32([5.0, 2.0, 4.0])
  seen, _ = map(np.asarray, lit(scene, points, lamp, 1e-4))
  sharp = (seen == 0) | (seen == 1)
  assert sharp.mean() > 0.98 and 0.02 < (seen == 0).mean() < 0.5
  agree = (seen == 0) == hit(scene, points, lamp[None])[0]
  assert agree[sharp].mean() > 0.998
  # A broad lamp against its mean over points of a ball around its middle.
  wide = 0.8
  offsets = rng.normal(size=(200, 3))
  offsets *= wide / np.linalg.norm(offsets, axis=1, keepdims=True)
  offsets *= rng.uniform(size=(200, 1)) ** (1 / 3)
  truth = 1 - np.mean(hit(scene, points, lamp[None] + f32(offsets)), axis=0)
  soft, _ = lit(scene, points, lamp, wide)
  assert ((truth > 0.1) & (truth < 0.9)).sum() > 50
  assert np.abs(soft - truth).mean() < 0.03


def test_sky_hidden_by_a_ball_is_its_form_factor():
  scene = make_scene((1, (0.0, 0.0, 0.5), 0.5, 0.0, False, RED))
  points = np.asarray([[1.0, 0, 0], [2.0, 0, 0], [0, 4.0, 0]])
  _, sky = lit(scene, f32(points), f32([5.0, 2, 4]), 0.1)
  apart2 = (points**2).sum(axis=1) + 0.25
  # (r / d)^2 cos(angle from the vertical)
  expected = 1 - 0.25 / apart2 * 0.5 / np.sqrt(apart2)
  np.testing.assert_allclose(sky, expected, rtol=1e-5)


def test_normals_are_those_of_the_surface():
  place, radius, angle = np.asarray([0.2, 0.4, 0.7]), 0.7, 0.3
  c, s = np.cos(angle), np.sin(angle)
  unit = np.asarray([0.48, -0.6, 0.64])
  cases = [
    (raycast.SPHERE, unit, unit),
    (raycast.CYLINDER, np.asarray([0.6, 0.8, 0.1]), [0.6, 0.8, 0]),
    (raycast.CYLINDER, np.asarray([0.3, 0.2, 1.0]), [0, 0, 1]),
    (raycast.CUBE, np.asarray([c, s, 0.2]), [c, s, 0]),
    (raycast.CUBE, np.asarray([s, -c, 0.2]), [s, -c, 0]),
    (raycast.CUBE, np.asarray([0.1, 0.2, 1.0]), [0, 0, 1]),
  ]
  for shape, local, expected in cases:
    scene = make_scene((shape, place, radius, angle, False, RED))
    point = tuple(jnp.asarray(place + radius * local, jnp.float32)[:, None])
    normal = raycast.normals(point, jnp.zeros(1, jnp.int32), scene)
    np.testing.assert_allclose(
      np.ravel(normal), expected, atol=1e-5, err_msg=str(shape)
    )
