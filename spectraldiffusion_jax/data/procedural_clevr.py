"""Embedded data set `procedural_clevr`: CLEVR-like pictures, exact labels.

A picture is a function of (level, size, seed, index) and of nothing else. The
same pictures are offered as arrays in memory (`render_scenes`, any number) and
as a TFDS builder that is prepared on first use, without TensorFlow.
"""

import collections
import contextlib
import fcntl
import functools
import io
import itertools
import pathlib
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from concurrent import futures

import jax
import numpy as np
import tensorflow_datasets as tfds
import tqdm
from PIL import Image

from spectraldiffusion_jax.data import clevr_scenes
from spectraldiffusion_jax.data.clevr_scenes import Drawn
from spectraldiffusion_jax.errors import UserError
from spectraldiffusion_jax.ops import render

# Share of the picture that each object has to show.
MIN_VISIBLE = 0.003
# A thread is handed this many scenes; candidates are tried fewer at a time, as
# less and less of them are left.
STACK, TRIED, THREADS = 16, 4, 2
# Number of pictures of each split, and the seed of its stream.
SPLITS = {"train": (2048, 0), "validation": (128, 1), "test": (128, 2)}
CODES = ("size", "material", "shape", "color")


@functools.cache
def _on_host(draw, size: int):
  """Compiled program that draws a stack of scenes one after the other.

  It runs on the CPU whatever the default device is: the input pipeline must not
  compete with training for an accelerator.
  """
  one = functools.partial(draw, height=size, width=size)
  stack = jax.jit(functools.partial(jax.lax.map, one))
  host = jax.devices("cpu")[0]
  return lambda scenes: jax.device_get(stack(jax.device_put(scenes, host)))


def _draw(draw, size: int, drawn: Sequence[Drawn], *, stack: int):
  """Draws scenes, always so many at once that the program stays the same."""
  parts = []
  for start in range(0, len(drawn), stack):
    scenes = [d.scene for d in drawn[start : start + stack]]
    filled = scenes + scenes[-1:] * (stack - len(scenes))
    out = _on_host(draw, size)(
      jax.tree.map(lambda *row: np.stack(row), *filled)
    )
    parts.append(jax.tree.map(lambda a, n=len(scenes): a[:n], out))
  return jax.tree.map(lambda *part: np.concatenate(part), *parts)


def _visible(size: int, drawn: Sequence[Drawn]) -> list[bool]:
  """Whether each scene shows enough of all its objects."""
  ids = _draw(render.instance_ids, size, drawn, stack=TRIED)
  least = MIN_VISIBLE * size * size
  return [
    np.bincount(i.ravel(), minlength=d.num_objects + 1)[1:].min() >= least
    for i, d in zip(ids, drawn, strict=True)
  ]


def _accepted(
  level: str, size: int, seed: int, indices: Sequence[int]
) -> list[Drawn]:
  """First attempt at each scene that hides no object, at most STACK scenes."""
  found: dict[int, Drawn] = {}
  for attempt in itertools.count():
    todo = [i for i in dict.fromkeys(indices) if i not in found]
    if not todo:
      return [found[i] for i in indices]
    tried = {
      i: clevr_scenes.sample_scene(level, seed, i, attempt=attempt)
      for i in todo
    }
    tried = {i: drawn for i, drawn in tried.items() if drawn is not None}
    if tried:
      shown = _visible(size, list(tried.values()))
      found |= {i: tried[i] for i, ok in zip(tried, shown, strict=True) if ok}


def _render_stack(
  level: str, size: int, seed: int, indices: Sequence[int]
) -> dict[str, np.ndarray]:
  """`render_scenes` for at most STACK scenes."""
  drawn = _accepted(level, size, seed, indices)
  image, ids = _draw(render.render, size, drawn, stack=STACK)
  return {
    "image": image,
    "segmentation": ids,
    "num_objects": np.asarray([d.num_objects for d in drawn], np.int32),
    **{k: np.stack([d.codes[k] for d in drawn]) for k in CODES},
  }


