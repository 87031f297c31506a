"""Full disks, damaged files beside the checkpoints, clocks, signals."""

import errno
import json
import os
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from test_checkpoint import CONFIG, abstract, equal, make_state, save

from configs import default
from spectraldiffusion_jax import checkpoint, preemption, rounds, workdir
from spectraldiffusion_jax.errors import UserError
from spectraldiffusion_jax.ledger import Ledger
from spectraldiffusion_jax.retention import Retention

NEW = abstract(make_state(0))


def ids(folder):
  lines = (folder / "examples-0.jsonl").read_text().splitlines()
  return [json.loads(line) for line in lines]


@pytest.mark.parametrize(
  "error",
  [
    OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
    ValueError(
      "RESOURCE_EXHAUSTED: Error writing: Failed to write 9 bytes to file 7:"
      " No space left on device [os_error_code='28']"
    ),
  ],
  ids=["python", "tensorstore"],
)
def test_a_full_disk_is_one_line_and_harms_nothing(
  tmp_path, monkeypatch, error
):
  save(tmp_path, [1, 2])

  def refuse(*_, **__):
    raise error

  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    monkeypatch.setattr(checkpoints._manager, "save", refuse)
    with pytest.raises(UserError, match="No space left") as caught:
      checkpoints.save(3, make_state(3), config=CONFIG, metrics={})
  assert "\n" not in str(caught.value)
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.steps() == [1, 2]
    equal(checkpoints.restore_latest(NEW)[0], make_state(2))


def test_an_error_that_is_not_the_disks_keeps_its_name(tmp_path, monkeypatch):
  def refuse(*_, **__):
    raise ValueError("Gloo all-reduce failed")

  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    monkeypatch.setattr(checkpoints._manager, "save", refuse)
    with pytest.raises(ValueError, match="Gloo") as caught:
      checkpoints.save(3, make_state(3), config=CONFIG, metrics={})
  assert not isinstance(caught.value, UserError)


def test_a_disk_that_fills_up_while_training_is_named(tmp_path):
  for number in (errno.ENOSPC, errno.EROFS):
    with pytest.raises(UserError, match=os.strerror(number)):
      with workdir.locked(tmp_path):
        raise OSError(number, os.strerror(number))
  with pytest.raises(FileNotFoundError):  # a defect is not the disk's fault
    with workdir.locked(tmp_path):
      (tmp_path / "absent").read_text()


def test_a_clock_that_goes_backwards_changes_nothing(tmp_path, monkeypatch):
  save(tmp_path, [1, 2])
  real = time.time
  monkeypatch.setattr(time, "time", lambda: real() - 1e8)
  save(tmp_path, [3], keep_last=2)
  folder = tmp_path / checkpoint.FOLDER
  os.utime(folder / "3", (0, 0))
  with checkpoint.Checkpoints(tmp_path, keep_last=2) as checkpoints:
    state, record = checkpoints.restore_latest(NEW)
    assert checkpoints.steps() == [2, 3] and record["step"] == 3
  equal(state, make_state(3))


def test_what_a_loop_carries_comes_back(tmp_path):
  carried = {"best": {"val/ari": {"value": 0.5, "step": 1}}, "advised": ["x"]}
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(
      1, make_state(1), config=CONFIG, metrics={}, carried=carried
    )
    checkpoints.wait()
    assert checkpoints.restore_latest(NEW)[1]["carried"] == carried


def test_another_set_of_arrays_is_no_damage(tmp_path):
  save(tmp_path, [1])
  less = {k: v for k, v in NEW.items() if k != "half"}
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    with pytest.raises(UserError, match="another set of arrays"):
      checkpoints.restore_latest(less)
    assert checkpoints.steps() == [1]


class Info:
  """What Orbax passes to a policy."""

  def __init__(self, step, planned=1, **scores):
    self.step, self.metrics = step, {"planned": planned} | scores


def kept(infos, **options):
  rule = dict(last=2, every=0, metric="ari", pinned=()) | options
  answers = Retention(**rule).should_preserve(infos, context=None)
  return [i.step for i, a in zip(infos, answers, strict=True) if a]


def test_retention():
  plain = [Info(step) for step in range(10, 60, 10)]
  assert kept(plain) == [40, 50]
  assert kept(plain, every=20) == [20, 40, 50]
  assert kept(plain, pinned=[10]) == [10, 40, 50]
  scored = [Info(10), Info(20, ari=0.9), Info(30, ari=0.2), *plain[3:]]
  assert kept(scored) == [20, 40, 50]
  assert kept(scored, metric="") == [40, 50]
  scored[2].metrics["ari"] = float("nan")
  assert kept(scored) == [20, 40, 50]


