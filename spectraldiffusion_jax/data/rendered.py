"""Rendered scenes beside real ones: their exact masks serve as labels."""

import contextlib
import math
from collections.abc import Iterator

import numpy as np

from spectraldiffusion_jax.types import Batch


def joined(own: Iterator[Batch], rendered: Iterator[Batch]) -> Iterator[Batch]:
  """Batches of both; rendered masks become labels.

  Own rows come before rendered ones in each of gcd(own, rendered) equal
  blocks, so that processes holding whole blocks form the same global batch,
  row for row, as one process does.
  """
  with contextlib.closing(own), contextlib.closing(rendered):
    for real, drawn in zip(own, rendered, strict=False):
      drawn = drawn | {"labels": drawn["segmentation"].astype(np.uint8)}
      real = real | {"exact": np.zeros(len(real["index"]), np.float32)}
      drawn = drawn | {"exact": np.ones(len(drawn["index"]), np.float32)}
      yield {n: _dealt(real[n], drawn[n]) for n in real.keys() & drawn}


def _dealt(a: np.ndarray, b: np.ndarray) -> np.ndarray:
  """Rows of both in gcd(len(a), len(b)) blocks, those of `a` first in each."""
  blocks = math.gcd(len(a), len(b))
  parts = [x.reshape(blocks, -1, *x.shape[1:]) for x in (a, b)]
  return np.concatenate(parts, axis=1).reshape(-1, *a.shape[1:])
