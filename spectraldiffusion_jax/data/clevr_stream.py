"""Pictures and exact labels of random scenes, in any number, as arrays.

A picture is a function of (level, size, seed, index) and of nothing else.
"""

import collections
import functools
import itertools
import operator
from collections.abc import Iterable, Iterator, Sequence
from concurrent import futures

import jax
import numpy as np

from spectraldiffusion_jax import effort
from spectraldiffusion_jax.data import clevr_scenes
from spectraldiffusion_jax.data.clevr_scenes import Drawn
from spectraldiffusion_jax.ops import render

# Share of the picture that each object has to show.
MIN_VISIBLE = 0.003
# A thread is handed this many scenes; candidates are tried fewer at a time, as
# less and less of them are left.
STACK, TRIED, THREADS = 16, 4, 2
CODES = ("size", "material", "shape", "color")


@functools.cache
def _on_host(draw, size: int):
  """Compiled program that draws a stack of scenes one after the other.

  It runs on the CPU whatever the default device is: the input pipeline must not
  compete with training for an accelerator.
  """
  one = functools.partial(draw, height=size, width=size)
  host = jax.local_devices(backend="cpu")[0]
  stack = jax.jit(
    functools.partial(jax.lax.map, one), compiler_options=effort.on_cpu(1, host)
  )
  return lambda scenes: jax.device_get(stack(jax.device_put(scenes, host)))


def _draw(draw, size: int, drawn: Sequence[Drawn], *, stack: int):
  """Draws scenes, always so many at once that the program stays the same."""
  parts = []
  for start in range(0, len(drawn), stack):
    scenes = [d.scene for d in drawn[start : start + stack]]
    filled = scenes + scenes[-1:] * (stack - len(scenes))
    rows = jax.tree.map(lambda *row: np.stack(row), *filled)
    out = _on_host(draw, size)(rows)
    parts.append(jax.tree.map(operator.itemgetter(slice(len(scenes))), out))
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
