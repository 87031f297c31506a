"""What a run leaves behind while it trains: metrics.jsonl, events, progress.

`metrics.jsonl` has one JSON object a logged step, steps strictly ascending:
{"step": 40, "train/loss": 0.0123, ...}. A number that is not finite is null,
because JSON has no NaN; TensorBoard keeps the original.
"""

import contextlib
import datetime
import errno
import json
import math
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import UInt8
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog

from spectraldiffusion_jax.errors import UserError


class MetricWriter:
  """Writes scalars to metrics.jsonl and, with images and text, to events.

  A context manager. On every process but the first it does nothing. Scalars
  are in the file when `write_scalars` returns, so what was logged before a
  checkpoint survives whatever kills the run after it.

  Args:
    workdir: folder of metrics.jsonl.
    log_dir: folder of the TensorBoard events; "" is the workdir.
    start: step of the checkpoint the run goes on from: lines and events of
      later steps are dropped, for they will be logged again.
    active: whether this process writes; None: whether it is the first.
  """

  def __init__(
    self,
    workdir: str | os.PathLike,
    *,
    log_dir: str = "",
    start: int = 0,
    active: bool | None = None,
  ):
    self._active = jax.process_index() == 0 if active is None else active
    if not self._active:
      return
    path = pathlib.Path(workdir) / "metrics.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    self._record, self._offset = truncate_after(path, start)
    # Unbuffered: each line is one write, whole or, if torn, the last one.
    self._lines = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    self._events = _open_events(log_dir or workdir, start)

  def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
    """Log numbers of one step; a second call for the step extends its line.

    Raises:
      ValueError: the step lies before the last one logged.
    """
    if not self._active:
      return
    last = self._record.get("step", -1)
    if step < last:
      raise ValueError(f"step {step} logged after step {last}")
    if step > last:
      self._record, self._offset = {"step": step}, self._size()
    values = {name: _number(value) for name, value in scalars.items()}
    self._record |= {
      n: v if math.isfinite(v) else None for n, v in values.items()
    }
    line = json.dumps(self._record).encode() + b"\n"
    if os.pwrite(self._lines, line, self._offset) < len(line):
      raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    os.ftruncate(self._lines, self._offset + len(line))
    for name, value in values.items():
      self._add(step, summary.scalar(name, value))
    self._events.flush()

  def write_images(
    self, step: int, images: Mapping[str, UInt8[np.ndarray, "H W 3"]]
  ) -> None:
    """Log pictures to TensorBoard."""
    if self._active:
      for name, image in images.items():
        self._add(step, summary.image(name, image, dataformats="HWC"))
      self._events.flush()

  def write_text(self, step: int, texts: Mapping[str, str]) -> None:
    """Log Markdown to TensorBoard."""
    if self._active:
      for name, text in texts.items():
        self._add(step, summary.text(name, text))
      self._events.flush()

  def flush(self) -> None:
    """Wait until the disk holds everything, power cuts included."""
    if self._active:
      os.fsync(self._lines)
      self._events.flush()

  def close(self) -> None:
    """Flush and close; nothing may be written afterwards."""
    if self._active:
      self.flush()
      os.close(self._lines)
      self._events.close()
      self._active = False

  def __enter__(self) -> "MetricWriter":
    return self

  def __exit__(self, *exception) -> None:
    self.close()

  def _size(self) -> int:
    return os.fstat(self._lines).st_size

  def _add(self, step, what) -> None:
    event = Event(step=step, wall_time=time.time(), summary=what)
    self._events.write_event(event)


