"""Stopping cleanly: the first signal asks, the second insists."""

import os
import signal
from types import FrameType

import jax
from jax.experimental import multihost_utils

EXIT_CODE = 75
"""Exit code of a run that was stopped, saved, and can be started again
(EX_TEMPFAIL of sysexits.h); 0 means that the run is complete."""

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""SIGUSR1 is what Slurm is told to send ahead of a time limit."""


class StopRequest:
  """Context manager; `requested(step)` turns True after one of SIGNALS.

  With several processes a signal to any of them counts for all: the other
  signals are passed on as SIGTERM, which jax.distributed owns then, and all
  see True at the same step. No step waits for that: the processes only talk
  once there is something to say. A second signal ends the process at once
  with 128 + its number.
  """

  def __init__(self):
    self._signalled = False
    self._previous = {}

  def __enter__(self) -> "StopRequest":
    for number in SIGNALS:
      if jax.process_count() > 1 and number == signal.SIGTERM:
        continue
      self._previous[number] = signal.signal(number, self._handle)
    return self

  def __exit__(self, *_) -> None:
    for number, handler in self._previous.items():
      signal.signal(number, handler)

  def _handle(self, number: int, frame: FrameType | None) -> None:
    del frame
    if self._signalled:
      os._exit(128 + number)
    self._signalled = True
    if jax.process_count() > 1:
      os.kill(os.getpid(), signal.SIGTERM)

  def requested(self, step: int) -> bool:
    """Whether to save and stop after `step`; to be asked at every step."""
    if jax.process_count() > 1:
      return multihost_utils.reached_preemption_sync_point(step)
    return self._signalled
