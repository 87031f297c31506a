"""Scores against scikit-learn, scipy, float64 loops and hand counts."""

import itertools
import math

import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment
from sklearn.metrics import adjusted_rand_score
from sklearn.metrics.cluster import contingency_matrix

from spectraldiffusion_jax import metrics
from spectraldiffusion_jax.errors import UserError


def random_labels(seed, shape=(6, 12, 14), num=5):
  rng = np.random.default_rng(seed)
  true = rng.integers(0, num, shape).astype(np.int32)
  pred = np.where(
    rng.random(shape) < 0.5, true, rng.integers(0, num + 2, shape)
  )
  return true, pred.astype(np.int32)


def iou_loop(true, pred, background=0, ignore=None):
  """IoU of every object with every predicted segment, by boolean masks."""
  keep = np.ones(true.shape, bool) if ignore is None else true != ignore
  rows = []
  for t in sorted(set(true[keep]) - {background}):
    row = []
    for p in sorted(set(pred[keep])):
      a, b = (true == t) & keep, (pred == p) & keep
      row.append((a & b).sum() / (a | b).sum())
    rows.append(row)
  return np.array(rows).reshape(len(rows), -1)


def iou_by_matching(iou):
  """Best one-to-one assignment by trying all of them."""
  rows, columns = iou.shape
  square = np.zeros((max(rows, columns),) * 2)
  square[:rows, :columns] = iou
  best = max(
    sum(square[i, j] for i, j in enumerate(order))
    for order in itertools.permutations(range(len(square)))
  )
  return best / rows


@pytest.mark.parametrize("seed", range(4))
def test_ari_is_scikit_learns(seed):
  true, pred = random_labels(seed)
  expected = [
    adjusted_rand_score(t.ravel(), p.ravel())
    for t, p in zip(true, pred, strict=True)
  ]
  np.testing.assert_allclose(
    metrics.adjusted_rand_index(true, pred), expected, rtol=1e-13
  )
  foreground = [
    adjusted_rand_score(t[t != 0], p[t != 0])
    for t, p in zip(true, pred, strict=True)
  ]
  scores = metrics.foreground_ari(true, pred)
  np.testing.assert_allclose(scores, foreground, rtol=1e-13)
  # Negative control: the two conventions do not give the same figure.
  assert np.abs(scores - expected).min() > 1e-3


@pytest.mark.parametrize(
  ("true", "pred", "expected"),
  [
    ([1, 1, 1, 1], [3, 3, 3, 3], 1.0),  # one cluster on both sides
    ([1, 2, 3, 4], [9, 8, 7, 6], 1.0),  # all singletons on both sides
    ([5], [2], 1.0),  # a single pixel
    ([1, 1, 1, 1], [1, 1, 2, 2], 0.0),  # one true cluster, split
    ([1, 1, 2, 2], [1, 1, 1, 1], 0.0),  # two true clusters, merged
    ([1, 1, 2, 2], [1, 2, 1, 2], -0.5),  # the minimum
    # r = 2 + 2, alpha = 2 + 6, beta = 6 + 2, N = 20, E = 3.2: (4 - 3.2)/4.8
    ([0, 0, 1, 1, 1], [0, 0, 0, 1, 1], 1 / 6),
  ],
)
def test_ari_of_degenerate_and_hand_counted_maps(true, pred, expected):
  true, pred = np.array([true]), np.array([pred])
  assert metrics.adjusted_rand_index(true, pred)[0] == expected
  assert adjusted_rand_score(true[0], pred[0]) == pytest.approx(expected)


def test_ari_is_exact_where_float32_is_not():
  # 40 foreground pixels of a 2048x2048 image, one of them wrong.
  true = np.zeros((1, 2048, 2048), np.uint8)
  true[0, 0, :20], true[0, 0, 20:40] = 1, 2
  pred = true.copy()
  pred[0, 0, 0] = 2
  expected = adjusted_rand_score(true[0, 0, :40], pred[0, 0, :40])
  assert metrics.foreground_ari(true, pred)[0] == pytest.approx(
    expected, rel=1e-15
  )
  full = adjusted_rand_score(true.ravel(), pred.ravel())
  assert metrics.adjusted_rand_index(true, pred)[0] == pytest.approx(
    full, rel=1e-9
  )


