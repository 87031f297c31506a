"""Colour modes, crop and resize against numpy loops and scikit-image."""

import numpy as np
import pytest
from PIL import Image
from skimage import measure

from spectraldiffusion_jax.data import transforms
from spectraldiffusion_jax.errors import UserError

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (9, 7, 3), np.uint8)
GREY = RNG.integers(0, 256, (9, 7), np.uint8)
ALPHA = RNG.integers(0, 256, (9, 7), np.uint8)


def stacked(grey):
  return np.stack([grey] * 3, axis=-1)


def on_white(colour, alpha):
  weight = alpha[..., None] / 255
  return weight * colour + (1 - weight) * 255


def palette_image():
  image = Image.fromarray(GREY % 4, mode=None).convert("P")
  image.putdata((GREY % 4).ravel().tolist())
  image.putpalette([9, 8, 7, 200, 0, 1, 0, 99, 3, 250, 251, 252])
  return image


PALETTE = np.array([[9, 8, 7], [200, 0, 1], [0, 99, 3], [250, 251, 252]])


@pytest.mark.parametrize(
  ("image", "expected"),
  [
    (Image.fromarray(RGB), RGB),
    (Image.fromarray(GREY), stacked(GREY)),
    (Image.fromarray(GREY > 99), stacked((GREY > 99) * 255)),
    (
      Image.fromarray(np.dstack([RGB, ALPHA])),
      on_white(RGB.astype(float), ALPHA),
    ),
    (
      Image.fromarray(np.dstack([GREY, ALPHA])),
      on_white(stacked(GREY).astype(float), ALPHA),
    ),
    (palette_image(), PALETTE[GREY % 4]),
    (Image.fromarray(GREY.astype(np.uint16) * 257), stacked(GREY)),
    (Image.fromarray(GREY.astype(np.int32) * 257), stacked(GREY)),
    (Image.fromarray(GREY / np.float32(255)), stacked(GREY)),
    (Image.fromarray(np.dstack([255 - RGB, 0 * GREY]), mode="CMYK"), RGB),
    (RGB, RGB),
    (GREY, stacked(GREY)),
    (GREY[..., None], stacked(GREY)),
    (np.dstack([RGB, ALPHA]), on_white(RGB.astype(float), ALPHA)),
    (np.dstack([GREY, ALPHA]), on_white(stacked(GREY).astype(float), ALPHA)),
    (RGB.astype(np.uint16) * 257, RGB),
    (RGB / np.float32(255), RGB),
    (RGB / 255.0, RGB),
    (GREY > 99, stacked((GREY > 99) * 255)),
  ],
)
def test_every_mode_becomes_rgb(image, expected):
  found = transforms.to_rgb(image)
  assert (found.dtype, found.shape) == (np.uint8, (9, 7, 3))
  np.testing.assert_allclose(found, expected, atol=1)


def test_a_transparent_palette_colour_is_white():
  image = palette_image()
  image.info["transparency"] = 1
  expected = np.where((GREY % 4 == 1)[..., None], 255, PALETTE[GREY % 4])
  np.testing.assert_array_equal(transforms.to_rgb(image), expected)


def test_sixteen_bit_files_keep_their_greys(tmp_path):
  Image.fromarray(GREY.astype(np.uint16) * 257).save(tmp_path / "a.png")
  with Image.open(tmp_path / "a.png") as image:
    np.testing.assert_array_equal(transforms.to_rgb(image), stacked(GREY))


def test_the_camera_orientation_is_applied(tmp_path):
  exif = Image.Exif()
  exif[0x0112] = 6  # turn by 90 degrees clockwise to view
  Image.fromarray(RGB).save(tmp_path / "a.png", exif=exif)
  with Image.open(tmp_path / "a.png") as image:
    np.testing.assert_array_equal(transforms.to_rgb(image), np.rot90(RGB, -1))


@pytest.mark.parametrize(
  ("image", "message"),
  [
    (RGB.astype(np.float32), r"floats outside \[0, 1\]"),
    (np.full((4, 4), np.nan), r"floats outside \[0, 1\]"),
    (RGB.astype(np.int64), "dtype int64"),
    (RGB[None], r"shape \(1, 9, 7, 3\)"),
    (np.zeros((4, 4, 5), np.uint8), r"shape \(4, 4, 5\)"),
    (np.zeros((0, 4, 3), np.uint8), r"shape \(0, 4, 3\)"),
  ],
)
def test_what_is_no_image_is_refused(image, message):
  with pytest.raises(UserError, match=message):
    transforms.to_rgb(image)


