"""Preparing a data set by name, and the table that says what is in it."""

import os
import pathlib
import re
import shutil
import time
from collections.abc import Iterable

import numpy as np
import tensorflow_datasets as tfds

from spectraldiffusion_jax.data import clevr_with_masks, sources
from spectraldiffusion_jax.errors import UserError


def prepare(
  dataset: str,
  *,
  data_root: str | os.PathLike,
  source: str | os.PathLike | None = None,
  overwrite: bool = False,
) -> str:
  """Prepares a data set under data_root and returns its summary.

  Args:
    dataset: "clevr_with_masks" or "procedural_clevr/NAME".
    data_root: folder of prepared data sets.
    source: file or folder that clevr_with_masks reads.
    overwrite: replace a data set that is already there.

  Returns:
    A table of splits, examples, sizes, objects and checked source files.

  Raises:
    UserError: unknown data set, no or bad source, or already prepared.
  """
  start = time.monotonic()
  family, _, name = dataset.partition("/")
  if family == "procedural_clevr":
    builder = _procedural(name, data_root, overwrite=overwrite)
  elif dataset == "clevr_with_masks":
    if not source:
      raise UserError(
        "--source is required for clevr_with_masks: the folder or file of"
        f" {clevr_with_masks.PATTERN}"
      )
    builder = clevr_with_masks.prepare(source, data_root, overwrite=overwrite)
  else:
    raise UserError(
      f"dataset={dataset!r} is unknown; choose clevr_with_masks or"
      " procedural_clevr/NAME"
    )
  return summary(builder, seconds=time.monotonic() - start)


def summary(builder: tfds.core.DatasetBuilder, *, seconds: float) -> str:
  """Returns a table of what a prepared data set holds."""
  rows = [("split", "examples", "MB", "scenes by number of objects")]
  for name, split in builder.info.splits.items():
    counts = sources.TfdsSource(builder, name).num_objects()
    size = f"{split.num_bytes / 1e6:.1f}"
    rows.append((name, str(split.num_examples), size, _histogram(counts)))
  checked = [
    f"{entry['name']}: {entry['records']} records checked,"
    f" sha256 {entry['sha256']}"
    for split in (builder.info.metadata or {}).values()
    if isinstance(split, dict)
    for entry in split.get("sources", ())
  ]
  head = f"{builder.info.full_name} in {builder.data_dir}, {seconds:.1f} s"
  return "\n".join([head, *_table(rows), *checked])


def _procedural(
  name: str, data_root: str | os.PathLike, *, overwrite: bool
) -> tfds.core.DatasetBuilder:
  from spectraldiffusion_jax.data import procedural_clevr

  folder = pathlib.Path(data_root) / "procedural_clevr" / name
  if re.fullmatch(r"\w+", name) and folder.exists():
    if not overwrite:
      raise UserError(
        f"procedural_clevr/{name} is already prepared at {folder}; pass"
        " --overwrite to replace it"
      )
    shutil.rmtree(folder)
  return procedural_clevr.prepare(name, data_root)


def _histogram(counts: np.ndarray) -> str:
  values, times = np.unique(counts, return_counts=True)
  return "  ".join(f"{v}: {n}" for v, n in zip(values, times, strict=True))


def _table(rows: Iterable[tuple[str, ...]]) -> list[str]:
  """Aligns the columns; the last one is left as it is."""
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  return [
    "  ".join(
      cell.ljust(width) for cell, width in zip(row, widths, strict=True)
    ).rstrip()
    for row in rows
  ]
