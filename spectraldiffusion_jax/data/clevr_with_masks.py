"""CLEVR with masks for TFDS: public GZIP TFRecords in, array_record out.

Source: multi_object_datasets (Kabra et al., 2019), clevr_with_masks: 240x320
scenes of up to 10 objects with exact instance masks. Two passes over each file,
neither holding more than one source record: the first checks frames and the
whole file's checksum and counts the records, the second checks and stores them.
"""

import collections
import functools
import hashlib
import io
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image
from tqdm import tqdm

from spectraldiffusion_jax.data import tfrecord
from spectraldiffusion_jax.data.quiet import tfds_silent
from spectraldiffusion_jax.errors import UserError

HEIGHT, WIDTH, ENTRIES = 240, 320, 11  # entry 0 is the background
CODES = ("size", "material", "shape", "color")
SCALARS = ("x", "y", "z", "rotation", "visibility")
SHARD = 500  # records; the TFDS shard writer keeps one shard's PNGs in memory
PATTERN = "clevr_with_masks*.tfrecords"

Example = dict[str, np.ndarray | io.BytesIO | int]


class ClevrWithMasks(tfds.core.ShardBasedBuilder):
  """TFDS builder `clevr_with_masks`; the source's order is kept.

  A ShardBasedBuilder, because GeneratorBasedBuilder keeps up to 1 GB of
  examples in memory before it writes the first one.

  Attributes:
    source: the .tfrecords file, or the folder that holds such files. Needed to
      prepare, not to read.
  """

  # Where TFDS would look for download checksums; finding it out needs a package
  # that TFDS does not declare (importlib_resources), and nothing is downloaded.
  code_path = None
  VERSION = tfds.core.Version("1.0.0")
  RELEASE_NOTES = {"1.0.0": "First version."}

  def __init__(self, *, source: str | os.PathLike | None = None, **kwargs):
    self.source = source
    super().__init__(file_format="array_record", **kwargs)

  def _info(self) -> tfds.core.DatasetInfo:
    features = {
      "image": tfds.features.Image(
        shape=(HEIGHT, WIDTH, 3), encoding_format="png"
      ),
      "segmentation": tfds.features.Image(
        shape=(HEIGHT, WIDTH, 1), encoding_format="png"
      ),
      "num_objects": tfds.features.Scalar(np.int32),
      "pixel_coords": tfds.features.Tensor(
        shape=(ENTRIES, 3), dtype=np.float32
      ),
    }
    for name in CODES:
      features[name] = tfds.features.Tensor(shape=(ENTRIES,), dtype=np.uint8)
    for name in SCALARS:
      features[name] = tfds.features.Tensor(shape=(ENTRIES,), dtype=np.float32)
    return tfds.core.DatasetInfo(
      builder=self,
      description="CLEVR scenes with one exact mask per object.",
      features=tfds.features.FeaturesDict(features),
      homepage="https://github.com/google-deepmind/multi_object_datasets",
      disable_shuffling=True,
      metadata=tfds.core.MetadataDict(),
    )

  def _shard_iterators_per_split(self, dl_manager: object) -> dict[str, list]:
    del dl_manager  # nothing is downloaded
    return {
      split: [
        shard for path in paths for shard in self._shards_of(path, split=split)
      ]
      for split, paths in find_sources(self.source).items()
    }

  def _shards_of(self, path: pathlib.Path, *, split: str) -> list:
    """Checks one file and returns a generator function per output shard."""
    records, sha256 = _inspect(path)
    entry = self.info.metadata.setdefault(
      split, {"records": 0, "objects": {}, "sources": []}
    )
    entry["sources"].append(
      {"name": path.name, "records": records, "sha256": sha256}
    )
    stream = _examples(path, entry)
    # Every shard takes its share of the one stream: zip stops at the end of
    # its range before it asks the stream for one more.
    return [
      functools.partial(zip, range(start, start + SHARD), stream)
      for start in range(0, records, SHARD)
    ]


