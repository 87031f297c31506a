"""Which examples each step consumed, for audits: `logging.examples`."""

import json
import os
import pathlib

import jax
import numpy as np

from spectraldiffusion_jax.writers import truncate_after


class Ledger:
  """`examples-P.jsonl` of process P: {"step": 7, "index": [4, 0]} a step.

  Steps that are undone, by a resume or by a rollback, leave it. A line is on
  disk before the step's result can be, so what a checkpoint has learned from
  is always in it.

  Args:
    workdir: folder of the file.
    start: step of the checkpoint the run goes on from.
    active: False writes nothing.
  """

  def __init__(self, workdir: pathlib.Path, *, start: int, active: bool):
    self._path = workdir / f"examples-{jax.process_index()}.jsonl"
    self._active, self._file = active, -1
    self.rewind(start)

  def rewind(self, step: int) -> None:
    """Forgets the steps after `step`."""
    if self._active:
      self.close()
      truncate_after(self._path, step)
      how = os.O_WRONLY | os.O_CREAT | os.O_APPEND
      self._file = os.open(self._path, how, 0o644)

  def write(self, step: int, index: np.ndarray) -> None:
    """Adds a step."""
    if self._active:
      line = json.dumps({"step": step, "index": np.asarray(index).tolist()})
      os.write(self._file, line.encode() + b"\n")

  def close(self) -> None:
    """Closes the file; nothing may be written afterwards."""
    if self._file >= 0:
      os.close(self._file)
      self._file = -1
