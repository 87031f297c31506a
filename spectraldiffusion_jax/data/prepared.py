"""Prepared TFDS data sets on disk: where one is, and opening it safely."""

import json
import pathlib
import re
from collections.abc import Iterable

import tensorflow_datasets as tfds

from spectraldiffusion_jax.errors import UserError

NAMED = ("pythonClassName", "python_class_name", "type")
OWN = r"tensorflow_datasets\.core\.features\.[\w.]+"


def folder_of(dataset: str, root: pathlib.Path) -> pathlib.Path:
  """Folder of the newest prepared version of a data set."""
  found = _prepared(root / dataset) if dataset else []
  if found:
    return found[-1]
  here = sorted({path.parent.relative_to(root) for path in _prepared(root)})
  held = ", ".join(map(str, here)) or "no prepared data set"
  if not root.is_dir():
    held = "no such folder"
  if dataset == "clevr_with_masks":
    remedy = (
      f"prepare it with: python launch/prepare.py --dataset={dataset}"
      f" --source=DIR --data_dir={root}"
    )
  else:
    remedy = (
      "launch/prepare.py prepares clevr_with_masks and procedural_clevr/NAME,"
      " TFDS any other in array_record format"
    )
  raise UserError(
    f"dataset={dataset!r} is not prepared under data_root={str(root)!r}"
    f" ({held}); {remedy}"
  )


def _prepared(root: pathlib.Path) -> list[pathlib.Path]:
  """Folders NAME/VERSION and NAME/CONFIG/VERSION, by ascending version."""
  folders = [
    info.parent
    for depth in ("", "*/", "*/*/", "*/*/*/")
    for info in root.glob(f"{depth}dataset_info.json")
    if not any(part.startswith(".") for part in info.relative_to(root).parts)
  ]
  return sorted(folders, key=lambda folder: _version(folder.name))


def open_builder(folder: pathlib.Path) -> tfds.core.DatasetBuilder:
  """Opens a prepared data set, and imports nothing at its wish.

  TFDS imports whatever module features.json names as a feature's class.
  """
  try:
    described = json.loads((folder / "features.json").read_text())
    for name in _class_names(described):
      if not re.fullmatch(OWN, name):
        raise ValueError(f"features.json asks for {name}, which is not of TFDS")
    return tfds.builder_from_directory(folder)
  except Exception as error:  # TFDS raises half a dozen kinds
    raise UserError(f"{folder} is no intact data set: {error}") from None


def _class_names(described: object) -> Iterable[str]:
  """Every class that a features.json names."""
  if isinstance(described, dict):
    for key, value in described.items():
      if key in NAMED and isinstance(value, str):
        yield value
      else:
        yield from _class_names(value)
  elif isinstance(described, list):
    for value in described:
      yield from _class_names(value)


def _version(name: str) -> list[int]:
  return [int(part) for part in re.findall(r"\d+", name)]
