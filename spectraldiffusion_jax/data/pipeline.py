"""Batches for training and evaluation, through grain.

Both kinds are functions of the global position alone: which examples form
batch j, and what augmentation does to them, depends neither on the number of
processes nor on workers, threads or the cache. Fields of both makers:

  dataset, split, data_root  see sources.load
  image_size     height and width in pixels, or one number for both
  crop           first and end row, first and end column that are kept of the
                 stored image; None or () keeps all
  max_objects    scenes with more objects are left out; None or 0 keeps all
  max_pixels     larger image files are refused
  batch_size     examples of a global batch; each process yields its share
  num_threads    threads that read ahead (in each worker); 0 for none
  cache          keep decoded and resized examples in memory after first use
  process_index, process_count  this process among all

and of make_train alone:

  augment        fields of augment.Augment; None leaves the images as they are
  seed           of order and augmentation
  num_workers    processes that read ahead; 0 for none. Each holds the cache
                 and the labels anew and imports the main module, which has to
                 be guarded by `if __name__ == "__main__"`; on few cores threads
                 are faster
  labels         uint8 [num_examples H W], a map per example in source order
                 (after max_objects), yielded as labels [B H W] and augmented
                 like the image
  first_batch    number of the first batch; starting at n equals dropping n
                 batches, at no cost, whatever the workers and processes were
"""

import dataclasses
import os
from collections.abc import Iterator, Mapping

import grain
import numpy as np

from spectraldiffusion_jax.data import sources
from spectraldiffusion_jax.data.augment import Augment
from spectraldiffusion_jax.data.examples import finish, open_examples, select
from spectraldiffusion_jax.data.images import MAX_PIXELS
from spectraldiffusion_jax.data.transforms import Window
from spectraldiffusion_jax.errors import UserError
from spectraldiffusion_jax.types import Batch


def make_train(
  *,
  dataset: str,
  split: str,
  data_root: str | os.PathLike,
  image_size: int | tuple[int, int],
  crop: Window | None,
  max_objects: int | None,
  max_pixels: int = MAX_PIXELS,
  augment: Mapping[str, object] | None,
  batch_size: int,
  seed: int,
  num_workers: int,
  num_threads: int,
  cache: bool,
  labels: np.ndarray | None = None,
  first_batch: int = 0,
  process_index: int = 0,
  process_count: int = 1,
) -> grain.DatasetIterator:
  """Returns an endless iterator over shuffled types.Batch; see the module.

  Every epoch visits each example once, in another order; a batch may span two
  epochs. Process p of P holds rows p * B / P to (p + 1) * B / P of each global
  batch of B, so that a row has one place whatever P is.

  Raises:
    UserError: a field does not fit the data set or the processes.
  """
  rows = _share(batch_size, process_count)
  examples = open_examples(
    sources.load(dataset, split, data_root=data_root, max_pixels=max_pixels),
    image_size=image_size,
    crop=crop,
    max_objects=max_objects,
    cache=cache,
    labels=labels,
  )
  served = _shuffled(len(examples), seed).map(examples)
  if augment is not None:
    served = served.random_map(Augment.from_config(augment))
  # Sharded only here: the position that seeds shuffle and augmentation is the
  # global one.
  first = first_batch * process_count + process_index
  batches = served.map(finish).batch(rows, drop_remainder=True)
  batches = batches[first::process_count]
  batches = batches.to_iter_dataset(_read_options(num_threads))
  return iter(_with_workers(batches, num_workers))


def make_eval(
  *,
  dataset: str,
  split: str,
  data_root: str | os.PathLike,
  image_size: int | tuple[int, int],
  crop: Window | None,
  max_objects: int | None,
  max_pixels: int = MAX_PIXELS,
  batch_size: int,
  num_threads: int,
  cache: bool,
  process_index: int = 0,
  process_count: int = 1,
) -> "EvalBatches":
  """Returns batches over every example once, in source order; see the module.

  Process p holds rows p * B / P to (p + 1) * B / P of each global batch of B.
  All processes yield the same number of batches: rows beyond the last example
  are zeros with mask False and index -1.

  Returns:
    An iterable of types.Batch that can be iterated again and again.

  Raises:
    UserError: a field does not fit the data set or the processes.
  """
  rows = _share(batch_size, process_count)
  examples = open_examples(
    sources.load(dataset, split, data_root=data_root, max_pixels=max_pixels),
    image_size=image_size,
    crop=crop,
    max_objects=max_objects,
    cache=cache,
  )
  num_batches = steps_per_epoch(len(examples), batch_size)
  grid = np.arange(num_batches * batch_size).reshape(num_batches, batch_size)
  mine = grid[:, process_index * rows : (process_index + 1) * rows]
  served = grain.MapDataset.source(mine.ravel()).map(examples.padded)
  batches = served.map(finish).batch(rows)
  return EvalBatches(
    num_examples=len(examples),
    num_batches=num_batches,
    batches=batches.to_iter_dataset(_read_options(num_threads)),
  )


@dataclasses.dataclass(frozen=True)
class EvalBatches:
  """One pass over a split per iteration.

  Attributes:
    num_examples: examples over all processes.
    num_batches: batches of each process, also its len().
    batches: the grain data set behind it.
  """

  num_examples: int
  num_batches: int
  batches: grain.IterDataset

  def __len__(self) -> int:
    return self.num_batches

  def __iter__(self) -> Iterator[Batch]:
    iterator = iter(self.batches)
    try:
      yield from iterator
    finally:
      iterator.close()


def num_examples(
  *,
  dataset: str,
  split: str,
  data_root: str | os.PathLike,
  max_objects: int | None,
  max_pixels: int = MAX_PIXELS,
) -> int:
  """Number of examples that make_train and make_eval serve."""
  source = sources.load(
    dataset, split, data_root=data_root, max_pixels=max_pixels
  )
  return len(select(source, max_objects))


def steps_per_epoch(examples: int, batch_size: int) -> int:
  """Number of batches that show every example at least once."""
  return -(-examples // batch_size)


def _shuffled(examples: int, seed: int) -> grain.MapDataset:
  """Endless positions, each epoch in an order of its own."""
  if not 0 <= seed < 2**32:
    raise UserError(f"seed={seed} is not in 0..2**32 - 1")
  return grain.MapDataset.range(examples).seed(seed).shuffle().repeat()


def _with_workers(
  batches: grain.IterDataset, num_workers: int
) -> grain.IterDataset:
  if not num_workers:
    return batches
  options = grain.MultiprocessingOptions(
    num_workers=num_workers, per_worker_buffer_size=2
  )
  return batches.mp_prefetch(options)


def _share(batch_size: int, process_count: int) -> int:
  if batch_size < 1 or batch_size % process_count:
    raise UserError(
      f"batch_size={batch_size} is not a positive multiple of the"
      f" {process_count} processes"
    )
  return batch_size // process_count


def _read_options(num_threads: int) -> grain.ReadOptions:
  # The unit that is read ahead is a whole batch.
  return grain.ReadOptions(
    num_threads=num_threads, prefetch_buffer_size=2 * num_threads
  )
