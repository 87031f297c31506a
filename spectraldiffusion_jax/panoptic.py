"""Panoptic quality, by the rules of panopticapi or of torchmetrics.

A panoptic map is two integer maps: category [H W] and instance [H W]. Each
(category, instance) of a thing class is one segment; a stuff class is one
segment an image, whatever its instance ids. `void` marks unlabelled pixels.

One image is reduced once to a `SegmentTable`, from which every rule, class
mapping and co-occurrence count is computed without the maps, so a whole split
stays in memory. Scores are one row per image, merged by `metrics.merge`.

Kirillov et al., Panoptic segmentation, CVPR 2019, section 4.
"""

import math
from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, Integer

from spectraldiffusion_jax.errors import UserError
from spectraldiffusion_jax.metrics import distinct, merge

RULES = ("panopticapi", "torchmetrics")


class SegmentTable(NamedTuple):
  """Segments of one image and the pixels they share; void is a segment."""

  counts: Int[np.ndarray, "T P"]  # pixels, int64
  true: Int[np.ndarray, "T 2"]  # (category, instance) of each row
  pred: Int[np.ndarray, "P 2"]  # (category, instance) of each column
  crowd: Bool[np.ndarray, " T"]  # rows that are groups, not single objects


class PanopticScores(NamedTuple):
  """Matches of each class in each image."""

  iou: Float[np.ndarray, "B C"]  # summed over the true positives
  tp: Int[np.ndarray, "B C"]
  fp: Int[np.ndarray, "B C"]
  fn: Int[np.ndarray, "B C"]


def segment_table(
  true_category: Integer[np.ndarray, "H W"],
  true_instance: Integer[np.ndarray, "H W"],
  pred_category: Integer[np.ndarray, "H W"],
  pred_instance: Integer[np.ndarray, "H W"],
  *,
  crowd: Bool[np.ndarray, "H W"] | None = None,
) -> SegmentTable:
  """Segments of both sides and how many pixels each pair shares.

  Args:
    true_category: class of each pixel, or void.
    true_instance: any ids that tell things of one class apart.
    pred_category: predicted class or pseudo-class of each pixel, or void.
    pred_instance: like `true_instance`.
    crowd: True on regions that are groups of things; those of one class form
      one crowd segment.

  Raises:
    UserError: the four maps differ in shape.
  """
  maps = [true_category, true_instance, pred_category, pred_instance]
  if len({np.shape(m) for m in maps}) != 1:
    shapes = ", ".join(str(list(np.shape(m))) for m in maps)
    raise UserError(f"panoptic maps must have one shape, got {shapes}")
  none = np.zeros(np.shape(true_category), bool)
  crowd = none if crowd is None else crowd
  # One crowd segment a class: instance ids mean nothing there.
  true_instance = np.where(crowd, 0, true_instance)
  true, rows = _segments(true_category, true_instance, crowd)
  pred, columns = _segments(pred_category, pred_instance, none)
  shape = (len(true), len(pred))
  counts = np.bincount(rows * shape[1] + columns, minlength=math.prod(shape))
  return SegmentTable(
    counts.reshape(shape), true[:, :2], pred[:, :2], true[:, 2] > 0
  )


def panoptic_scores(
  tables: Sequence[SegmentTable],
  *,
  num_classes: int,
  things: Collection[int],
  void: int = 255,
  rules: str = "panopticapi",
) -> PanopticScores:
  """Matches per image and class.

  A predicted and a true segment of one class match iff IoU > 1/2, where true
  void is taken out of the union. An unmatched prediction with more than half
  of its pixels on void (or on a crowd of its class) is no false positive, a
  crowd never a false negative. That is `rules="panopticapi"`. The rules
  "torchmetrics", CUPS's, forgive *predicted* void as well: it too leaves the
  union, and a true segment of which more than half is predicted void is no
  false negative. They know no crowd.

  Args:
    tables: one per image, categories in 0..num_classes-1 or void.
    num_classes: C.
    things: classes that have instances; the others are stuff.
    void: category of unlabelled pixels and of mapped-away predictions.
    rules: "panopticapi" or "torchmetrics".

  Raises:
    UserError: unknown rules, a category outside the classes, or crowds under
      rules that know none.
  """
  if rules not in RULES:
    raise UserError(f"rules={rules!r} is not one of {', '.join(RULES)}")
  empty = np.zeros((0, num_classes))
  rows = [PanopticScores(empty, *[empty.astype(np.int64)] * 3)]
  for table in tables:
    if rules == "torchmetrics" and table.crowd.any():
      raise UserError(
        "rules='torchmetrics' know no crowd: set crowd pixels to void first"
      )
    for name, ids in (("true", table.true), ("pred", table.pred)):
      check_categories(name, ids[:, 0], count=num_classes, void=void)
    table = _canonical(table, things)
    rows.append(_score(table, num_classes, void, rules == "torchmetrics"))
  return merge(rows)


