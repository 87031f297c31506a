"""TFDS builder `procedural_clevr`: CLEVR-like pictures with exact labels.

The embedded data set: rendered on first use, on the CPU and without TensorFlow.
Each split is the beginning of one stream of `clevr_stream`.
"""

import contextlib
import dataclasses
import fcntl
import functools
import pathlib
import re
import shutil
from collections.abc import Iterator

import numpy as np
import tensorflow_datasets as tfds
import tqdm
from PIL import Image

from spectraldiffusion_jax.data import clevr_scenes
from spectraldiffusion_jax.data.clevr_stream import (
  CODES,
  render_scenes,
  stream_scenes,
)
from spectraldiffusion_jax.data.quiet import tfds_silent
from spectraldiffusion_jax.errors import UserError

__all__ = [
  "ProceduralClevr",
  "builder_config",
  "prepare",
  "render_scenes",
  "stream_scenes",
]

# Number of pictures of each split, and the seed of its stream.
SPLITS = {"train": (2048, 0), "validation": (128, 1), "test": (128, 2)}


@dataclasses.dataclass(eq=False)
class Config(tfds.core.BuilderConfig):
  """A level at a size in pixels; made by `builder_config`."""

  level: str = "easy"
  size: int = 64


@functools.cache
def builder_config(name: str) -> Config:
  """Config of a name such as "easy_64", one object for each name.

  Raises:
    UserError: the name is not a level and a size.
  """
  parsed = re.fullmatch(r"([a-z]+)_([1-9][0-9]{0,5})", name)
  if parsed is None:
    raise UserError(
      f"procedural_clevr: config {name!r} is not LEVEL_SIZE, e.g. 'easy_64'"
    )
  level, size = parsed[1], int(parsed[2])
  clevr_scenes.check(level, size)
  return Config(name=name, version="1.0.0", level=level, size=size)


class ProceduralClevr(tfds.core.GeneratorBasedBuilder):
  """TFDS builder; any `builder_config`, not only those listed here."""

  # Where TFDS would look for download checksums; finding it out needs a package
  # that TFDS does not declare (importlib_resources), and nothing is downloaded.
  code_path = None
  VERSION = tfds.core.Version("1.0.0")
  RELEASE_NOTES = {"1.0.0": "First scenes."}
  BUILDER_CONFIGS = [
    builder_config(name)
    for name in ("easy_64", "hard_64", "easy_128", "hard_128")
  ]

  def _info(self) -> tfds.core.DatasetInfo:
    size = self.builder_config.size
    codes = tfds.features.Tensor(
      shape=(clevr_scenes.MAX_OBJECTS + 1,), dtype=np.uint8
    )
    return tfds.core.DatasetInfo(
      builder=self,
      description=__doc__,
      disable_shuffling=True,
      features=tfds.features.FeaturesDict(
        {
          "image": tfds.features.Image(
            shape=(size, size, 3), encoding_format="png"
          ),
          "segmentation": tfds.features.Image(
            shape=(size, size, 1), encoding_format="png"
          ),
          "num_objects": tfds.features.Scalar(np.int32),
          **dict.fromkeys(CODES, codes),
        }
      ),
    )

  def _split_generators(self, dl_manager):
    del dl_manager
    return {split: self._generate_examples(split) for split in SPLITS}

  def _generate_examples(self, split: str):
    count, seed = SPLITS[split]
    config = self.builder_config
    label = f"procedural_clevr/{config.name} {split}"
    with tqdm.tqdm(total=count, desc=label, unit="images") as bar:
      index = 0
      for part in stream_scenes(config.level, config.size, seed, range(count)):
        image = (part["image"] * 255 + 0.5).astype(np.uint8)
        ids = part["segmentation"].astype(np.uint8)
        for i in range(len(image)):
          yield (
            index,
            {
              "image": Image.fromarray(image[i]),
              "segmentation": Image.fromarray(ids[i]),
              "num_objects": part["num_objects"][i],
              **{k: part[k][i] for k in CODES},
            },
          )
          index += 1
        bar.update(len(image))


@contextlib.contextmanager
def _alone(path: pathlib.Path) -> Iterator[None]:
  """Holds a file lock; the system lets go of it when the process dies."""
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("w")
  except OSError as error:
    raise UserError(
      f"data_root: {path.parent} cannot be written: {error.strerror}"
    ) from error
  with file:
    fcntl.flock(file, fcntl.LOCK_EX)
    yield


def _prepare_now(opened, final: pathlib.Path) -> None:
  if final.exists():
    return
  # TFDS writes beside the final folder and renames it at the end, so what a
  # killed process left is never taken for data.
  for leftover in final.parent.glob(f"incomplete.*_{final.name}"):
    shutil.rmtree(leftover)
  with tfds_silent():
    opened().download_and_prepare()


def prepare(name: str, data_root: str | pathlib.Path) -> ProceduralClevr:
  """Makes the data set unless it is there; other processes wait meanwhile.

  Args:
    name: builder config, such as "easy_64".
    data_root: folder of all data sets; made if absent.

  Returns:
    Builder ready for `as_data_source`.

  Raises:
    UserError: the name is not a level and a size, or data_root cannot be
      written.
  """
  opened = functools.partial(
    ProceduralClevr,
    config=builder_config(name),
    data_dir=str(data_root),
    file_format="array_record",
  )
  final = pathlib.Path(opened().data_path)
  if not final.exists():
    with _alone(final.parent.parent / f".{name}.lock"):
      _prepare_now(opened, final)
  # Opened afresh: the data may have come from another process meanwhile.
  return opened()
