"""Batches ahead on the devices: in order, on time, and dropped on close."""

import itertools

import numpy as np
import pytest

from spectraldiffusion_jax.prefetch import Prefetch


class Reader:
  """Endless batches that remember how many were read."""

  def __init__(self, first):
    self.numbers, self.read, self.closed = itertools.count(first), 0, False

  def __next__(self):
    self.read += 1
    number = next(self.numbers)
    return {"index": np.array([number]), "image": np.full((1, 2), number)}

  def close(self):
    self.closed = True


def place(batch, step):
  return {"image": batch["image"], "step": step}


@pytest.mark.parametrize("depth", [0, 2])
def test_order_and_numbers_do_not_depend_on_the_depth(depth):
  ahead = Prefetch(Reader(7), place, first=7, depth=depth)
  for expected in range(7, 13):
    index, batch = next(ahead)
    assert index[0] == batch["image"][0, 0] == batch["step"] == expected


def test_it_reads_no_further_than_its_depth():
  reader = Reader(0)
  ahead = Prefetch(reader, place, first=0, depth=2)
  assert reader.read == 0
  next(ahead)
  assert reader.read == 3
  next(ahead)
  assert reader.read == 4
  ahead.close()
  assert reader.closed
