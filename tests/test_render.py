"""Pictures: what they may depend on, and Blender's pictures of the same."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from ray_scenes import (
  BLUE,
  CAMERA,
  RED,
  WHITE,
  draw,
  drawing,
  ids_of,
  make_scene,
  project,
)
from scipy.ndimage import binary_erosion
from scipy.optimize import least_squares

from spectraldiffusion_jax.data import clevr_scenes, tfrecord
from spectraldiffusion_jax.ops import raycast, render


def test_the_crop_is_a_part_of_the_full_picture():
  drawn = clevr_scenes.sample_scene("easy", 3, 1)
  full = ids_of(drawn.scene, 240, 320, render.FULL)
  crop = ids_of(drawn.scene, 192, 192)
  assert crop.max() > 2
  assert (full[29:221, 64:256] != crop).mean() < 1e-4


def test_labels_do_not_depend_on_looks():
  objects = [
    (1, (0.5, 0.5, 0.7), 0.7, 0.0, False, RED),
    (3, (-1.5, 1.5, 0.35), 0.35, 0.4, False, BLUE),
  ]
  image, ids = draw(make_scene(*objects))
  assert set(np.unique(ids)) == {0, 1, 2}
  np.testing.assert_array_equal(ids, ids_of(make_scene(*objects)))
  shiny = [(*o[:4], True, WHITE) for o in objects]
  lamps = [np.asarray(lamp.position) + 0.5 for lamp in render.LAMPS]
  other, same = draw(make_scene(*shiny, lamps=lamps))
  np.testing.assert_array_equal(ids, same)
  assert np.abs(image - other)[ids > 0].mean() > 0.05


@pytest.mark.parametrize("metal", [True, False])
def test_metal_mirrors_its_neighbour_and_rubber_does_not(metal):
  def neighbour(color):
    image, ids = draw(
      make_scene(
        (1, (0.0, 0.0, 0.7), 0.7, 0.0, metal, WHITE),
        (3, (1.65, 0.95, 0.7), 0.7, 0.4, False, color),
      )
    )
    # The rim is mixed with what is behind it.
    return image[binary_erosion(ids == 1)]

  change = np.abs(neighbour(RED) - neighbour(BLUE)).max()
  assert change > 0.1 if metal else change < 1e-6


def test_an_empty_scene_is_grey_and_brighter_in_front():
  image, ids = draw(make_scene())
  assert not ids.any()
  assert np.isfinite(image).all() and (image > 0).all() and (image < 1).all()
  assert np.ptp(image, axis=-1).max() < 0.05
  assert image[-8:].mean() > image[:8].mean() + 0.05


def test_borders_are_smoothed():
  image, ids = draw(make_scene((1, (1.0, 0.0, 0.7), 0.7, 0.0, False, RED)))
  redness = image[..., 0] - image[..., 2]
  inside, outside = np.median(redness[ids == 1]), np.median(redness[ids == 0])
  share = (redness - outside) / (inside - outside)
  mixed = (share > 0.15) & (share < 0.85)
  assert mixed[ids == 0].sum() > 5 and mixed[ids == 1].sum() > 5


def test_transfer_curve():
  # 1.055 * 0.5^(1/2.4) - 0.055 and the straight part 12.92 x
  light = jnp.asarray([0.0, 0.001, 0.5, 1.0, 7.0])
  np.testing.assert_allclose(
    render._to_srgb(light), [0, 0.01292, 0.735357, 1, 1], atol=2e-6
  )


def blender_scene(record):
  """The scene of a record and the camera that its pixel coordinates fit."""
  code = {
    k: record.get(k, (11,), np.uint8)[1:].astype(np.int32)
    for k in ("size", "material", "shape", "color")
  }
  x, y, turn = (
    record.get(k, (11,), np.float32)[1:] for k in ("x", "y", "rotation")
  )
  nominal = np.where(code["size"] == 1, 0.7, 0.35)
  place = np.stack([x, y, nominal], axis=-1)
  there = code["shape"] > 0
  pixels = record.get("pixel_coords", (11, 3), np.float32)[1:][there]

  def residual(camera):
    off = project(place[there], camera) - pixels - [0.5, 0.5, 0]
    return (off * [1, 1, 50]).ravel()

  camera = least_squares(residual, CAMERA).x
  radius = nominal * clevr_scenes.MESH_SCALE[code["shape"]]
  return raycast.Scene(
    shape=code["shape"],
    metal=code["material"] == 2,
    center=place.astype(np.float32),
    radius=radius.astype(np.float32),
    angle=turn,
    color=clevr_scenes.ALBEDO[code["color"]],
    camera=camera.astype(np.float32),
    lamps=np.asarray([lamp.position for lamp in render.LAMPS], np.float32),
  )


@pytest.mark.slow
def test_pictures_and_labels_are_those_of_blender(shared_data):
  path = shared_data / "clevr_with_masks" / "clevr_with_masks_train.tfrecords"
  ious, ours, theirs = [], [], []
  for record in itertools.islice(tfrecord.read_examples(path), 12):
    image, ids = drawing(render.render, 240, 320, render.FULL)(
      blender_scene(record)
    )
    image, ids = np.asarray(image), np.asarray(ids)
    real = record.get("image", (240, 320, 3), np.uint8) / 255
    masks = record.get("mask", (11, 240, 320), np.uint8) > 0
    for k in range(11):
      if masks[k].sum() > 400:
        both, either = masks[k] & (ids == k), masks[k] | (ids == k)
        ious.append(both.sum() / either.sum())
        ours.append(image[both].mean(axis=0))
        theirs.append(real[both].mean(axis=0))
  # Lamp jitter is not in the records, so single objects may be off.
  assert np.mean(ious) > 0.96
  assert np.abs(np.mean(ours, axis=0) - np.mean(theirs, axis=0)).max() < 0.01
  assert np.abs(np.subtract(ours, theirs)).mean() < 0.025
