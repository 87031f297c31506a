"""Random access to data sets: prepared TFDS sets and folders of images."""

import functools
import io
import os
import pathlib
import tempfile
from collections.abc import Iterable
from typing import Protocol

import numpy as np
import tensorflow_datasets as tfds

from spectraldiffusion_jax.data import prepared
from spectraldiffusion_jax.data.images import MAX_PIXELS, read_map, read_rgb
from spectraldiffusion_jax.data.transforms import to_rgb
from spectraldiffusion_jax.errors import UserError

SUFFIXES = (
  ".bmp .gif .jpeg .jpg .pgm .png .ppm .tif .tiff .webp".split()
)  # of the data set `images`


class Source(Protocol):
  """Examples by position; the repr tells data set, split and size."""

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> dict[str, np.ndarray]:
    """Returns image uint8 [H W 3] and, where known, segmentation int [H W]."""
    ...

  def num_objects(self) -> np.ndarray:
    """Returns int32 [len(self)]; a UserError where nothing tells."""
    ...


def load(
  dataset: str,
  split: str,
  *,
  data_root: str | os.PathLike,
  max_pixels: int = MAX_PIXELS,
) -> Source:
  """Opens one split of a data set.

  Args:
    dataset: "procedural_clevr/NAME" (prepared on first use), "images"
      (data_root is a folder of images in any depth, the one split is "train"),
      or the name of a TFDS data set prepared under data_root in array_record
      format, such as "clevr_with_masks".
    split: in TFDS notation, such as "train", "train[:90%]" or "train+test".
    data_root: folder of prepared data sets.
    max_pixels: most pixels of an image that is decoded.

  Returns:
    The source, in the order in which the data set is stored.

  Raises:
    UserError: the data set, the split or data_root does not exist, is empty or
      not of this kind.
  """
  if dataset == "images":
    return ImageFolder(data_root, split, max_pixels=max_pixels)
  family, _, name = dataset.partition("/")
  if family == "procedural_clevr":
    from spectraldiffusion_jax.data import procedural_clevr

    folder = pathlib.Path(procedural_clevr.prepare(name, data_root).data_dir)
  else:
    folder = prepared.folder_of(dataset, pathlib.Path(data_root))
  return TfdsSource(prepared.open_builder(folder), split, max_pixels=max_pixels)


class TfdsSource:
  """One split of a TFDS data set with `image` and perhaps `segmentation`.

  Images are decoded here rather than by TFDS, which would want OpenCV for speed
  and for 16 bits.
  """

  def __init__(
    self,
    builder: tfds.core.DatasetBuilder,
    split: str,
    *,
    max_pixels: int = MAX_PIXELS,
  ):
    self._max_pixels = max_pixels
    self._name = builder.info.full_name
    self._split = split
    self._folder = pathlib.Path(builder.data_dir)
    features = builder.info.features
    if "image" not in features:
      raise UserError(
        f"dataset={self._name!r} has no feature `image` but {sorted(features)}"
      )
    if builder.info.file_format != tfds.core.FileFormat.ARRAY_RECORD:
      raise UserError(
        f"dataset={self._name!r} is stored as {builder.info.file_format.value};"
        " prepare it with file_format='array_record'"
      )
    self._ranges = _ranges(split, builder.info.splits, dataset=self._name)
    self._full = functools.partial(_records, builder)
    self._records = _records(builder, split)
    self._counted = "num_objects" in features
    self._segmented = "segmentation" in features

  def __len__(self) -> int:
    return len(self._records)

  def __repr__(self) -> str:
    return f"TfdsSource({self._name}, split={self._split!r}, n={len(self)})"

  def __getitem__(self, index: int) -> dict[str, np.ndarray]:
    try:
      record = self._records[index]
      example = {"image": self._decode(record["image"], to_rgb, read_rgb)}
      if self._segmented:
        stored = record["segmentation"]
        example["segmentation"] = self._decode(stored, _flat, read_map)
      return example
    except IndexError:
      raise  # the end, for whoever iterates
    except Exception as error:  # array_record and protobuf have kinds of each
      raise UserError(f"{self!r}, example {index}: {error}") from None

  def _decode(self, stored: bytes | np.ndarray, from_array, from_file):
    if isinstance(stored, np.ndarray):
      return from_array(stored)
    return from_file(io.BytesIO(stored), max_pixels=self._max_pixels)

  def num_objects(self) -> np.ndarray:
    """Returns the number of objects of every example, int32 [len(self)].

    Counted once per split, without decoding an image, and kept in a file beside
    the data. Counts are the feature `num_objects` or, without it, the ids other
    than 0 in the segmentation.
    """
    if not (self._counted or self._segmented):
      raise UserError(
        f"max_objects: dataset={self._name!r} has neither num_objects nor"
        " segmentation to count objects by"
      )
    return np.concatenate(
      [self._split_counts(name)[first:end] for name, first, end in self._ranges]
    )

  def _split_counts(self, split: str) -> np.ndarray:
    path = self._folder / f"num_objects-{split}.npy"
    records = self._full(split)
    try:
      counts = np.load(path, allow_pickle=False)
      if counts.shape == (len(records),):
        return counts
    except Exception:  # numpy raises many kinds for a damaged file
      pass  # not there yet, or damaged: count again
    counts = np.array([self._count(record) for record in records], np.int32)
    _save(path, counts)
    return counts

  def _count(self, record: dict[str, object]) -> int:
    if self._counted:
      return int(record["num_objects"])
    ids = np.unique(self._decode(record["segmentation"], _flat, read_map))
    return np.count_nonzero(ids)