def truncate_after(
  path: str | os.PathLike, step: int
) -> tuple[dict[str, Any], int]:
  """Drop the lines of a metrics.jsonl after `step`, and a torn last line.

  The file is replaced as a whole: a kill leaves the old one or the new one.

  Returns:
    The last record that is left, {} if none is, and the byte it starts at.

  Raises:
    UserError: a line other than the last is no JSON object with a step.
  """
  path = pathlib.Path(path)
  content = path.read_bytes() if path.exists() else b""
  lines = content.splitlines()
  kept, last, offset = b"", {}, 0
  for number, line in enumerate(lines, 1):
    try:
      record = json.loads(line)
      logged = int(record["step"])
    except (ValueError, KeyError, TypeError):
      if number == len(lines):
        break  # torn by the kill that made this resume necessary
      raise UserError(
        f"{path} line {number} is not a logged step: mend or delete that line"
      ) from None
    if logged <= step:
      last, offset = record, len(kept)
      kept += line + b"\n"
  if kept != content:
    partial = path.with_name(f".{path.name}.partial")
    with open(partial, "wb") as file:
      file.write(kept)
      file.flush()
      os.fsync(file.fileno())
    os.replace(partial, path)
  return last, offset


class Progress:
  """One line a report: step, rates, time left, loss and latest ARI.

  Plain lines, for terminals, pipes and log files alike. On every process but
  the first it measures and prints nothing.

  Args:
    total: step at which the run ends.
    batch_size: images a step, over all devices.
    start: step at which it begins, after a resume.
    active: whether this process prints; None: whether it is the first.
    clock: seconds, replaced in tests.
  """

  def __init__(
    self,
    *,
    total: int,
    batch_size: int,
    start: int = 0,
    active: bool | None = None,
    clock: Callable[[], float] = time.monotonic,
  ):
    self._active = jax.process_index() == 0 if active is None else active
    self._total, self._batch = total, batch_size
    self._step, self._clock, self._since = start, clock, clock()
    self._rate = 0.0

  def log(
    self, step: int, loss: float, ari: float | None = None
  ) -> dict[str, float]:
    """Print a line, and return `steps_per_second` and `images_per_second`.

    Rates are those since the last line, pauses not counted; the time left is
    from a moving average of them.
    """
    now = self._clock()
    rate = (step - self._step) / max(now - self._since, 1e-9)
    self._step, self._since = step, now
    known = self._rate > 0
    self._rate = 0.7 * self._rate + 0.3 * rate if known else rate
    if self._active:
      steps, left = self._total - step, "unknown"
      if self._rate or not steps:
        seconds = steps / max(self._rate, 1e-9)
        left = datetime.timedelta(seconds=round(min(seconds, 1e9)))
      parts = [
        f"step {step:{len(str(self._total))}d}/{self._total}",
        f"{rate:.2f} steps/s",
        f"{rate * self._batch:.0f} images/s",
        f"eta {left}",
        f"loss {float(loss):.4g}",
      ]
      if ari is not None:
        parts.append(f"ari {float(ari):.3f}")
      print("  ".join(parts), file=sys.stdout, flush=True)
    return {
      "steps_per_second": rate,
      "images_per_second": rate * self._batch,
    }

  @contextlib.contextmanager
  def paused(self, *, steps: int = 0) -> Iterator[None]:
    """Time that belongs to no step: evaluation, pictures, checkpoints.

    Args:
      steps: made meanwhile, which no rate counts.
    """
    start = self._clock()
    try:
      yield
    finally:
      self._since += self._clock() - start
      self._step += steps

  @contextlib.contextmanager
  def compiling(self) -> Iterator[None]:
    """The first step, in which a minute or more goes into compilation."""
    if self._active:
      print("compiling the training step", flush=True)
    with self.paused(steps=1):
      yield


def _number(value) -> int | float:
  """Python number of a scalar of Python, numpy or JAX."""
  value = np.asarray(value)
  return int(value) if value.dtype.kind in "iub" else float(value)


def _open_events(folder, start) -> EventsWriter:
  """New event file, sorted after those there and outdating their later steps.

  The synchronous writer: the usual SummaryWriter queues, so that its flush
  does not bring everything to disk, and names files by the second, so that a
  quick restart would overwrite one.
  """
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  earlier = len(list(folder.glob("events.out.tfevents.*")))
  events = EventsWriter(str(folder / "events"), f".{earlier:05d}")
  if earlier:
    begin = SessionLog(status=SessionLog.START)
    events.write_event(Event(step=start + 1, session_log=begin))
  return events
