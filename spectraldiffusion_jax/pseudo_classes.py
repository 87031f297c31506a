"""Panoptic quality of pseudo-classes that no one has named.

An unsupervised method's classes are matched to the true ones on the very set
that is scored, which flatters every method a little and all alike. A method
declares which of its pseudo-classes are things.

Protocol: Hahn et al., CVPR 2025 (CUPS), section 4, as their code does it.
"""

import math
from collections.abc import Collection, Sequence

import numpy as np
from jaxtyping import Int, Integer
from scipy.optimize import linear_sum_assignment

from spectraldiffusion_jax.panoptic import (
  SegmentTable,
  check_categories,
  panoptic_quality,
  panoptic_scores,
)


def cooccurrence(
  tables: Sequence[SegmentTable],
  *,
  num_pseudo: int,
  num_classes: int,
  void: int = 255,
) -> Int[np.ndarray, "P C"]:
  """Pixels of each pseudo-class on each true class, void on neither side.

  Counts of several batches or processes add up.
  """
  total = np.zeros((num_pseudo, num_classes), np.int64)
  for table in tables:
    true, pred = table.true[:, 0], table.pred[:, 0]
    check_categories("true", true, count=num_classes, void=void)
    check_categories("pred", pred, count=num_pseudo, void=void)
    counts = table.counts[true != void][:, pred != void].T
    index = np.ix_(pred[pred != void], true[true != void])
    np.add.at(total, index, counts)
  return total


def match_pseudo_classes(
  counts: Integer[np.ndarray, "P C"],
  *,
  things: Collection[int] = (),
  pseudo_things: Collection[int] | None = None,
  many_to_one: bool = True,
  void: int = 255,
) -> Int[np.ndarray, " P"]:
  """Class of each pseudo-class, fitted on the set that is being scored.

  Hungarian matching that maximises shared pixels, separately within things
  and stuff; pseudo-classes left over go to the class of their group that they
  share most pixels with.

  Args:
    counts: co-occurrence over the whole set.
    things: true classes that are things.
    pseudo_things: pseudo-classes declared things, the others being stuff;
      None: one matching over all classes, as for mIoU and accuracy.
    many_to_one: False maps left-over pseudo-classes to `void`.
    void: what an unmapped pseudo-class becomes.

  Returns:
    [P] class ids or `void`.
  """
  pseudo, classes = (np.arange(n) for n in counts.shape)
  groups = [(pseudo, classes)]
  if pseudo_things is not None:
    declared = np.isin(pseudo, list(pseudo_things))
    thing = np.isin(classes, list(things))
    groups = [
      (pseudo[declared], classes[thing]),
      (pseudo[~declared], classes[~thing]),
    ]
  mapping = np.full(len(pseudo), void, np.int64)
  for rows, columns in groups:
    if not len(rows) or not len(columns):
      continue
    block = counts[np.ix_(rows, columns)]
    if many_to_one:
      mapping[rows] = columns[block.argmax(1)]
    i, j = linear_sum_assignment(block, maximize=True)
    mapping[rows[i]] = columns[j]
  return mapping


def relabel(
  table: SegmentTable, mapping: Integer[np.ndarray, " P"], *, void: int = 255
) -> SegmentTable:
  """Table with each predicted pseudo-class replaced by its class.

  Segments stay apart when several pseudo-classes become one thing class.
  """
  category = table.pred[:, 0]
  lookup = np.append(mapping, void)
  mapped = lookup[np.where(category == void, len(mapping), category)]
  instances = np.arange(len(mapped))
  return table._replace(pred=np.stack([mapped, instances], 1))


def unsupervised_panoptic_quality(
  tables: Sequence[SegmentTable],
  *,
  num_pseudo: int,
  num_classes: int,
  things: Collection[int],
  pseudo_things: Collection[int] | None,
  void: int = 255,
  rules: str = "panopticapi",
) -> dict[str, float | np.ndarray]:
  """Scores of a method whose classes have no names, by CUPS's protocol.

  Co-occurrence over the whole set, `match_pseudo_classes`, then PQ of the
  relabelled maps; `rules="torchmetrics"` for comparison with CUPS's figures.
  mIoU and accuracy use a matching of their own, not split into things and
  stuff, over pixels that are void on neither side.

  Returns:
    `panoptic_quality`'s entries, `miou`, `accuracy`, and `mapping` [P].
  """
  counts = cooccurrence(
    tables, num_pseudo=num_pseudo, num_classes=num_classes, void=void
  )
  mapping = match_pseudo_classes(
    counts, things=things, pseudo_things=pseudo_things, void=void
  )
  scores = panoptic_scores(
    [relabel(table, mapping, void=void) for table in tables],
    num_classes=num_classes,
    things=things,
    void=void,
    rules=rules,
  )
  confusion = np.zeros((num_classes, num_classes), np.int64)
  np.add.at(confusion, match_pseudo_classes(counts), counts)
  hits, union = np.diag(confusion), confusion.sum(0) + confusion.sum(1)
  present = union > 0
  iou = hits[present] / (union - hits)[present]
  return panoptic_quality(scores, things=things) | {
    "miou": float(iou.mean()) if len(iou) else math.nan,
    "accuracy": hits.sum() / counts.sum() if counts.any() else math.nan,
    "mapping": mapping,
  }