class ImageFolder:
  """Every image file below a folder, sorted by path; the one split is train."""

  def __init__(
    self,
    root: str | os.PathLike,
    split: str,
    *,
    max_pixels: int = MAX_PIXELS,
  ):
    self._max_pixels = max_pixels
    root = pathlib.Path(root)
    if not root.is_dir():
      raise UserError(f"data_root={str(root)!r} is no folder of images")
    self._root, self._split = root, split
    files = sorted(
      file for file in root.rglob("*") if file.suffix.lower() in SUFFIXES
    )
    if not files:
      raise UserError(
        f"data_root={str(root)!r} holds no image ({' '.join(SUFFIXES)})"
      )
    whole = tfds.core.SplitInfo(
      name="train", shard_lengths=[len(files)], num_bytes=0
    )
    splits = tfds.core.SplitDict([whole])
    self.files = [
      file
      for _, first, end in _ranges(split, splits, dataset="images")
      for file in files[first:end]
    ]

  def __len__(self) -> int:
    return len(self.files)

  def __repr__(self) -> str:
    return (
      f"ImageFolder({self._root.name}, split={self._split!r}, n={len(self)})"
    )

  def __getitem__(self, index: int) -> dict[str, np.ndarray]:
    path = self.files[index]
    try:
      return {"image": read_rgb(path, max_pixels=self._max_pixels)}
    except UserError as error:
      raise UserError(f"{path} {error}") from None

  def num_objects(self) -> np.ndarray:
    """Raises a UserError: plain images do not tell."""
    raise UserError("max_objects: plain images do not tell how many they show")


def _ranges(
  split: str, splits: tfds.core.SplitDict, *, dataset: str
) -> list[tuple[str, int, int]]:
  """Resolves a split in TFDS notation to (split name, first, end)."""
  try:
    parts = tfds.core.ReadInstruction.from_spec(split).to_absolute(splits)
  except Exception as error:  # TFDS raises half a dozen kinds
    raise _split_error(split, splits, dataset) from error
  ranges = [
    (part.splitname, *slice(part.from_, part.to).indices(total)[:2])
    for part in parts
    for total in [splits[part.splitname].num_examples]
  ]
  if any(first >= end for _, first, end in ranges):
    raise _split_error(split, splits, dataset)
  return ranges


def _split_error(split: str, splits: Iterable[str], dataset: str) -> UserError:
  held = ", ".join(
    f"{name} ({splits[name].num_examples} examples)" for name in splits
  )
  return UserError(
    f"split={split!r} selects nothing of dataset={dataset!r}, which has {held};"
    " parts are written like 'train[:90%]'"
  )


def _records(builder: tfds.core.DatasetBuilder, split: str):
  """The TFDS data source of a split with images as undecoded bytes."""
  encoded = {
    name: tfds.decode.SkipDecoding()
    for name, feature in builder.info.features.items()
    if isinstance(feature, tfds.features.Image)
  }
  return builder.as_data_source(split, decoders=encoded)


def _flat(stored: np.ndarray) -> np.ndarray:
  """Integers [H W] of a map stored as an array."""
  return stored.reshape(stored.shape[:2])


def _save(path: pathlib.Path, counts: np.ndarray) -> None:
  """Writes in one step; a read-only data folder is no error."""
  try:
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
      np.save(file, counts)
    os.replace(file.name, path)
  except OSError:
    return