def prepare(
  source: str | os.PathLike,
  data_root: str | os.PathLike,
  *,
  overwrite: bool = False,
) -> ClevrWithMasks:
  """Prepares the data set and returns its builder.

  The result appears under data_root in one step, after every check has passed;
  until then an existing data set stays as it is.

  Args:
    source: the .tfrecords file, or the folder that holds such files.
    data_root: folder of prepared data sets.
    overwrite: replace a data set that is already prepared there.

  Returns:
    The builder; `builder.info.metadata[split]` holds records, objects (a
    histogram) and sources (name, records and sha256 of every file).

  Raises:
    UserError: no source, a damaged or unexpected record, or a data set that is
      already there.
  """
  find_sources(source)
  final = ClevrWithMasks(data_dir=data_root)
  target = pathlib.Path(final.data_dir)
  if target.exists() and not overwrite:
    raise UserError(
      f"clevr_with_masks is already prepared at {target}; pass --overwrite to"
      " replace it"
    )
  try:
    pathlib.Path(data_root).mkdir(parents=True, exist_ok=True)
    scratch = tempfile.mkdtemp(prefix=".preparing_", dir=data_root)
  except OSError as error:
    raise UserError(
      f"data_dir={os.fspath(data_root)!r} cannot be written: {error.strerror}"
    ) from error
  try:
    builder = ClevrWithMasks(data_dir=scratch, source=source)
    with tfds_silent():
      builder.download_and_prepare()
    shutil.rmtree(target, ignore_errors=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    os.replace(builder.data_dir, target)
  finally:
    shutil.rmtree(scratch, ignore_errors=True)
  return ClevrWithMasks(data_dir=data_root)


def find_sources(
  source: str | os.PathLike | None,
) -> dict[str, list[pathlib.Path]]:
  """Returns the source files of every split, sorted by name.

  Args:
    source: a file, or a folder of files named clevr_with_masks*.tfrecords. A
      name with `_test` or `_validation` belongs to that split, any other to
      train.

  Raises:
    UserError: nothing of that kind is there.
  """
  path = pathlib.Path(source) if source else None
  if path is None or not path.exists():
    raise UserError(
      f"source={os.fspath(source or '')!r} does not exist; give the folder or"
      f" file of {PATTERN}"
    )
  files = sorted(path.glob(PATTERN)) if path.is_dir() else [path]
  files = [file for file in files if file.is_file()]
  if not files:
    raise UserError(f"source={str(path)!r} holds no file named {PATTERN}")
  splits = collections.defaultdict(list)
  for file in files:
    held_out = [s for s in ("test", "validation") if f"_{s}" in file.name]
    splits[held_out[0] if held_out else "train"].append(file)
  return dict(splits)


def to_example(record: tfrecord.Example) -> Example:
  """Checks one source record and converts it to this builder's features.

  Args:
    record: as read from the source file.

  Returns:
    image and segmentation as PNG files, the rest as arrays.

  Raises:
    UserError: a feature is missing or of another shape, the masks do not part
      the pixels, or there are more masks than objects.
  """
  image = record.get("image", (HEIGHT, WIDTH, 3), np.uint8)
  visibility = record.get("visibility", (ENTRIES,), np.float32)
  num_objects = int(np.count_nonzero(visibility[1:] > 0))
  segmentation = _to_segmentation(record)
  if segmentation.max() > num_objects:
    raise record.error(
      "mask",
      f"object {segmentation.max()} has pixels, but visibility counts"
      f" {num_objects} objects",
    )
  # Copied, for a view would keep its whole source record in memory.
  codes = {name: record.get(name, (ENTRIES,), np.uint8) for name in CODES}
  return {
    "image": _to_png(image),
    "segmentation": _to_png(segmentation),
    "num_objects": num_objects,
    "pixel_coords": record.get("pixel_coords", (ENTRIES, 3), np.float32),
    **{name: values.copy() for name, values in codes.items()},
    **{name: record.get(name, (ENTRIES,), np.float32) for name in SCALARS},
  }


def _to_segmentation(record: tfrecord.Example) -> np.ndarray:
  """Merges the masks into one uint8 map [HEIGHT WIDTH] of entry numbers."""
  shape = (ENTRIES, HEIGHT, WIDTH, 1)
  mask = record.get("mask", shape, np.uint8)[..., 0]
  inside = mask == 255
  if np.count_nonzero(mask) != np.count_nonzero(inside):
    other = mask[(mask != 255) & (mask != 0)][0]
    raise record.error("mask", f"holds the value {other}, expected 0 or 255")
  covers = inside.sum(axis=0, dtype=np.uint8)
  if (covers != 1).any():
    row, column = np.argwhere(covers != 1)[0]
    raise record.error(
      "mask",
      f"{covers[row, column]} masks are 255 at row {row}, column {column},"
      " expected exactly one",
    )
  numbers = np.arange(ENTRIES, dtype=np.uint8)[:, None, None]
  return (inside * numbers).sum(axis=0, dtype=np.uint8)


def _to_png(pixels: np.ndarray) -> io.BytesIO:
  # Level 3 takes 6 ms a scene and 1.15 times the bytes of level 6's 15 ms.
  file = io.BytesIO()
  Image.fromarray(pixels).save(file, "PNG", compress_level=3)
  file.seek(0)
  return file


def _inspect(path: pathlib.Path) -> tuple[int, str]:
  """Reads a whole file once: number of records and SHA-256."""
  with _progress(path, "checking") as bar:
    records = sum(1 for _ in tfrecord.read_records(path, progress=bar.update))
  with open(path, "rb") as file:
    return records, hashlib.file_digest(file, "sha256").hexdigest()


def _examples(path: pathlib.Path, entry: dict) -> Iterator[Example]:
  """Yields the file's examples and counts them in the split's metadata."""
  with _progress(path, "preparing") as bar:
    for record in tfrecord.read_examples(path, progress=bar.update):
      example = to_example(record)
      objects = str(example["num_objects"])  # JSON keys are strings
      entry["records"] += 1
      entry["objects"][objects] = entry["objects"].get(objects, 0) + 1
      yield example


def _progress(path: pathlib.Path, verb: str) -> tqdm:
  return tqdm(
    desc=f"{verb} {path.name}",
    total=path.stat().st_size,
    unit="B",
    unit_scale=True,
    mininterval=0.5,
    leave=False,
  )