def panoptic_quality(
  scores: PanopticScores, *, things: Collection[int]
) -> dict[str, float | np.ndarray]:
  """PQ = SQ RQ over a set.

  Per class, over all images: SQ = sum IoU / TP (0 without a match) and
  RQ = TP / (TP + FP/2 + FN/2). Means leave out classes with TP + FP + FN = 0.

  Returns:
    `pq`, `sq`, `rq` and the same with `_things` and `_stuff`: means, NaN for
    an empty group; `num_classes`: classes that count; `pq_per_class`,
    `sq_per_class`, `rq_per_class`: [C], NaN for classes that do not.
  """
  # fsum: the result does not depend on the order or split of the images.
  iou = np.array([math.fsum(column) for column in scores.iou.T])
  tp, fp, fn = (field.sum(0) for field in scores[1:])
  seen = tp + fp + fn > 0
  weight = np.where(seen, tp + (fp + fn) / 2, np.nan)
  sq = np.where(seen, iou / np.maximum(tp, 1), np.nan)
  per_class = {"pq": iou / weight, "sq": sq, "rq": tp / weight}
  is_thing = np.isin(np.arange(len(tp)), list(things))
  groups = {"": seen, "_things": seen & is_thing, "_stuff": seen & ~is_thing}
  out = {}
  for name, values in per_class.items():
    out[f"{name}_per_class"] = values
    for suffix, group in groups.items():
      total, count = math.fsum(values[group]), int(group.sum())
      out[name + suffix] = total / count if count else math.nan
  return out | {"num_classes": int(seen.sum())}


def check_categories(
  name: str, categories: Integer[np.ndarray, " N"], *, count: int, void: int
) -> None:
  """UserError unless every category is void or in 0..count-1."""
  if 0 <= void < count:
    raise UserError(f"void={void} is one of the {count} classes; use -1")
  known = (categories == void) | ((categories >= 0) & (categories < count))
  if not known.all():
    raise UserError(
      f"{name} category {categories[~known][0]} is neither one of the "
      f"{count} classes 0..{count - 1} nor void={void}; map the ids first"
    )


def _segments(category, instance, crowd):
  """(category, instance, crowd) of each segment, and each pixel's segment."""
  categories, i = distinct(np.reshape(category, -1))
  instances, j = distinct(np.reshape(instance, -1))
  keys, ranks = distinct((i * len(instances) + j) * 2 + np.reshape(crowd, -1))
  i, j = np.divmod(keys // 2, len(instances))
  return np.stack([categories[i], instances[j], keys % 2], 1), ranks


def _canonical(table, things) -> SegmentTable:
  """Join what is one segment: all pixels of a stuff class, and of void."""

  def join(ids, extra):
    is_thing = np.isin(ids[:, 0], list(things))
    keys = np.stack([ids[:, 0], np.where(is_thing, ids[:, 1], 0), extra], 1)
    keys, ranks = np.unique(keys, axis=0, return_inverse=True)
    return keys, (np.arange(len(keys))[:, None] == ranks).astype(np.int64)

  true, rows = join(table.true, table.crowd)
  pred, columns = join(table.pred, np.zeros(len(table.pred), np.int64))
  counts = rows @ table.counts @ columns.T
  return SegmentTable(counts, true[:, :2], pred[:, :2], true[:, 2] > 0)


def _score(table, num_classes, void, forgive_predicted_void):
  """Matches of each class in one image, [1 C] each."""
  counts, crowd = table.counts, table.crowd
  true, pred = table.true[:, 0], table.pred[:, 0]
  area_true, area_pred = counts.sum(1), counts.sum(0)
  on_void = counts[true == void].sum(0)  # of each prediction
  as_void = counts[:, pred == void].sum(1) * forgive_predicted_void
  same = true[:, None] == pred[None]
  on_crowd = (counts * (same & crowd[:, None])).sum(0)
  union = (area_true - as_void)[:, None] + (area_pred - on_void)[None] - counts
  real = (true != void) & ~crowd
  # Integers: an IoU of exactly one half is no match.
  match = same & real[:, None] & (2 * counts > union)
  missed = real & ~match.any(1) & (2 * as_void <= area_true)
  wrong = (pred != void) & ~match.any(0)
  wrong &= 2 * (on_void + on_crowd) <= area_pred
  t, p = np.nonzero(match)

  def per_class(categories, weights=None):
    return np.bincount(categories, weights, minlength=num_classes)[None]

  return PanopticScores(
    per_class(true[t], counts[t, p] / union[t, p]),
    per_class(true[t]),
    per_class(pred[wrong]),
    per_class(true[missed]),
  )
