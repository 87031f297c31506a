"""Keeps the next batches on the devices while the present one is used.

Transfers are asynchronous: started two batches early, they run behind the
training step, also where the loop waits for a step's metrics.
"""

import collections
from collections.abc import Callable, Iterator

import jax
import numpy as np

from spectraldiffusion_jax.types import Batch

DEPTH = 2
"""Batches on the devices besides the one in use: one under way, one there."""


class Prefetch:
  """Iterator of (example numbers on the host, batch on the devices)."""

  def __init__(
    self,
    batches: Iterator[Batch],
    place: Callable[[Batch, int], dict[str, jax.Array]],
    *,
    first: int,
    depth: int = DEPTH,
  ):
    """Starts with batch number `first`; nothing is read before it is asked.

    Args:
      batches: endless; closed with this.
      place: (batch, its number) -> the same on the devices.
      first: number of the first batch.
      depth: batches ahead; 0 reads none ahead.
    """
    self._batches, self._place = batches, place
    self._number, self._depth = first, depth
    self._ready = collections.deque()

  def __iter__(self) -> "Prefetch":
    return self

  def __next__(self) -> tuple[np.ndarray, dict[str, jax.Array]]:
    while len(self._ready) <= self._depth:
      batch = next(self._batches)
      self._ready.append((batch["index"], self._place(batch, self._number)))
      self._number += 1
    return self._ready.popleft()

  def close(self) -> None:
    """Drops what was read ahead and stops the reader."""
    self._ready.clear()
    self._batches.close()