@pytest.mark.parametrize("factor", [2, 4])
def test_shrinking_averages_instead_of_skipping(factor):
  # A fine checkerboard: every pixel of the small image sees half of each.
  board = (np.indices((32, 48)).sum(axis=0) % 2 * 200).astype(np.uint8)
  size = (32 // factor, 48 // factor)
  small = transforms.resize_image(stacked(board), size)
  inner = small[1:-1, 1:-1].astype(int)
  np.testing.assert_allclose(inner, 100, atol=4)
  skipped = board[::factor, ::factor]
  assert np.abs(skipped.astype(int) - 100).min() == 100  # what it is not


def test_resizing_a_ramp_keeps_pixel_centres():
  ramp = np.tile(np.arange(64, dtype=np.uint8) * 2, (64, 1))
  small = transforms.resize_image(stacked(ramp), (16, 16))[..., 0]
  blocks = measure.block_reduce(ramp.astype(float), (4, 4), np.mean)
  np.testing.assert_allclose(small[:, 1:-1], blocks[:, 1:-1], atol=1)


def loop_nearest(ids, size, box):
  top, bottom, left, right = box
  found = np.zeros(size, ids.dtype)
  for row in range(size[0]):
    for column in range(size[1]):
      y = top + (row + 0.5) * (bottom - top) / size[0]
      x = left + (column + 0.5) * (right - left) / size[1]
      found[row, column] = ids[int(y), int(x)]
  return found


@pytest.mark.parametrize("size", [(9, 7), (4, 3), (20, 31), (1, 1)])
@pytest.mark.parametrize("box", [None, (1.25, 7.5, 0.0, 6.75)])
def test_nearest_takes_the_pixel_under_the_centre(size, box):
  ids = GREY.astype(np.int32)
  found = transforms.resize_map(ids, size, box=box)
  expected = loop_nearest(ids, size, box or (0, 9, 0, 7))
  np.testing.assert_array_equal(found, expected, strict=True)


def test_image_and_map_are_resized_alike():
  ids = np.zeros((60, 80), np.uint8)
  ids[13:40, 22:61] = 1
  for box in (None, (3.5, 50.25, 10.0, 77.5)):
    small = transforms.resize_map(ids, (23, 31), box=box)
    image = transforms.resize_image(stacked(ids * 255), (23, 31), box=box)
    inside = image[..., 0] > 127
    assert (inside != (small == 1)).mean() < 0.02
    assert 0.1 < inside.mean() < 0.9


def test_majority_takes_the_id_that_covers_most():
  ids = RNG.integers(0, 4, (12, 20)).astype(np.int32)
  ids[ids == 3] = 70_000
  found = transforms.resize_map(ids, (4, 5), method="majority")

  def mode(block, axis):
    assert axis == (2, 3)
    flat = block.reshape(*block.shape[:2], -1)
    return np.apply_along_axis(
      lambda values: np.unique(values)[
        np.argmax(np.unique(values, return_counts=True)[1])
      ],
      2,
      flat,
    )

  expected = measure.block_reduce(ids, (3, 4), mode)
  np.testing.assert_array_equal(found, expected)
  assert found.dtype == np.int32
  with pytest.raises(UserError, match="'vote'; expected 'nearest' or"):
    transforms.resize_map(ids, (4, 5), method="vote")


def test_crop_is_rows_then_columns():
  np.testing.assert_array_equal(
    transforms.crop(RGB, (2, 5, 1, 7)), RGB[2:5, 1:7]
  )
  assert transforms.crop(GREY, None) is GREY


@pytest.mark.parametrize(
  "window",
  [(0, 10, 0, 7), (0, 9, 0, 8), (3, 3, 0, 7), (-1, 9, 0, 7), (0, 9, 7)],
)
def test_a_crop_that_does_not_fit_is_refused(window):
  with pytest.raises(UserError, match="^crop="):
    transforms.crop(RGB, window)


def test_fit_crops_then_resizes_both():
  example = {"image": RGB, "segmentation": GREY, "other": GREY}
  fitted = transforms.fit(example, window=(1, 9, 2, 6), size=(8, 4))
  assert fitted.keys() == {"image", "segmentation"}
  np.testing.assert_array_equal(fitted["image"], RGB[1:9, 2:6])
  np.testing.assert_array_equal(fitted["segmentation"], GREY[1:9, 2:6])
  small = transforms.fit(example, window=None, size=(3, 5))
  assert small["image"].shape == (3, 5, 3)
  assert small["segmentation"].shape == (3, 5)


def test_floats_span_zero_to_one():
  floats = transforms.to_float(np.array([[0, 51, 255]], np.uint8))
  np.testing.assert_array_equal(floats, np.float32([[0, 0.2, 1]]))
  assert floats.dtype == np.float32
