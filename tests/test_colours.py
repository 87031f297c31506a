"""Label colours are apart for every eye; overlays and attention maps."""

import numpy as np
import pytest
from skimage.color import deltaE_ciede2000, rgb2lab

from spectraldiffusion_jax import colours
from spectraldiffusion_jax.errors import UserError


def seen_by_dichromat(rgb, cones):
  srgb = rgb / 255
  linear = np.where(
    srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4
  )
  linear = np.clip(linear @ np.array(cones).T, 0, 1)
  return np.where(
    linear <= 0.0031308, linear * 12.92, 1.055 * linear ** (1 / 2.4) - 0.055
  )


def nearest(srgb):
  """Smallest CIEDE2000 difference of any two colours (1 is just visible)."""
  lab = rgb2lab(srgb)
  delta = deltaE_ciede2000(lab[:, None], lab[None])
  return delta[~np.eye(len(lab), dtype=bool)].min()


def test_colours_differ_for_every_eye():
  rgb = colours.label_colours(12).astype(float)
  assert nearest(rgb / 255) > 15
  for cones in colours.DICHROMATS:
    assert nearest(seen_by_dichromat(rgb, cones)) > 7
  assert nearest(colours.label_colours(24) / 255) > 6
  # Negative control: a rainbow fails the same measure.
  hues = np.linspace(0, 2 * np.pi, 12, endpoint=False)[:, None]
  rainbow = 127.5 + 127.5 * np.cos(hues + np.array([0, 2.1, 4.2]))
  assert nearest(seen_by_dichromat(rainbow, colours.DICHROMATS[0])) < 7


def test_colours_are_stable_and_distinct():
  every = colours.label_colours(256)
  assert len(np.unique(every, axis=0)) == 256
  np.testing.assert_array_equal(every[:9], colours.label_colours(9))
  np.testing.assert_array_equal(every[0], colours.BACKGROUND)
  every[:] = 0  # a copy: the palette itself must not change
  assert colours.label_colours(2).any()


def test_masks_take_any_ids():
  labels = np.array([[0, 1], [255, 256]])
  out = colours.colour_masks(labels)
  np.testing.assert_array_equal(out[0, 0], colours.BACKGROUND)
  np.testing.assert_array_equal(out[1, 1], out[0, 1])  # 256 is drawn like 1
  assert (colours.colour_masks(np.array([[-1]])) == 0).all()
  huge = colours.colour_masks(np.full((2, 3, 1), 2**40))
  assert huge.shape == (2, 3, 1, 3)
  assert (huge != np.array(colours.BACKGROUND)).any(-1).all()


def test_overlay_tints_objects_and_draws_their_outline():
  image = np.full((6, 8, 3), 100, np.uint8)
  labels = np.zeros((6, 8), int)
  labels[2:4, 2:6] = 1
  out = colours.overlay(image, labels, opacity=0.5)
  assert (out[0, 0] == 100).all()  # the background keeps its colours
  expected = (100 + colours.label_colours(2)[1].astype(float)) / 2
  np.testing.assert_allclose(out[2, 3], expected, atol=0.5)
  assert (out[1, 2:6] == 255).all() and (out[3, 2:6] == 255).all()
  with pytest.raises(UserError, match="one size"):
    colours.overlay(image, labels[:3])


def test_attention_is_on_an_absolute_scale():
  out = colours.attention_maps(np.array([[0.0, 0.1, 1.0, np.nan]]))
  luma = out.astype(float).sum(-1)[0]
  assert luma[0] < luma[1] < luma[2] and luma[3] == luma[0]
  ramp = colours.attention_maps(np.linspace(0, 1, 50)[None])[0].astype(float)
  assert (np.diff(ramp @ np.array([0.299, 0.587, 0.114])) > 0).all()


def test_to_uint8():
  floats = np.array([[0.0, 0.5, 1.0, 2.0, -1.0, np.nan]], np.float32)
  out = colours.to_uint8(floats)
  np.testing.assert_array_equal(out[0, :, 0], [0, 128, 255, 255, 0, 0])
  assert out.shape == (1, 6, 3)
  grey = np.arange(6, dtype=np.uint8).reshape(2, 3, 1)
  np.testing.assert_array_equal(colours.to_uint8(grey)[..., 2], grey[..., 0])
  with pytest.raises(UserError, match="H W 3"):
    colours.to_uint8(np.zeros((2, 2, 4), np.uint8))