def stream_scenes(
  level: str, size: int, seed: int, indices: Iterable[int]
) -> Iterator[dict[str, np.ndarray]]:
  """Yields `render_scenes` in order, a few scenes at a time.

  Two host threads work ahead of the reader, by a bounded number of scenes, so
  that indices may be endless.

  Args:
    level: "easy" or "hard".
    size: height and width in pixels.
    seed: stream; the splits of the builder are streams 0, 1 and 2.
    indices: positions in the stream.

  Yields:
    The arrays of `render_scenes`, B at most STACK.

  Raises:
    UserError: level or size is not offered.
  """
  clevr_scenes.check(level, size)
  left = iter(indices)
  stacks = iter(lambda: tuple(itertools.islice(left, STACK)), ())
  waiting: collections.deque[futures.Future] = collections.deque()
  with futures.ThreadPoolExecutor(THREADS) as threads:
    try:
      while True:
        for stack in itertools.islice(stacks, 2 * THREADS - len(waiting)):
          waiting.append(
            threads.submit(_render_stack, level, size, seed, stack)
          )
        if not waiting:
          return
        yield waiting.popleft().result()
    finally:
      for future in waiting:
        future.cancel()


def render_scenes(
  level: str, size: int, seed: int, indices: Iterable[int]
) -> dict[str, np.ndarray]:
  """Draws scenes of a stream; what else is drawn with them does not matter.

  Args:
    level: "easy" (3-6 objects, each of another colour, no grey) or "hard" (3-10
      objects, all eight colours with repeats).
    size: height and width in pixels.
    seed: stream; the splits of the builder are streams 0, 1 and 2.
    indices: positions in the stream, at least one.

  Returns:
    image [B H W 3] float32 in [0, 1]; segmentation [B H W] int32, 0 for the
    background and 1..n for the objects, each shown; num_objects [B] int32;
    size, material, shape, color [B 11] uint8 in the codes of `clevr_scenes`,
    entry k for object k.

  Raises:
    UserError: level or size is not offered.
  """
  parts = list(stream_scenes(level, size, seed, indices))
  return jax.tree.map(lambda *part: np.concatenate(part), *parts)


class Config(tfds.core.BuilderConfig):
  """A level at a size; use `builder_config` to make one."""

  def __init__(self, level: str, size: int):
    super().__init__(
      name=f"{level}_{size}",
      version="1.0.0",
      description=f"Level {level}, {size}x{size} pixels.",
    )
    self.level = level
    self.size = size


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
  return Config(level, size)


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
    with tqdm.tqdm(total=count, desc=label, unit=" images") as bar:
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
  path.parent.mkdir(parents=True, exist_ok=True)
  with path.open("w") as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    yield


def prepare(name: str, data_root: str | pathlib.Path) -> ProceduralClevr:
  """Makes the data set unless it is there; other processes wait meanwhile.

  Args:
    name: builder config, such as "easy_64".
    data_root: folder of all data sets; made if absent.

  Returns:
    Builder ready for `as_data_source`.

  Raises:
    UserError: the name is not a level and a size.
  """
  builder = ProceduralClevr(
    config=builder_config(name),
    data_dir=str(data_root),
    file_format="array_record",
  )
  final = pathlib.Path(builder.data_path)
  with _alone(final.parent.parent / f".{name}.lock"):
    if not final.exists():
      # TFDS writes beside the final folder and renames it at the end, so what
      # a killed process left is never taken for data.
      for leftover in final.parent.glob(f"incomplete.*_{final.name}"):
        shutil.rmtree(leftover)
      # The bar of this module knows the totals; those of TFDS do not.
      tfds.disable_progress_bar()
      try:
        with contextlib.redirect_stdout(io.StringIO()):
          builder.download_and_prepare()
      finally:
        tfds.enable_progress_bar()
  return ProceduralClevr(
    config=builder_config(name),
    data_dir=str(data_root),
    file_format="array_record",
  )
