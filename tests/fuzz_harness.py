"""Runs one hostile input at a time, and says what it did."""

import contextlib
import pathlib
import signal
import time
from collections.abc import Callable, Iterator

import numpy as np

from spectraldiffusion_jax.errors import UserError

SECONDS = 10.0  # of processor time, most that one case may take
WAITING = 12.0  # as many times as long it may wait, for a busy machine
GROWTH = 1 << 30  # bytes, most that the process may grow by


class Broken(AssertionError):
  """A case did what no input may do."""


class _Hang(BaseException):
  """Not caught by `except Exception`."""


@contextlib.contextmanager
def _within(seconds: float) -> Iterator[None]:
  def ring(number, frame):
    raise _Hang

  timers = {
    signal.SIGPROF: (signal.ITIMER_PROF, seconds),
    signal.SIGALRM: (signal.ITIMER_REAL, WAITING * seconds),
  }
  previous = {number: signal.signal(number, ring) for number in timers}
  try:
    for timer, limit in timers.values():
      signal.setitimer(timer, limit)
    yield
  finally:
    for number, (timer, _) in timers.items():
      signal.setitimer(timer, 0)
      signal.signal(number, previous[number])


def _memory(name: str) -> int:
  """VmRSS now or VmHWM, its peak since `_forget_peak`, in bytes."""
  for line in pathlib.Path("/proc/self/status").read_text().splitlines():
    if line.startswith(name):
      return int(line.split()[1]) << 10
  raise LookupError(name)


def _forget_peak() -> None:
  pathlib.Path("/proc/self/clear_refs").write_text("5")


def tree(root: pathlib.Path, *, without: pathlib.Path) -> dict:
  """Name -> size and time of change of everything below root but `without`."""
  found = {}
  for path in root.rglob("*"):
    if path != without and without not in path.parents:
      stat = path.lstat()
      changed = stat.st_mtime_ns if path.is_file() else 0
      found[path] = (stat.st_mode, stat.st_size * path.is_file(), changed)
  return found


class Harness:
  """Counts what became of the cases of one surface.

  Every case sees `root/in`, may write to `root/out` and nowhere else below
  root. Times and peaks are those of the worst case.
  """

  def __init__(self, root: pathlib.Path, *, seconds=SECONDS, growth=GROWTH):
    self.root, self.inputs, self.out = root, root / "in", root / "out"
    self._seconds, self._growth = seconds, growth
    self.accepted = self.refused = 0
    self.peak = 0  # bytes
    self.slowest = 0.0  # seconds of processor time
    self.out.mkdir(parents=True, exist_ok=True)
    self.inputs.mkdir(exist_ok=True)

  def run(self, name: str, case: Callable[[], object]) -> None:
    """Runs a case.

    Raises:
      Broken: it raised anything but a UserError of one line, took too long or
        too much memory, or wrote outside the output folder.
    """
    before = tree(self.root, without=self.out)
    _forget_peak()
    start = _memory("VmRSS")
    message, began = None, time.process_time()
    try:
      with _within(self._seconds):
        case()
    except UserError as error:
      message = str(error)
    except _Hang:
      raise Broken(f"{name}: took more than {self._seconds} s") from None
    except Exception as error:
      raise Broken(f"{name}: {type(error).__name__}: {error}") from error
    self.slowest = max(self.slowest, time.process_time() - began)
    self._judge(name, message, _memory("VmHWM") - start)
    if tree(self.root, without=self.out) != before:
      raise Broken(f"{name}: wrote outside the output folder")

  def _judge(self, name: str, message: str | None, growth: int) -> None:
    self.peak = max(self.peak, growth)
    if growth > self._growth:
      raise Broken(f"{name}: took {growth >> 20} MiB")
    if message is None:
      self.accepted += 1
      return
    self.refused += 1
    if "\n" in message or not message.isprintable() or not message:
      raise Broken(f"{name}: {message!r} is no line")

  def summary(self, surface: str) -> str:
    return (
      f"{surface}: {self.accepted} accepted, {self.refused} refused, largest"
      f" growth {self.peak >> 20} MiB, slowest {self.slowest:.1f} s"
    )


def flipped(data: bytes, random: np.random.Generator) -> bytes:
  """The bytes with one to eight bits flipped."""
  damaged = bytearray(data)
  for _ in range(random.integers(1, 9)):
    damaged[random.integers(len(damaged))] ^= 1 << random.integers(8)
  return bytes(damaged)


def mangled(data: bytes, random: np.random.Generator) -> bytes:
  """The bytes flipped, cut short, with a hole, a gap or a repeat."""
  at, end = sorted(random.integers(0, len(data) + 1, 2).tolist())
  kind = random.integers(6)
  if kind < 2:
    return flipped(data, random)
  if kind == 2:
    return data[:at]
  if kind == 3:
    return data[:at] + data[end:]
  if kind == 4:
    return data[:at] + random.bytes(int(random.integers(1, 40))) + data[at:]
  return data[:end] + data[at:]