@pytest.mark.parametrize("seed", range(3))
def test_overlaps_are_the_loops(seed):
  true, pred = random_labels(seed, num=4)
  loops = [iou_loop(t, p) for t, p in zip(true, pred, strict=True)]
  np.testing.assert_allclose(
    metrics.mean_best_overlap(true, pred), [i.max(1).mean() for i in loops]
  )
  matched = metrics.mean_iou(true, pred)
  np.testing.assert_allclose(matched, [iou_by_matching(i) for i in loops])
  for iou, value in zip(loops, matched, strict=True):
    rows, columns = linear_sum_assignment(-iou)
    assert iou[rows, columns].sum() / len(iou) == pytest.approx(value)


def test_mbo_and_miou_by_hand():
  # Objects 1 (6 pixels) and 2 (2 pixels), one predicted segment over both and
  # half of the background: |p| = 10. IoU 6/10 and 2/10.
  true = np.array([[1] * 6 + [2] * 2 + [0] * 4])
  pred = np.array([[3] * 10 + [4] * 2])
  assert metrics.mean_best_overlap(true, pred)[0] == pytest.approx(0.4)
  # One-to-one: segment 3 goes to object 1, object 2 is left with 0.
  assert metrics.mean_iou(true, pred)[0] == pytest.approx(0.3)


def test_permuting_ids_changes_no_bit():
  true, pred = random_labels(7)
  base = metrics.score_images(true, pred)
  rng = np.random.default_rng(0)
  # The background keeps its name; huge and negative ids take the sorted path.
  names = np.concatenate([[0], rng.permutation(4) * 10**12 - 17])
  other = metrics.score_images(names[true], rng.permutation(7)[pred] - 3)
  for name, one, two in zip(base._fields, base, other, strict=True):
    np.testing.assert_array_equal(one, two, err_msg=name)


def test_distinct_is_numpys_unique():
  rng = np.random.default_rng(0)
  extremes = np.array([-(2**63), 2**63 - 1, 0])
  for labels in (
    rng.integers(-5, 9, 50),
    rng.integers(0, 10**15, 50),
    rng.integers(0, 255, 50).astype(np.uint8),
    extremes,
    np.zeros(0, np.int32),
  ):
    ids, ranks = metrics.distinct(labels)
    expected = np.unique(labels, return_inverse=True)
    np.testing.assert_array_equal(ids, expected[0])
    np.testing.assert_array_equal(ranks, expected[1])


def test_contingency_is_scikit_learns():
  true, pred = random_labels(3)
  table = metrics.contingency(true[0], pred[0])
  expected = contingency_matrix(true[0].ravel(), pred[0].ravel())
  np.testing.assert_array_equal(table.counts, expected)
  assert table.counts.dtype == np.int64


def test_void_is_removed_from_both_sides():
  true, pred = random_labels(5)
  rng = np.random.default_rng(1)
  void = np.where(rng.random(true.shape) < 0.3, 255, true)
  scores = metrics.score_images(void, pred, ignore=255)
  for i, (t, p) in enumerate(zip(void, pred, strict=True)):
    keep = t != 255
    assert scores.ari[i] == pytest.approx(adjusted_rand_score(t[keep], p[keep]))
    iou = iou_loop(t, p, ignore=255)
    assert scores.mbo[i] == pytest.approx(iou.max(1).mean())
    assert scores.miou[i] == pytest.approx(iou_by_matching(iou))
  # What is predicted there does not matter; without `ignore` it does.
  noisy = np.where(void == 255, 77, pred)
  again = metrics.score_images(void, noisy, ignore=255)
  np.testing.assert_array_equal(again.mbo, scores.mbo)
  assert np.abs(metrics.mean_best_overlap(void, pred) - scores.mbo).min() > 1e-3


