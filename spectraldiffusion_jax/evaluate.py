"""Scores a segmentation function over a split, exactly and on any mesh.

One function serves validation during training, launch/evaluate.py and the
tables of the documentation: images in, label maps out, scored on the host in
float64 against the truth at the truth's resolution.
"""

import json
import math
import pathlib
import re
import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from spectraldiffusion_jax import metrics, sharding
from spectraldiffusion_jax.errors import UserError
from spectraldiffusion_jax.types import Batch, ModelOutput

Segment = Callable[[jax.Array], jax.Array]
"""image [B H W 3], sharded by rows -> labels [B H W] uint8, likewise."""


class Evaluation(NamedTuple):
  """Scores of a split."""

  summary: dict[str, float]
  scores: metrics.ImageScores  # a row an image, in the split's order
  seconds: float  # wall time, compilation included


def labels_of(output: ModelOutput) -> jax.Array:
  """Label maps [B H W] uint8: the slot with the largest mask."""
  return jnp.argmax(output.masks, axis=1).astype(jnp.uint8)


def _gather(
  scores: metrics.ImageScores, mesh: Mesh, batches: int
) -> metrics.ImageScores:
  """Rows of all processes, in the split's order: batch by batch.

  As bytes, for JAX would round float64 to float32.
  """
  fields = []
  for field in scores:
    bits = np.ascontiguousarray(field).view(np.uint8)
    bits = bits.reshape(batches, -1, field.itemsize)
    every = sharding.gather_rows(bits.swapaxes(0, 1), mesh).swapaxes(0, 1)
    fields.append(np.ascontiguousarray(every).view(field.dtype).reshape(-1))
  return metrics.ImageScores(*fields)


def evaluate(
  segment: Segment, batches: Iterable[Batch], *, mesh: Mesh
) -> Evaluation:
  """Runs `segment` over `batches` and scores every unpadded image.

  Raises:
    UserError: the split has no truth, or no images.
  """
  start = time.perf_counter()
  rows = []
  for batch in batches:
    if "segmentation" not in batch:
      raise UserError("data.dataset has no segmentation to score against")
    image = sharding.shard_batch({"image": batch["image"]}, mesh)["image"]
    predicted = sharding.local_rows(segment(image)).astype(np.int64)
    rows.append(
      metrics.score_images(batch["segmentation"], predicted, mask=batch["mask"])
    )
  if not rows:
    raise UserError("the split holds no images: choose a larger one")
  scores = _gather(metrics.merge(rows), mesh, len(rows))
  return Evaluation(
    summary=metrics.summarise(scores),
    scores=scores,
    seconds=time.perf_counter() - start,
  )


def report_name(dataset: str, split: str) -> str:
  """DATASET_SPLIT.json, with what a file name cannot hold replaced by `-`."""

  def clean(text: str) -> str:
    return re.sub(r"[^\w.%+-]+", "-", text).strip("-")

  return f"{clean(dataset)}_{clean(split)}.json"


def write_report(path: pathlib.Path, report: dict) -> None:
  """Writes JSON; what was not scored (NaN) becomes null."""
  path.parent.mkdir(parents=True, exist_ok=True)
  plain = {
    k: None if isinstance(v, float) and math.isnan(v) else v
    for k, v in report.items()
  }
  path.write_text(json.dumps(plain, indent=2, sort_keys=True) + "\n")


def table(columns: dict[str, dict[str, float]]) -> str:
  """A text table: one row a metric, one column a segmentation function."""
  names = ("fg_ari", "ari", "mbo", "miou")
  lines = ["metric   " + "".join(f"{name:>22}" for name in columns)]
  for name in names:
    cells = [
      f"{c[name]:.4f} +- {c[f'{name}_se']:.4f}" for c in columns.values()
    ]
    lines.append(f"{name:<9}" + "".join(f"{cell:>22}" for cell in cells))
  first = next(iter(columns.values()))
  lines.append(
    f"{first['num_images']} images, {first['num_objects']} objects, "
    f"{first['num_segments']} segments of the first, background included, "
    f"{first['num_skipped']} images without objects left out of the means"
  )
  return "\n".join(lines)
