"""The unsupervised protocol: matching, left-overs, relabelling, PQ."""

import itertools

import numpy as np
import pytest

from spectraldiffusion_jax import panoptic, pseudo_classes
from spectraldiffusion_jax.errors import UserError

VOID = 255
MATCH = pseudo_classes.match_pseudo_classes


def table(true, pred, true_instance=None, pred_instance=None):
  true, pred = np.array([true]), np.array([pred])
  zeros = np.zeros_like(true)
  return panoptic.segment_table(
    true,
    zeros if true_instance is None else np.array([true_instance]),
    pred,
    zeros if pred_instance is None else np.array([pred_instance]),
  )


def test_cooccurrence_counts_pixels_and_leaves_void_out():
  rng = np.random.default_rng(0)
  true = rng.choice([0, 1, 2, VOID], (3, 40))
  pred = rng.choice([0, 1, 2, 3, VOID], (3, 40))
  instance = rng.integers(0, 5, (2, 3, 40))
  tables = [table(*maps) for maps in zip(true, pred, *instance, strict=True)]
  expected = np.zeros((4, 3), int)
  for t, p in zip(true.flat, pred.flat, strict=True):
    if VOID not in (t, p):
      expected[p, t] += 1
  counts = pseudo_classes.cooccurrence(tables, num_pseudo=4, num_classes=3)
  np.testing.assert_array_equal(counts, expected)
  with pytest.raises(UserError, match="pred category 3"):
    pseudo_classes.cooccurrence(tables, num_pseudo=3, num_classes=3)


def test_matching_maximises_shared_pixels():
  rng = np.random.default_rng(1)
  counts = rng.integers(0, 100, (4, 4))
  mapping = MATCH(counts)
  shared = counts[np.arange(4), mapping].sum()
  assert shared == max(
    counts[np.arange(4), order].sum()
    for order in map(list, itertools.permutations(range(4)))
  )


def test_things_and_stuff_are_matched_apart_and_leftovers_join():
  #          thing0 thing1 stuff2
  counts = [
    [50, 0, 0],  # thing
    [40, 9, 90],  # thing: its best class is stuff, which it may not take
    [30, 1, 5],  # thing, left over: joins its best thing class, 0
    [70, 60, 1],  # stuff: the only stuff class, however little they share
  ]
  options = {"things": {0, 1}, "pseudo_things": {0, 1, 2}}
  np.testing.assert_array_equal(
    MATCH(np.array(counts), **options), [0, 1, 0, 2]
  )
  np.testing.assert_array_equal(
    MATCH(np.array(counts), **options, many_to_one=False), [0, 1, VOID, 2]
  )
  # Negative control: one matching over all classes decides otherwise.
  np.testing.assert_array_equal(MATCH(np.array(counts)), [0, 2, 0, 1])


def test_fewer_pseudo_classes_than_classes():
  counts = np.array([[1, 9, 3], [2, 8, 0]])
  np.testing.assert_array_equal(MATCH(counts), [1, 0])
  # A group without classes, or without pseudo-classes, maps to void.
  mapping = MATCH(counts, things=(), pseudo_things={0})
  np.testing.assert_array_equal(mapping, [VOID, 1])


def test_relabel_keeps_things_of_two_pseudo_classes_apart():
  # Pseudo-classes 0 and 1 both become thing 0, with the same instance id.
  t = table([0, 0, 0, 0], [0, 0, 1, 1], [1, 1, 2, 2], [7, 7, 7, 7])
  mapped = pseudo_classes.relabel(t, np.array([0, 0]))
  scores = panoptic.panoptic_scores([mapped], num_classes=1, things={0})
  assert scores.tp[0, 0] == 2 and scores.fp[0, 0] == 0
  # As stuff they are one segment again.
  scores = panoptic.panoptic_scores([mapped], num_classes=1, things=())
  assert scores.tp[0, 0] == 1 and scores.iou[0, 0] == 1.0


def test_renamed_truth_scores_one():
  rng = np.random.default_rng(2)
  names = np.array([3, 1, 0, 2])  # class -> pseudo-class
  tables = []
  for _ in range(4):
    category = rng.permutation(np.repeat([0, 1, 2, 3], 8))
    instance = rng.integers(0, 3, 32)
    tables.append(table(category, names[category], instance, instance))
  options = {"num_pseudo": 4, "num_classes": 4, "things": {0, 1}}
  out = pseudo_classes.unsupervised_panoptic_quality(
    tables, **options, pseudo_things={3, 1}
  )
  assert out["pq"] == out["miou"] == out["accuracy"] == 1.0
  np.testing.assert_array_equal(names[out["mapping"]], np.arange(4))
  # Declared the wrong way round nothing can match; mIoU does not mind.
  wrong = pseudo_classes.unsupervised_panoptic_quality(
    tables, **options, pseudo_things={0, 2}
  )
  assert wrong["pq"] == 0 and wrong["miou"] == 1.0


def test_protocol_by_hand():
  # Two images of four pixels, stuff classes 0 and 1, pseudo-classes 0, 1, 2.
  # Shared pixels: pseudo 0 (3, 0), 1 (0, 2), 2 (1, 1); one true void pixel.
  # 0 -> 0, 1 -> 1, the left-over 2 -> argmax, the first of equals, 0.
  tables = [
    table([0, 0, 0, 1], [0, 0, 0, 2]),
    table([1, 1, 0, VOID], [1, 1, 2, 0]),
  ]
  out = pseudo_classes.unsupervised_panoptic_quality(
    tables, num_pseudo=3, num_classes=2, things=(), pseudo_things=()
  )
  np.testing.assert_array_equal(out["mapping"], [0, 1, 0])
  # Image 1: class 0 IoU 3/4, class 1 missed. Image 2: class 1 IoU 1, class 0
  # on pixels 2 and 3, of which 3 is void: IoU 1/1.
  # PQ_0 = (3/4 + 1)/2 = 7/8; PQ_1 = 1/(1 + 1/2) = 2/3.
  assert out["pq"] == pytest.approx((7 / 8 + 2 / 3) / 2)
  # Confusion over 7 pixels: 4 right of class 0, 1 of class 1 called 0, 2 right.
  assert out["accuracy"] == pytest.approx(6 / 7)
  assert out["miou"] == pytest.approx((4 / 5 + 2 / 3) / 2)