def test_overlapping_instances_are_left_out():
  masks = np.zeros((1, 2, 6), bool)
  masks[0, 0, :3] = masks[0, 1, 2:5] = True  # pixel 2 belongs to both
  labels = metrics.labels_from_masks(masks, ignore=255)
  np.testing.assert_array_equal(labels, [[1, 1, 255, 2, 2, 0]])
  pred = np.array([[1, 1, 1, 2, 2, 0]])
  assert metrics.mean_best_overlap(labels, pred, ignore=255)[0] == 1.0
  assert metrics.mean_best_overlap(labels, pred)[0] < 1.0


def test_images_without_objects_are_skipped_and_counted():
  true = np.array([[0, 0, 0, 0], [0, 0, 1, 1], [255, 255, 255, 255]])
  pred = np.array([[0, 0, 1, 1], [0, 0, 1, 1], [0, 1, 2, 3]])
  scores = metrics.score_images(true, pred, ignore=255)
  np.testing.assert_array_equal(scores.fg_ari, [np.nan, 1.0, np.nan])
  np.testing.assert_array_equal(scores.mbo, [np.nan, 1.0, np.nan])
  np.testing.assert_array_equal(scores.miou, [np.nan, 1.0, np.nan])
  np.testing.assert_array_equal(scores.ari, [0.0, 1.0, np.nan])
  summary = metrics.summarise(scores)
  assert (summary["fg_ari"], summary["ari"]) == (1.0, 0.5)
  assert (summary["num_images"], summary["num_skipped"]) == (3, 2)
  nothing = metrics.summarise(metrics.score_images(true[:1], pred[:1]))
  assert math.isnan(nothing["fg_ari"]) and math.isnan(nothing["mbo_object"])
  assert nothing["ari"] == 0.0


def test_per_object_mean_weighs_objects_not_images():
  # Image 0: one object, perfect. Image 1: three objects of one pixel each
  # inside a predicted segment of three: IoU 1/3 each.
  true = np.array([[1, 1, 0, 0], [1, 2, 3, 0]])
  pred = np.array([[1, 1, 0, 0], [1, 1, 1, 0]])
  summary = metrics.summarise(metrics.score_images(true, pred))
  assert summary["mbo"] == pytest.approx((1 + 1 / 3) / 2)
  assert summary["mbo_object"] == pytest.approx((1 + 3 * 1 / 3) / 4)
  assert summary["miou"] == pytest.approx((1 + 1 / 9) / 2)
  # Two values 1 and 1/3: standard deviation (2/3)/sqrt 2, over sqrt 2.
  assert summary["mbo_se"] == pytest.approx(1 / 3)


def test_any_batching_and_padding_gives_the_same_bits():
  true, pred = random_labels(11, shape=(13, 8, 8))
  whole = metrics.summarise(metrics.score_images(true, pred))
  for size in (1, 4, 5):
    parts = []
    for start in range(0, len(true), size):
      rows = slice(start, start + size)
      pad = size - len(true[rows])
      # Padding repeats real images, which must not be counted twice.
      t = np.concatenate([true[rows], true[:pad]])
      p = np.concatenate([pred[rows], pred[:pad]])
      mask = np.arange(size) < size - pad
      parts.append(metrics.score_images(t, p, mask=mask))
    assert metrics.summarise(metrics.merge(parts[::-1])) == whole
  counted_twice = metrics.score_images(t, p)
  assert metrics.summarise(metrics.merge([*parts, counted_twice])) != whole


@pytest.mark.parametrize(
  ("true", "pred"),
  [
    (np.zeros((2, 4, 4), int), np.zeros((2, 4, 5), int)),
    (np.zeros(16, int), np.zeros(16, int)),
    (np.zeros((1, 4, 4), int), np.zeros((1, 4, 4), np.float32)),
  ],
)
def test_bad_labels_are_named(true, pred):
  # Under a run-time shape checker the same mistakes are its TypeError.
  with pytest.raises((UserError, TypeError)):
    metrics.score_images(true, pred)
