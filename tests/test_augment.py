"""Augmentation: geometry acts on all maps alike, every option matters."""

import dataclasses

import numpy as np
import pytest
from skimage import color

from spectraldiffusion_jax.data.augment import Augment
from spectraldiffusion_jax.data.transforms import to_float
from spectraldiffusion_jax.errors import UserError

OPTIONS = {
  "flip": 0.5,
  "crop_scale": (0.3, 0.9),
  "brightness": 0.4,
  "contrast": 0.4,
  "saturation": 0.4,
  "grayscale": 0.3,
}


def example(seed=0, *, shape=(32, 40)):
  rng = np.random.default_rng(seed)
  rows, columns = np.indices(shape)
  ids = (columns * 5 // shape[1] + 5 * (rows * 4 // shape[0])).astype(np.uint8)
  colours = rng.integers(30, 220, (20, 3), np.uint8)
  return {
    "image": colours[ids],
    "segmentation": ids.astype(np.int32),
    "labels": ids,
    "index": np.int32(3),
  }


def draw(options, seed=0, given=None):
  augment = Augment.from_config(options)
  given = example() if given is None else given
  return augment.random_map(given, np.random.default_rng(seed))


def test_nothing_asked_changes_nothing():
  found = draw({})
  np.testing.assert_allclose(
    found["image"], to_float(example()["image"]), atol=1e-6
  )
  for name in ("segmentation", "labels", "index"):
    np.testing.assert_array_equal(found[name], example()[name], strict=True)


def test_a_certain_flip_is_the_mirror_image():
  found = draw({"flip": 1.0})
  for name in ("segmentation", "labels"):
    np.testing.assert_array_equal(found[name], example()[name][:, ::-1])
  np.testing.assert_allclose(
    found["image"], to_float(example()["image"])[:, ::-1], atol=1e-6
  )


@pytest.mark.parametrize("seed", range(12))
def test_image_segmentation_and_labels_move_together(seed):
  given = example()
  found = draw({"flip": 0.5, "crop_scale": (0.1, 1.0)}, seed)
  np.testing.assert_array_equal(found["segmentation"], found["labels"])
  colours = np.zeros((20, 3), np.float32)
  colours[given["labels"]] = to_float(given["image"])
  painted = colours[found["labels"]]
  # Equal but for the blend along the edges of the regions.
  apart = np.abs(painted - found["image"]).max(axis=-1) > 0.02
  assert apart.mean() < 0.35
  assert (np.abs(painted[:, ::-1] - found["image"]).max(-1) > 0.02).mean() > 0.5


def test_crop_scale_is_the_share_of_the_area():
  rows, columns = np.indices((64, 64), np.int32)
  for seed in range(8):
    given = {
      "image": np.zeros((64, 64, 3), np.uint8),
      "segmentation": rows * 64 + columns,
    }
    kept = draw({"crop_scale": (0.25, 0.25)}, seed, given)["segmentation"]
    height = kept[-1, 0] // 64 - kept[0, 0] // 64 + 1
    width = kept[0, -1] % 64 - kept[0, 0] % 64 + 1
    assert 31 <= height <= 33 and 31 <= width <= 33
  corners = {
    tuple(draw({"crop_scale": (0.25, 0.25)}, s, given)["segmentation"][0, :1])
    for s in range(30)
  }
  assert len(corners) > 25  # it moves


def test_grayscale_is_the_luma():
  found = draw({"grayscale": 1.0})["image"]
  np.testing.assert_array_equal(found[..., 0], found[..., 2])
  # scikit-image weighs by BT.709; both are convex sums of the channels.
  image = to_float(example()["image"])
  np.testing.assert_allclose(
    found[..., 0], image @ [0.299, 0.587, 0.114], atol=1e-5
  )
  assert np.abs(found[..., 0] - color.rgb2gray(image)).max() < 0.15


@pytest.mark.parametrize("seed", range(5))
def test_colour_factors_stay_in_their_range(seed):
  image = to_float(example()["image"])
  bright = draw({"brightness": 0.1}, seed)["image"] / image
  assert np.ptp(bright) < 1e-5 and abs(bright.mean() - 1) < 0.1
  luma = np.float32([0.299, 0.587, 0.114])
  contrast = draw({"contrast": 0.1}, seed)["image"]
  mean = (image @ luma).mean()
  factor = (contrast - mean) / (image - mean)
  np.testing.assert_allclose(factor, factor.flat[0], atol=1e-3)
  assert abs(factor.flat[0] - 1) < 0.1
  saturation = draw({"saturation": 0.1}, seed)["image"]
  np.testing.assert_allclose(saturation @ luma, image @ luma, atol=1e-5)
  assert np.abs(saturation - image).max() > 1e-4


def test_every_option_matters_and_leaves_the_other_draws_alone():
  everything = draw(OPTIONS, seed=4)["image"]
  for name in OPTIONS:
    rest = {key: value for key, value in OPTIONS.items() if key != name}
    changed = [
      np.abs(draw(OPTIONS, s)["image"] - draw(rest, s)["image"]).max() > 1e-3
      for s in range(8)
    ]
    assert any(changed), name
  without = {k: v for k, v in OPTIONS.items() if k != "brightness"}
  np.testing.assert_array_equal(
    draw(OPTIONS, 4)["labels"], draw(without, 4)["labels"]
  )
  assert everything.dtype == np.float32
  assert 0 <= everything.min() and everything.max() <= 1


def test_the_draws_depend_on_the_generator_alone():
  first, again, other = draw(OPTIONS, 1), draw(OPTIONS, 1), draw(OPTIONS, 2)
  np.testing.assert_array_equal(first["image"], again["image"])
  assert np.abs(first["image"] - other["image"]).max() > 0.01


def test_the_given_example_is_left_as_it_was():
  given = example()
  before = {name: np.copy(value) for name, value in given.items()}
  for seed in range(4):
    draw(OPTIONS, seed, given)
  for name, value in before.items():
    np.testing.assert_array_equal(given[name], value)


def test_lists_and_tuples_are_both_ranges():
  listed = {**OPTIONS, "crop_scale": [0.3, 0.9]}
  np.testing.assert_array_equal(draw(listed)["labels"], draw(OPTIONS)["labels"])


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"flips": 1}, r"augment\.flips: unknown; choose from \['flip', 'crop"),
    ({"flip": 1.5}, r"augment\.flip=1\.5 is not in \[0, 1\]"),
    ({"contrast": -0.1}, r"augment\.contrast=-0\.1"),
    ({"crop_scale": (0.0, 1.0)}, r"augment\.crop_scale="),
    ({"crop_scale": (0.9, 0.5)}, r"augment\.crop_scale="),
    ({"crop_scale": (0.5,)}, r"augment\.crop_scale="),
  ],
)
def test_a_wrong_field_is_named(options, message):
  with pytest.raises(UserError, match=message):
    Augment.from_config(options)


def test_the_fields_are_those_tested_here():
  fields = {field.name for field in dataclasses.fields(Augment)}
  assert fields == OPTIONS.keys()
