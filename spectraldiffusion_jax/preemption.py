"""Stopping cleanly: the first signal asks, the second insists."""

import os
import signal
import threading
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
  once there is something to say.

  A second signal ends the process at once with 128 + its number, in the midst
  of a compilation or a step as well: a thread counts them as the operating
  system delivers them, where Python's handlers wait for the main thread and
  two signals that wait count once.
  """

  def __init__(self):
    self._asked = False
    self._previous = {}

  def __enter__(self) -> "StopRequest":
    self._reader, self._writer = os.pipe()
    os.set_blocking(self._writer, False)
    self._wakeup = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
    self._insist = threading.Thread(target=self._count, daemon=True)
    self._insist.start()
    for number in SIGNALS:
      if jax.process_count() > 1 and number == signal.SIGTERM:
        continue
      self._previous[number] = signal.signal(number, self._handle)
    return self

  def __exit__(self, *_) -> None:
    for number, handler in self._previous.items():
      signal.signal(number, handler)
    signal.set_wakeup_fd(self._wakeup)
    os.close(self._writer)
    self._insist.join()
    os.close(self._reader)

  def _count(self) -> None:
    """Reads the number of every signal, until the pipe is closed."""
    count = 0
    while number := os.read(self._reader, 1):
      count += number[0] in SIGNALS
      if count > 1:
        os._exit(128 + number[0])

  def _handle(self, number: int, frame: FrameType | None) -> None:
    del number, frame
    self._asked = True
    if jax.process_count() > 1:
      os.kill(os.getpid(), signal.SIGTERM)

  def requested(self, step: int) -> bool:
    """Whether to save and stop after `step`; to be asked at every step."""
    if jax.process_count() > 1:
      return multihost_utils.reached_preemption_sync_point(step)
    return self._asked
