"""Stopping cleanly: the first signal asks, the second insists."""

import os
import signal
from types import FrameType

import jax
from jax.experimental import multihost_utils

EXIT_CODE = 75
"""Exit code of a run that was stopped, saved, and can be started again
(EX_TEMPFAIL of sysexits.h); 0 means that the run is complete."""

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
  """Context manager; `requested(step)` turns True after SIGTERM or SIGINT.

  With several processes the answer is agreed on: all of them see True at the
  same step (jax.distributed owns SIGTERM then). A second signal ends the
  process at once with 128 + its number.
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

  def requested(self, step: int) -> bool:
    """Whether to save and stop after `step`."""
    if jax.process_count() > 1:
      agreed = multihost_utils.reached_preemption_sync_point(step)
      flags = multihost_utils.process_allgather(self._signalled)
      return bool(agreed or flags.any())
    return self._signalled
