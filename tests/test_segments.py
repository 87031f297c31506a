"""Connected regions and their merging against SciPy and plain loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage
from skimage import measure
from sklearn.metrics import adjusted_rand_score

from spectraldiffusion_jax.ops import segments

components = jax.jit(segments.connected_components)


def same_partition(first, second):
  return adjusted_rand_score(np.ravel(first), np.ravel(second)) == 1.0


@pytest.mark.parametrize("seed", range(4))
def test_components_equal_scikit_image(seed):
  label = np.random.default_rng(seed).integers(0, 2 + seed, (13, 21))
  want = measure.label(label, background=-1, connectivity=1)
  assert same_partition(components(jnp.asarray(label)), want)
  # Negative control: 8-connected regions are others.
  eight = measure.label(label, background=-1, connectivity=2)
  assert not same_partition(components(jnp.asarray(label)), eight)


def test_components_of_a_spiral_are_named_by_their_smallest_index():
  label = np.zeros((15, 15), int)
  label[1::2] = 1
  label[1::4, -1] = label[3::4, 0] = 0  # one snake of zeros through all rows
  want = ndimage.label(label == 0)[0]
  got = np.asarray(components(jnp.asarray(label)))
  assert want.max() == 1 and set(got[label == 0]) == {0}


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (7, 1)])
def test_components_of_thin_grids(shape):
  got = np.asarray(components(jnp.zeros(shape, int)))
  np.testing.assert_array_equal(got, 0)


def test_fragments_are_numbered_by_area_and_the_rest_join_the_nearest():
  label = np.zeros((6, 8), int)
  label[:, 4:] = 1
  label[:, 7] = 2
  label[2, 1] = 3  # one token inside the left, but coloured like the right
  features = np.where(label == 1, 1.0, 0.0)[..., None]
  features[2, 1] = 0.9
  root = components(jnp.asarray(label))
  find = jax.jit(segments.largest_fragments, static_argnames="limit")
  every = np.asarray(find(root, jnp.asarray(features), limit=48))
  assert same_partition(every, label)
  area = np.bincount(every.ravel())
  assert area[:4].tolist() == [23, 18, 6, 1]
  three = np.asarray(find(root, jnp.asarray(features), limit=3))
  assert three.max() == 2 and three[2, 1] == 0  # all its neighbours are 0
  two = np.asarray(find(root, jnp.asarray(features), limit=2))
  assert (two[:, 7] == 1).all()


def tables_by_loops(fragment, features, limit):
  step, length = np.zeros((2, limit, limit))
  for i in range(fragment.shape[0]):
    for j in range(fragment.shape[1]):
      for a, b in ((i, j + 1), (i + 1, j)):
        if a < fragment.shape[0] and b < fragment.shape[1]:
          p, q = fragment[i, j], fragment[a, b]
          if p != q:
            gap = np.linalg.norm(features[i, j] - features[a, b])
            step[p, q] += gap
            step[q, p] += gap
            length[p, q] += 1
            length[q, p] += 1
  return step, length


def merge_by_loops(step, length, area, tau, most, min_area):
  """The greedy merge on dense tables, one pair at a time."""
  step, length, area = step.copy(), length.copy(), area.copy()
  group = np.arange(len(area))
  while True:
    cost = np.full(step.shape, np.inf)
    for a, b in zip(*np.nonzero(length), strict=True):
      small = min(area[a], area[b]) < min_area
      cost[a, b] = step[a, b] / length[a, b] - 1e6 * small
    a, b = np.unravel_index(np.argmin(cost), cost.shape)
    alive = (area > 0).sum()
    if not np.isfinite(cost[a, b]) or (cost[a, b] >= tau and alive <= most):
      return group
    for table in (step, length):
      table[a] += table[b]
      table[:, a] += table[:, b]
      table[b] = table[:, b] = 0
      table[a, a] = 0
    area[a] += area[b]
    area[b] = 0
    group[group == b] = a


@pytest.mark.parametrize("tau,most", [(0.0, 5), (0.9, 20), (9.0, 20)])
def test_merge_equals_loops(tau, most):
  random = np.random.default_rng(3)
  fragment = np.kron(np.arange(16).reshape(4, 4), np.ones((2, 3), int))
  fragment[0, 0] = 16  # a fragment of one token goes first
  features = random.standard_normal((8, 12, 2)).astype(np.float32)
  features = 0.5 * ndimage.gaussian_filter(features, (1, 1, 0))
  want = tables_by_loops(fragment, features, 18)
  got = jax.jit(segments.boundary_tables, static_argnames="limit")(
    jnp.asarray(fragment), jnp.asarray(features), limit=18
  )
  for a, b in zip(got, want, strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5)
  area = np.bincount(fragment.ravel(), minlength=18)
  scaled = tau * np.median(want[0][want[1] > 0] / want[1][want[1] > 0])
  group = jax.jit(segments.merge_by_contrast, static_argnames="most")(
    *got, jnp.asarray(area, jnp.float32), tau=scaled, most=most
  )
  expected = merge_by_loops(*want, area, scaled, most, 2.0)
  assert same_partition(group[:17], expected[:17])
  kept = len(set(np.asarray(group)[fragment].ravel()))
  assert kept == {0.0: 5, 9.0: 1}.get(tau, kept) and kept <= most


def test_one_token_regions_go_whatever_their_contrast():
  label = np.zeros((5, 5), int)
  label[2, 2] = 1
  label[4, 3:] = 2
  features = jnp.asarray(label[..., None] * 10.0)
  find = jax.jit(lambda x, f: segments.merged_segments(x, f, tau=0.1, most=5))
  got = np.asarray(find(jnp.asarray(label), features))
  assert got[2, 2] == got[0, 0] and got[4, 4] != got[0, 0]


def test_slot_order_puts_the_rim_first_then_falling_area():
  share = np.zeros((6, 6, 4), np.float32)
  share[..., 2] = 1
  share[1:5, 1:5] = np.eye(4)[3]  # larger inside than column 0
  share[2, 2] = np.eye(4)[0]
  order = segments.slot_order(jnp.asarray(share))
  assert order.tolist() == [2, 3, 0, 1]


def test_slot_order_of_equal_segments_follows_their_first_token():
  share = np.eye(4, dtype=np.float32)[[[3, 1], [0, 2]]]
  order = segments.slot_order(jnp.asarray(share))
  assert order.tolist() == [3, 1, 0, 2]
