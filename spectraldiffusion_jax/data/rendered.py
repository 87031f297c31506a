"""Rendered scenes beside real ones: their exact masks serve as labels."""

import contextlib
from collections.abc import Iterator

import numpy as np

from spectraldiffusion_jax.types import Batch


def joined(own: Iterator[Batch], rendered: Iterator[Batch]) -> Iterator[Batch]:
  """Batches of both, one after the other; rendered masks become labels."""
  with contextlib.closing(own), contextlib.closing(rendered):
    for real, drawn in zip(own, rendered, strict=False):
      drawn = drawn | {"labels": drawn["segmentation"].astype(np.uint8)}
      flags = np.repeat([0, 1], [len(real["index"]), len(drawn["index"])])
      both = {
        n: np.concatenate([real[n], drawn[n]]) for n in real.keys() & drawn
      }
      yield both | {"exact": flags.astype(np.float32)}
