"""Bicubic resampling: against PIL, torch's stored values and invariances."""

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from spectraldiffusion_jax.ops.resample import bicubic_matrix, resize_bicubic

SIZES = [((9, 13), (4, 20)), ((16, 16), (7, 7)), ((5, 6), (11, 17))]


@pytest.mark.parametrize(("before", "after"), SIZES)
def test_antialiased_equals_pil(before, after):
  image = np.random.default_rng(0).normal(size=before).astype(np.float32)
  wanted = Image.fromarray(image).resize(after[::-1], Image.Resampling.BICUBIC)
  ours = resize_bicubic(
    jnp.asarray(image)[None, ..., None], after, antialias=True
  )
  np.testing.assert_allclose(ours[0, ..., 0], np.asarray(wanted), atol=1e-5)


# torch 2.13.0: torch.nn.functional.interpolate(x, mode="bicubic", ...) of the
# column (1, -2, 3, 0.5, 4), rows only. With a scale_factor of 3.1 / 5 the
# result has 3 rows too, but reads at a step of 5 / 3.1.
COLUMN = (1.0, -2.0, 3.0, 0.5, 4.0)
TORCH = [
  (3, False, None, (-0.22222167, 3.0, 2.75925756)),
  (
    *(7, False, None),
    (1.236153, -1.265306, -0.899416, 3.0, 0.995626, 1.706996, 4.275513),
  ),
  (3, False, 5 / 3.1, (-0.10189867, 2.78885508, 2.1586163)),
  (
    *(7, False, 5 / 7.1),
    (1.241606, -1.204817, -1.038935, 2.92218, 1.166653, 1.479535, 4.173061),
  ),
  (3, True, None, (-0.32307687, 1.18837214, 2.6230762)),
  (
    *(7, True, None),
    (1.174757, -1.01108, -0.935859, 3.0, 0.995626, 1.875347, 4.203884),
  ),
]


@pytest.mark.parametrize(("rows", "antialias", "step", "wanted"), TORCH)
def test_equals_torch(rows, antialias, step, wanted):
  steps = None if step is None else (step, 1.0)
  x = jnp.asarray(COLUMN)[None, :, None, None]
  ours = resize_bicubic(x, (rows, 1), antialias=antialias, step=steps)
  np.testing.assert_allclose(ours[0, :, 0, 0], wanted, atol=1e-5)


@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize("size_out", [3, 8, 21])
def test_keeps_constants_and_mirror_images(antialias, size_out):
  matrix = bicubic_matrix(8, size_out, antialias=antialias)
  np.testing.assert_allclose(matrix.sum(1), 1, atol=1e-6)
  np.testing.assert_allclose(matrix, matrix[::-1, ::-1], atol=1e-6)


@pytest.mark.parametrize("antialias", [True, False])
def test_same_size_is_the_identity(antialias):
  matrix = bicubic_matrix(6, 6, antialias=antialias)
  np.testing.assert_array_equal(matrix, np.eye(6))


def test_reproduces_a_ramp_inside():
  # Keys' kernel does so for a = -1/2 only, which sets the two apart.
  ramp = np.arange(20, dtype=np.float32)
  wanted = (np.arange(40) + 0.5) / 2 - 0.5
  error = [
    np.abs(bicubic_matrix(20, 40, antialias=a) @ ramp - wanted)[4:-4].max()
    for a in (True, False)
  ]
  assert error[0] < 1e-5 and error[1] == pytest.approx(3 / 64, rel=1e-4)
