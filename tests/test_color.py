"""Colour conversion, blur and pooling against scikit-image and SciPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage
from skimage import color as skcolor

from spectraldiffusion_jax.ops import color

RANDOM = np.random.default_rng(0)
IMAGE = RANDOM.random((17, 23, 3)).astype(np.float32)


def test_lab_equals_scikit_image_over_100():
  dark = IMAGE * 0.03  # below the knees of both curves
  for image in (IMAGE, dark, np.zeros_like(IMAGE), np.ones_like(IMAGE)):
    want = skcolor.rgb2lab(image.astype(np.float64)) / 100
    np.testing.assert_allclose(color.srgb_to_lab(image), want, atol=2e-5)


def test_lab_is_not_linear_in_the_coded_values():
  # Negative control: treating sRGB as linear light would give 0.76 here.
  grey = jnp.full((1, 3), 0.5)
  assert abs(float(color.srgb_to_lab(grey)[0, 0]) - 0.5339) < 1e-3


def test_lab_round_trip_and_clipping():
  back = color.lab_to_srgb(color.srgb_to_lab(IMAGE))
  np.testing.assert_allclose(back, IMAGE, atol=2e-5)
  outside = color.srgb_to_lab(jnp.array([[1.5, -0.5, 0.2]]))
  inside = color.srgb_to_lab(jnp.array([[1.0, 0.0, 0.2]]))
  np.testing.assert_array_equal(outside, inside)


def test_lab_gradients_are_finite_at_black_and_white():
  for value in (0.0, 0.04045, 1.0):
    grad = jax.grad(lambda x: jnp.sum(color.srgb_to_lab(x)))
    assert np.isfinite(grad(jnp.full((2, 3), value))).all()
  grad = jax.grad(lambda x: jnp.sum(color.lab_to_srgb(x)))
  assert np.isfinite(grad(jnp.zeros((2, 3)))).all()


@pytest.mark.parametrize("sigma", [0.0, 0.5, 1.4, 9.0])
def test_blur_equals_scipy(sigma):
  want = ndimage.gaussian_filter(
    IMAGE.astype(np.float64), (sigma, sigma, 0), mode="nearest", truncate=4.0
  )
  # SciPy rounds 4 sigma where this takes the ceiling: tails of 3e-4 apart.
  got = color.gaussian_blur(jnp.asarray(IMAGE), sigma=sigma)
  np.testing.assert_allclose(got, want, atol=2e-4)


def test_pooling_whole_cells_is_the_plain_mean():
  image = RANDOM.random((12, 20, 2)).astype(np.float32)
  want = image.reshape(4, 3, 5, 4, 2).mean((1, 3))
  got = color.pool_to_grid(jnp.asarray(image), grid=(4, 5))
  np.testing.assert_allclose(got, want, rtol=1e-5)


@pytest.mark.parametrize("grid", [(1, 1), (5, 7), (17, 23), (40, 50)])
def test_pooling_any_grid_keeps_the_mean_and_constants(grid):
  got = color.pool_to_grid(jnp.asarray(IMAGE), grid=grid)
  np.testing.assert_allclose(got.mean((0, 1)), IMAGE.mean((0, 1)), rtol=1e-5)
  flat = color.pool_to_grid(jnp.ones((17, 23, 1)), grid=grid)
  np.testing.assert_allclose(flat, np.ones((*grid, 1)), rtol=1e-5)


def test_pooling_cut_pixels_count_by_area():
  # Three pixels in two cells: the middle one is shared half and half.
  image = jnp.array([0.0, 3.0, 6.0]).reshape(1, 3, 1)
  got = color.pool_to_grid(image, grid=(1, 2)).reshape(-1)
  np.testing.assert_allclose(got, [1.0, 5.0], rtol=1e-6)