def test_stops_do_not_push_planned_checkpoints_out():
  stops = [Info(51, 0), Info(52, 0), Info(53, 0)]
  plain = [Info(30), Info(40), Info(50)]
  assert kept([*plain, *stops]) == [40, 50, 53]
  assert kept([*plain, *stops], every=17) == [40, 50, 53]


def test_rolling_back_passes_over_stops(tmp_path):
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    for step, planned in ((2, True), (3, False)):
      checkpoints.save(
        step, make_state(step), config=CONFIG, metrics={}, planned=planned
      )
    checkpoints.wait()
    assert checkpoints.restore_latest(NEW)[1]["step"] == 3
    state, record = checkpoints.restore_latest(NEW, planned=True)
  assert record["step"] == 2
  equal(state, make_state(2))


LABELS = np.arange(60, dtype=np.uint8).reshape(3, 4, 5)


@pytest.mark.parametrize("kind", ["flipped", "truncated", "empty"])
def test_damaged_labels_are_made_again_from_their_checkpoint(
  tmp_path, caplog, kind
):
  rounds.save(tmp_path, 8, LABELS)
  file = rounds.path(tmp_path, 8)
  np.testing.assert_array_equal(np.load(file), LABELS)  # still plain numpy
  content = file.read_bytes()
  flipped = content[:150] + bytes([content[150] ^ 4]) + content[151:]
  damaged = {"flipped": flipped, "truncated": content[:-40], "empty": b""}
  file.write_bytes(damaged[kind])

  class State:
    step = 11

  asked = []
  options = dict(state=State(), make=lambda state, first: state + first)
  with pytest.raises(UserError, match="8.npy is gone"):
    rounds.obtain(tmp_path, 8, state_of=lambda step: None, **options)
  assert "damaged" in caplog.text
  assert file.with_suffix(".npy.damaged").read_bytes() == damaged[kind]
  found = rounds.obtain(
    tmp_path, 8, state_of=lambda step: asked.append(step) or LABELS, **options
  )
  assert asked == [8]
  np.testing.assert_array_equal(found, LABELS + 8)
  again = rounds.obtain(tmp_path, 8, state_of=None, **options)
  np.testing.assert_array_equal(again, LABELS + 8)


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"seed": ', "\0" * 40])
def test_a_damaged_config_is_kept_aside(tmp_path, caplog, content):
  config = default.get_config()
  workdir.claim(tmp_path, config)
  whole = (tmp_path / workdir.CONFIG_FILE).read_text()
  (tmp_path / workdir.CONFIG_FILE).write_text(content)
  workdir.claim(tmp_path, config)
  assert "damaged" in caplog.text
  assert (tmp_path / workdir.CONFIG_FILE).read_text() == whole
  assert (tmp_path / "config.json.damaged").read_text() == content


def test_the_first_signal_asks_to_stop():
  for number in preemption.SIGNALS:
    before = signal.getsignal(number)
    with preemption.StopRequest() as stop:
      assert not stop.requested(1)
      signal.raise_signal(number)
      assert stop.requested(2)
    assert signal.getsignal(number) is before
    assert signal.set_wakeup_fd(-1) == -1


# Nothing returns to Python while the hash is computed, some minutes.
BUSY = """
import hashlib
from spectraldiffusion_jax.preemption import StopRequest
with StopRequest():
  print("up", flush=True)
  hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)
"""


@pytest.mark.parametrize("number", preemption.SIGNALS)
def test_a_second_signal_exits_at_once(number):
  with subprocess.Popen(
    [sys.executable, "-c", BUSY], stdout=subprocess.PIPE
  ) as process:
    try:
      assert process.stdout.readline() == b"up\n"
      process.send_signal(number)
      time.sleep(0.5)
      assert process.poll() is None
      process.send_signal(number)
      assert process.wait(timeout=60) == 128 + number
    finally:
      process.kill()


def test_the_ledger_forgets_what_is_undone(tmp_path):
  ledger = Ledger(tmp_path, start=0, active=True)
  for step in (1, 2, 3):
    ledger.write(step, np.array([step, 9]))
  with open(tmp_path / "examples-0.jsonl", "a") as file:
    file.write('{"step": 4, "ind')  # torn by a kill
  ledger.close()
  ledger = Ledger(tmp_path, start=2, active=True)
  ledger.write(3, np.array([7, 7]))
  ledger.close()
  assert [line["step"] for line in ids(tmp_path)] == [1, 2, 3]
  assert ids(tmp_path)[-1] == {"step": 3, "index": [7, 7]}
  Ledger(tmp_path / "none", start=0, active=False).write(1, np.array([1]))
  assert not (tmp_path / "none").exists()
  assert jax.process_index() == 0
