"""When the loss is not finite: what it was, where, and what to change."""

import json
import pathlib
from collections.abc import Mapping

import jax
import numpy as np
from jax.experimental import multihost_utils

FILE = "divergence.json"


class Watch:
  """Remembers the steps since the last look, and finds those that failed.

  The train step refuses a bad update by itself, so looking can wait until
  the host needs numbers anyway: no step is ever slowed down.
  """

  def __init__(self, workdir: pathlib.Path, *, max_skips: int = 0):
    self._workdir, self._max_skips = workdir, max_skips
    self._recent, self._skipped = [], []

  def remember(self, step: int, metrics: Mapping, index: np.ndarray) -> None:
    """Keeps a step's metrics (still on the devices) and its batch's ids."""
    self._recent.append((step, metrics, index))

  def diverged(self) -> bool:
    """Whether more steps failed than are forgiven; then says so on disk."""
    for step, metrics, index in self._recent:
      if not float(metrics["finite"]):
        # In every process at once, for the metrics are the same in all.
        index = multihost_utils.process_allgather(index, tiled=True)
        self._skipped.append(describe(step, metrics, index))
        print(f"step {step} was skipped: {_what(self._skipped[-1])}")
    self._recent.clear()
    if len(self._skipped) <= self._max_skips:
      return False
    path = self._workdir / FILE
    if jax.process_index() == 0:
      path.write_text(json.dumps(self._skipped, indent=2) + "\n")
    print(
      f"error: {_what(self._skipped[-1])} at step {self._skipped[-1]['step']};"
      f" no bad update was applied; see {path}; lower training.learning_rate"
      " or training.grad_clip, or raise training.max_skips"
    )
    return True


def describe(step: int, metrics: Mapping, index: np.ndarray) -> dict:
  """Terms that were not finite, all norms, and the examples of the batch."""
  values = {name: float(value) for name, value in metrics.items()}
  return {
    "step": step,
    "terms": [
      name
      for name, value in values.items()
      if not np.isfinite(value) and name.endswith("_loss")
    ],
    "metrics": {
      name: value if np.isfinite(value) else str(value)
      for name, value in values.items()
    },
    "batch_index": np.asarray(index).tolist(),
  }


def _what(report: Mapping) -> str:
  return f"{', '.join(report['terms']) or 'the gradient'} not finite"
