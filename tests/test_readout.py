"""What slots tell of objects: known answers on made-up slots."""

import numpy as np
import pytest

from spectraldiffusion_jax.ablation import readout
from spectraldiffusion_jax.ops import color

GREY, RED = (0.5, 0.5, 0.5), (0.8, 0.1, 0.1)


def scene():
  """A batch of one image with a grey and a red square, and one of padding."""
  image = np.full((2, 16, 16, 3), 0.2, np.float32)
  truth = np.zeros((2, 16, 16), np.int32)
  image[0, 2:6, 2:6], truth[0, 2:6, 2:6] = GREY, 3
  image[0, 8:14, 8:14], truth[0, 8:14, 8:14] = RED, 7
  truth[0, 15, 15] = 9  # one pixel: too small
  return {
    "image": image,
    "segmentation": truth,
    "mask": np.array([True, False]),
    "index": np.array([5, -1]),
  }


def test_objects_meet_the_slot_that_covers_them():
  batch = scene()
  slots = np.arange(2 * 4 * 3, dtype=np.float32).reshape(2, 4, 3)
  labels = np.zeros((2, 16, 16), np.uint8)
  labels[0, 2:6, 2:7] = 2
  labels[0, 8:14, 8:13] = 1

  contents, properties, images = readout.pairs(
    [batch], lambda image: (slots, labels)
  )
  np.testing.assert_array_equal(contents, slots[0, [2, 1]])
  assert images.tolist() == [5, 5]
  np.testing.assert_allclose(np.exp(properties[:, 4]), [16, 36])
  for row, rgb in zip(properties, (GREY, RED), strict=True):
    light, a, b = color.srgb_to_lab(np.asarray([rgb], np.float32))[0]
    np.testing.assert_allclose(row[:4], [a, b, light, 0], atol=1e-4)


def made_up(noise, seed=0):
  random = np.random.default_rng(seed)
  drawn = random.normal(size=(400, 5))
  properties = drawn * [30, 30, 20, 5, 0.5] + 7
  mixed = drawn @ random.normal(size=(5, 12)) + 3
  contents = mixed + noise * mixed.std() * random.normal(size=mixed.shape)
  return contents, properties, np.arange(400) // 4


def test_what_slots_hold_is_explained_and_what_they_lack_is_not():
  contents, properties, images = made_up(0.0)
  told = readout.explained(contents, properties, images)
  assert min(told.values()) > 0.97 and set(told) == set(readout.PROPERTIES)
  blind = np.random.default_rng(1).normal(size=contents.shape)
  assert max(readout.explained(blind, properties, images).values()) < 0.05
  worse = readout.explained(*made_up(0.5))
  assert all(worse[name] < told[name] for name in told)


def test_no_image_explains_itself():
  # One-hot slots know each image by heart: that helps with no other image.
  _, properties, _ = made_up(0.0)
  images = np.arange(400)
  told = readout.explained(np.eye(400), properties, images)
  assert max(told.values()) < 0.05


@pytest.mark.parametrize("images", [[], [2, 2, 4]])
def test_a_fold_without_objects_tells_nothing(images):
  images = np.array(images, int)
  rows = len(images)
  assert readout.explained(np.ones((rows, 2)), np.ones((rows, 5)), images) == {}
