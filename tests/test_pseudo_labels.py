"""Teachers' segments made fit for training."""

import jax.numpy as jnp
import numpy as np
from scipy import ndimage

from spectraldiffusion_jax.ops import pseudo_labels as pl
from spectraldiffusion_jax.ops.composite import IGNORE


def disc(row, column, radius, size=48):
  rows, columns = np.mgrid[:size, :size]
  return (rows - row) ** 2 + (columns - column) ** 2 <= radius**2


def clean(labels, **options):
  return np.asarray(pl.pseudo_labels(jnp.asarray(labels), num=5, **options))


def test_pieces_match_scipy_components_by_falling_area():
  labels = np.zeros((48, 48), int)
  labels[disc(10, 10, 7)] = 3
  labels[disc(35, 35, 5)] = 3  # the same segment, not connected
  labels[disc(10, 36, 6)] = 1
  out = clean(labels)
  expected, count = ndimage.label(labels > 0)
  assert count == 3 and sorted(np.unique(out)) == [0, 1, 2, 3]
  for piece in range(1, 4):
    assert len(np.unique(expected[out == piece])) == 1
  areas = [(out == i).sum() for i in range(1, 4)]
  assert areas == sorted(areas, reverse=True)


def test_what_is_too_small_too_large_or_hollow_is_unknown():
  labels = np.zeros((48, 48), int)
  labels[2, 2] = 1  # one pixel
  labels[disc(24, 24, 12) & ~disc(24, 24, 10)] = 2  # a ring: hull 4x its area
  out = clean(labels)
  assert (out[labels > 0] == IGNORE).all() and (out[labels == 0] == 0).all()
  labels = np.ones((48, 48), int)
  assert (clean(labels) == IGNORE).all()


def test_only_the_largest_pieces_keep_an_id():
  labels = np.zeros((48, 48), int)
  for i in range(8):
    labels[disc(6 + 12 * (i // 4), 6 + 12 * (i % 4), 3 + (i % 3))] = i + 1
  out = clean(labels)
  assert out.max() == 5 and (out == IGNORE).any()


def test_doubtful_pixels_are_unknown():
  labels = np.zeros((48, 48), int)
  labels[disc(24, 24, 8)] = 1
  chance = np.where(disc(24, 24, 6), 0.95, 0.05).astype(np.float32)
  chance[disc(24, 24, 10) & ~disc(24, 24, 6)] = 0.6
  out = clean(labels, chance=jnp.asarray(chance))
  assert (out[chance == np.float32(0.6)] == IGNORE).all()
  assert (out[disc(24, 24, 6)] == 1).all()


def test_bytes_round_trip():
  labels = jnp.array([[IGNORE, 0, 7]])
  stored = pl.encode(labels)
  assert stored.dtype == jnp.uint8
  np.testing.assert_array_equal(pl.decode(stored), labels)
