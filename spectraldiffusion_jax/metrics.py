"""Segmentation scores per image, exact in int64 and float64, and their means.

Label maps are integers [B ...]: one id a pixel, background 0. One contingency
table per image feeds every score. Scores of a set are kept as one row per
image (`ImageScores`), so that merging batches or processes is concatenation
and the summary, which sums with `math.fsum`, is the same to the last bit for
every batch size, order and number of processes.

What is skipped: an image without a labelled object has no FG-ARI, mBO or
mIoU (NaN, and counted in `num_skipped`; common code scores it 1 instead), an
image whose every pixel is ignored has no ARI either.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple, TypeAlias, TypeVar

import numpy as np
from jaxtyping import Bool, Float, Int, Integer
from scipy.optimize import linear_sum_assignment

from spectraldiffusion_jax.errors import UserError

Labels: TypeAlias = Integer[np.ndarray, "B ..."]
"""One integer a pixel for each image of a batch, of any spatial shape."""

AVERAGED = ("fg_ari", "ari", "mbo", "miou")


class Contingency(NamedTuple):
  """Pixels shared by each true and each predicted segment of one image."""

  counts: Int[np.ndarray, "T P"]  # int64, no empty row or column
  true_ids: Int[np.ndarray, " T"]  # ascending labels of the rows
  pred_ids: Int[np.ndarray, " P"]  # ascending labels of the columns


class ImageScores(NamedTuple):
  """One row per image; NaN where an image has nothing to score."""

  mask: Bool[np.ndarray, " B"]  # False for rows that only pad a batch
  ari: Float[np.ndarray, " B"]  # adjusted Rand index over all pixels
  fg_ari: Float[np.ndarray, " B"]  # the same over true object pixels
  mbo: Float[np.ndarray, " B"]  # mean best overlap of the image's objects
  miou: Float[np.ndarray, " B"]  # mean IoU under one-to-one matching
  overlap_sum: Float[np.ndarray, " B"]  # sum of best overlaps, for mbo_object
  num_objects: Int[np.ndarray, " B"]
  num_segments: Int[np.ndarray, " B"]  # predicted, the background's included


Rows = TypeVar("Rows", bound=tuple)


def distinct(
  labels: Integer[np.ndarray, " N"],
) -> tuple[Int[np.ndarray, " R"], Int[np.ndarray, " N"]]:
  """Distinct labels, ascending, and each element's rank among them.

  `np.unique(labels, return_inverse=True)`, but a table instead of a sort
  where the ids are small enough: 20 times faster on label maps.
  """
  labels = labels.astype(np.int64)
  low = labels.min(initial=np.iinfo(np.int64).max)
  high = labels.max(initial=np.iinfo(np.int64).min)
  # Python integers, because the difference of two int64 may not fit in one.
  if not labels.size or int(high) - int(low) > 4 * labels.size + 1024:
    ids, ranks = np.unique(labels, return_inverse=True)
    return ids, ranks
  present = np.zeros(high - low + 1, bool)
  present[labels - low] = True
  return np.flatnonzero(present) + low, (present.cumsum() - 1)[labels - low]


def contingency(
  true: Integer[np.ndarray, "..."], pred: Integer[np.ndarray, "..."]
) -> Contingency:
  """Contingency table of two label maps of one image, of equal shape."""
  true_ids, rows = distinct(true.reshape(-1))
  pred_ids, columns = distinct(pred.reshape(-1))
  shape = (len(true_ids), len(pred_ids))
  counts = np.bincount(rows * shape[1] + columns, minlength=math.prod(shape))
  return Contingency(counts.reshape(shape), true_ids, pred_ids)


def rand_index(counts: Integer[np.ndarray, "T P"]) -> float:
  """Adjusted Rand index of one contingency table, correctly rounded.

  With margins a, b, total n, r = sum n_ij (n_ij - 1), alpha = sum a (a - 1),
  beta = sum b (b - 1), N = n (n - 1) and E = alpha beta / N:

    ARI = (r - E) / ((alpha + beta) / 2 - E)

  in [-1/2, 1], evaluated as one fraction of Python integers. A zero
  denominator (both sides one cluster, both all singletons, n <= 1) gives 1.

  Hubert and Arabie, Comparing partitions, 1985.
  """

  def pairs(sizes) -> int:
    return int((sizes * (sizes - 1)).sum())

  counts = counts.astype(np.int64)
  n = int(counts.sum())
  total, both = n * (n - 1), pairs(counts)
  alpha, beta = pairs(counts.sum(1)), pairs(counts.sum(0))
  denominator = (alpha + beta) * total - 2 * alpha * beta
  if denominator == 0:
    return 1.0
  return 2 * (both * total - alpha * beta) / denominator


def overlaps(counts: Integer[np.ndarray, "T P"]) -> Float[np.ndarray, "T P"]:
  """IoU of each true with each predicted segment; 0 for an empty union."""
  union = counts.sum(1)[:, None] + counts.sum(0)[None] - counts
  return counts / np.maximum(union, 1)


def adjusted_rand_index(
  true: Labels, pred: Labels, *, ignore: int | None = None
) -> Float[np.ndarray, " B"]:
  """ARI per image over all pixels, the background counting as a segment.

  Args:
    true: ground-truth labels.
    pred: predicted labels; only the partition matters, not the ids.
    ignore: true label of void pixels, removed from both sides.

  Returns:
    Float64 in [-1/2, 1]; NaN where every pixel is void.
  """
  return score_images(true, pred, ignore=ignore).ari


def foreground_ari(
  true: Labels, pred: Labels, *, background: int = 0, ignore: int | None = None
) -> Float[np.ndarray, " B"]:
  """FG-ARI per image: ARI over pixels whose *true* label is an object.

  Predictions are not filtered. An image with one true object scores 0 or 1;
  an image without any is NaN. Greff et al., ICML 2019; the convention of
  Locatello et al., NeurIPS 2020.
  """
  return score_images(true, pred, background=background, ignore=ignore).fg_ari


def mean_best_overlap(
  true: Labels, pred: Labels, *, background: int = 0, ignore: int | None = None
) -> Float[np.ndarray, " B"]:
  """MBO per image: mean over true objects of the best IoU with a prediction.

  Instance labels give mBO^i, semantic ones mBO^c; NaN without objects.
  Pont-Tuset et al., PAMI 2017.
  """
  return score_images(true, pred, background=background, ignore=ignore).mbo


def mean_iou(
  true: Labels, pred: Labels, *, background: int = 0, ignore: int | None = None
) -> Float[np.ndarray, " B"]:
  """Mean IoU per image under the one-to-one matching that maximises it.

  Divided by the number of true objects: an unmatched one counts as 0. NaN
  without objects.
  """
  return score_images(true, pred, background=background, ignore=ignore).miou


def labels_from_masks(
  masks: Bool[np.ndarray, "B T ..."], *, ignore: int
) -> Int[np.ndarray, "B ..."]:
  """Label map of possibly overlapping instance masks.

  Mask i becomes label i + 1, uncovered pixels 0 and pixels of two or more
  masks `ignore`, so that scoring with the same `ignore` leaves them out.
  """
  ids = np.arange(1, masks.shape[1] + 1)
  labels = np.einsum("bt...,t->b...", masks.astype(np.int64), ids)
  return np.where(masks.sum(1) > 1, ignore, labels)


def score_images(
  true: Labels,
  pred: Labels,
  *,
  mask: Bool[np.ndarray, " B"] | None = None,
  background: int = 0,
  ignore: int | None = None,
) -> ImageScores:
  """Every score of every image of a batch.

  Args:
    true: ground-truth labels.
    pred: predicted labels, at the truth's resolution.
    mask: False for rows that only pad the batch: their scores are NaN and
      `summarise` leaves them out. None: every row counts.
    background: the true label that is no object.
    ignore: true label of void pixels, removed from both sides.

  Returns:
    One row per image of the batch, padding included.

  Raises:
    UserError: shapes differ or labels are not integers.
  """
  mask = np.ones(len(true), bool) if mask is None else np.asarray(mask, bool)
  rows = []
  for valid, table in zip(mask, _tables(true, pred, ignore), strict=True):
    objects = table.true_ids != background
    iou = overlaps(table.counts)[objects]
    best = iou.max(1, initial=0)
    row = (
      _ari(table.counts),
      _ari(table.counts[objects]),
      _mean(best),
      _mean(_matched(iou)),
      math.fsum(best),
    )
    row += len(iou), len(table.pred_ids)
    rows.append(row if valid else (*[math.nan] * 5, 0, 0))
  *scores, objects, segments = np.array(rows, float).reshape(-1, 7).T
  return ImageScores(
    mask, *scores, objects.astype(np.int64), segments.astype(np.int64)
  )


def merge(parts: Sequence[Rows]) -> Rows:
  """Concatenate rows of several batches or processes.

  To move rows between processes without losing bits send each field's
  `.view(numpy.uint32)`: JAX collectives round float64 to float32.
  """
  return type(parts[0])(*map(np.concatenate, zip(*parts, strict=True)))


def summarise(scores: ImageScores) -> dict[str, float]:
  """Means over a set of images.

  Returns:
    `fg_ari`, `ari`, `mbo` and `miou`: means over the images that have the
    score; each with `NAME_se`, its standard error; `mbo_object`: mean over
    all objects of the set; `num_images`; `num_objects`; `num_segments`,
    predicted; `num_skipped`: images without a labelled object. NaN: no score.
  """
  rows = ImageScores(*(field[scores.mask] for field in scores))
  count = int(rows.num_objects.sum())
  out = {}
  for name in AVERAGED:
    values = getattr(rows, name)
    values = values[~np.isnan(values)]
    out[name] = _mean(values)
    out[f"{name}_se"] = _standard_error(values)
  out["mbo_object"] = math.fsum(rows.overlap_sum) / count if count else math.nan
  out["num_images"] = len(rows.mask)
  out["num_objects"] = count
  out["num_segments"] = int(rows.num_segments.sum())
  out["num_skipped"] = int((rows.num_objects == 0).sum())
  return out


def _tables(true, pred, ignore) -> Iterator[Contingency]:
  """Contingency table of each image, void pixels left out."""
  true, pred = np.asarray(true), np.asarray(pred)
  if true.shape != pred.shape or true.ndim < 2:
    raise UserError(
      f"true {list(true.shape)} and pred {list(pred.shape)} must be label "
      "maps of equal shape [B H W]; resize the prediction to the truth"
    )
  if true.dtype.kind not in "iu" or pred.dtype.kind not in "iu":
    raise UserError(
      f"labels must be integers, got true {true.dtype} and pred {pred.dtype}; "
      "take the argmax over slots first"
    )
  for t, p in zip(true, pred, strict=True):
    keep = ... if ignore is None else t != ignore
    yield contingency(t[keep], p[keep])


def _ari(counts) -> float:
  return rand_index(counts) if counts.any() else math.nan


def _matched(iou):
  """IoU of the matched pairs, padded with 0 for unmatched true objects."""
  out = np.zeros(len(iou))
  rows, columns = linear_sum_assignment(iou, maximize=True)
  out[rows] = iou[rows, columns]
  return out


def _mean(values) -> float:
  return math.fsum(values) / len(values) if len(values) else math.nan


def _standard_error(values) -> float:
  """Standard deviation over the root of the count; NaN below two values."""
  n = len(values)
  if n < 2:
    return math.nan
  mean = _mean(values)
  return math.sqrt(math.fsum((values - mean) ** 2) / (n - 1) / n)
