"""Copy-paste composites: exact masks, honest alpha, solid donors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.spatial

from spectraldiffusion_jax import sharding
from spectraldiffusion_jax.ops import composite, recolour

SIZE, NUM = 32, 3


def scenes(batch=4):
  """Grey ground with three discs of other places and colours in each."""
  random = np.random.default_rng(0)
  images = np.full((batch, SIZE, SIZE, 3), 0.5, np.float32)
  labels = np.zeros((batch, SIZE, SIZE), np.int32)
  rows, columns = np.mgrid[:SIZE, :SIZE]
  for b in range(batch):
    for k, row in enumerate((7, 16, 25)):
      column = random.integers(6, SIZE - 6)
      disc = (rows - row) ** 2 + (columns - column) ** 2 <= 9
      labels[b][disc] = k + 1
      images[b][disc] = random.uniform(0, 1, 3)
  return jnp.asarray(images), jnp.asarray(labels)


@pytest.fixture(scope="module")
def pasted():
  images, labels = scenes()
  run = jax.jit(
    lambda key: composite.compose(
      key, images, labels, num=NUM, pastes=3, rate=1.0, min_solidity=0.7
    )
  )
  return images, labels, [run(jax.random.key(i)) for i in range(6)]


def test_exact_marks_exactly_the_pasted_ids(pasted):
  _, _, outs = pasted
  for out in outs:
    np.testing.assert_array_equal(out.exact > 0, out.labels > NUM)
  assert sum(float(out.exact.sum()) for out in outs) > 100


def test_other_pixels_keep_image_and_label(pasted):
  images, labels, outs = pasted
  for out in outs:
    rest = np.asarray(out.exact) == 0
    np.testing.assert_array_equal(out.labels[rest], labels[rest])
    np.testing.assert_allclose(out.images[rest], images[rest], atol=1e-6)


def test_pieces_are_no_larger_than_their_donors(pasted):
  _, labels, outs = pasted
  largest = max(np.bincount(np.asarray(x).ravel())[1:].max() for x in labels)
  for out in outs:
    for label in np.asarray(out.labels):
      counts = np.bincount(label.ravel(), minlength=NUM + 4)[NUM + 1 :]
      assert counts.max() <= largest


def test_no_donor_means_no_paste():
  images, labels = scenes(2)
  out = composite.compose(
    jax.random.key(0), images, jnp.zeros_like(labels), num=NUM, rate=1.0
  )
  np.testing.assert_array_equal(out.images, images)
  assert not np.any(out.exact)


def test_ignored_pixels_stay_ignored_unless_covered():
  images, labels = scenes(2)
  labels = labels.at[:, :4].set(composite.IGNORE)
  out = composite.compose(jax.random.key(1), images, labels, num=NUM, rate=1.0)
  rest = np.asarray(out.exact)[:, :4] == 0
  assert np.all(np.asarray(out.labels)[:, :4][rest] == composite.IGNORE)


def test_solidity_against_convex_hull():
  label = np.zeros((1, 48, 48), np.int32)
  label[0, 5:25, 5:25] = 1  # square
  label[0, 28:46, 4:44] = 2  # L shape
  label[0, 28:40, 12:44] = 0
  got = np.asarray(composite.solidity(jnp.asarray(label), 3))[0]
  for k in (1, 2):
    points = np.argwhere(label[0] == k)
    corners = np.concatenate(
      [points + d for d in ((0, 0), (0, 1), (1, 0), (1, 1))]
    )
    want = len(points) / scipy.spatial.ConvexHull(corners).volume
    assert abs(got[k - 1] - want) < 0.08
  assert got[0] > 0.95 > 0.7 > got[1]
  assert got[2] == 0


def test_describe_against_loops():
  images, labels = scenes(2)
  got = composite.describe(images, labels, num=NUM)
  for b in range(2):
    for k in range(NUM):
      rows, columns = np.nonzero(np.asarray(labels[b]) == k + 1)
      assert got.area[b, k] == len(rows)
      np.testing.assert_allclose(
        got.centre[b, k], [rows.mean(), columns.mean()], rtol=1e-5
      )
      assert got.bottom[b, k] == rows.max()
      np.testing.assert_allclose(
        got.colour[b, k], images[b, rows, columns].mean(0), rtol=1e-4
      )


def test_recolour_greys_single_objects_only():
  images, labels = scenes(2)
  out = np.asarray(
    recolour.recolour(
      jax.random.key(3), images, labels, num=NUM, grey_object=1.0
    )
  )
  on = np.asarray(labels) > 0
  assert np.abs(out[on] - out[on].mean(-1, keepdims=True)).max() < 0.05
  assert np.isfinite(out).all() and out.min() >= 0 and out.max() <= 1
  none = np.asarray(
    recolour.recolour(
      jax.random.key(3), images, labels, num=NUM, grey_object=0.0
    )
  )
  assert np.abs(none[on] - none[on].mean(-1, keepdims=True)).max() > 0.1


def test_donors_travel_between_neighbours_not_to_every_device():
  """Split over devices a paste is a permute: no device gathers the batch."""
  mesh = sharding.make_mesh(data=8)
  images = jnp.zeros((16, 16, 16, 3))
  labels = jnp.zeros((16, 16, 16), jnp.int32)
  rows = sharding.batch_sharding(mesh)
  compose = jax.jit(
    lambda i, n: composite.compose(jax.random.key(0), i, n, num=NUM),
    in_shardings=(rows, rows),
    out_shardings=rows,
  )
  text = compose.lower(images, labels).compile().as_text()
  assert "collective-permute" in text
  assert "all-gather" not in text
