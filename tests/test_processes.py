"""Two real processes: who is missed, who dies, who disagrees."""

import signal
import time

import process_runs
import pytest
import toy_scenes

from spectraldiffusion_jax import distributed
from spectraldiffusion_jax.errors import UserError

FLAGS = dict(
  coordinator="",
  num_processes=0,
  process_id=-1,
  initialization_timeout=5,
  heartbeat_timeout=10,
)


@pytest.mark.parametrize(
  ("change", "words"),
  [
    (dict(process_id=1), "--process_id=1 needs --coordinator"),
    (dict(coordinator="here"), "--coordinator=here is not HOST:PORT"),
    (dict(coordinator="here:1"), "not -1 of 0"),
    (dict(coordinator="h:1", num_processes=2, process_id=2), "not 2 of 2"),
  ],
)
def test_flags_that_name_no_process_are_refused(change, words):
  with pytest.raises(UserError, match=words):
    distributed.start(**FLAGS | change)


def test_one_process_needs_no_cluster():
  distributed.start(**FLAGS | dict(num_processes=1))
  assert distributed.together(lambda: 7) == 7
  assert distributed.all_agree(True) and not distributed.all_agree(False)
  distributed.check_same("any", "the config")


@pytest.mark.parametrize(
  ("error", "found"),
  [
    (ValueError("UNKNOWN: Gloo all-reduce failed: Connection reset"), True),
    (RuntimeError("UNAVAILABLE: coordination service"), True),
    (ValueError("operands could not be broadcast"), False),
    (KeyError("nccl"), False),
  ],
)
def test_a_lost_peer_is_told_from_a_defect(error, found):
  assert distributed.lost_peer(error) == found


@pytest.fixture(scope="module")
def fields(tmp_path_factory):
  data = toy_scenes.prepare(tmp_path_factory.mktemp("data"))
  return process_runs.CHEAP | {
    "data.data_root": str(data),
    "training.num_steps": 100_000,
    "logging.save_interval": 10,
  }


def started(fields, workdir):
  """Two processes that have logged a step."""
  running = process_runs.start_training(fields, workdir)
  deadline = time.monotonic() + 280
  while not (workdir / "checkpoints" / "10").exists():
    assert time.monotonic() < deadline
    assert all(process.poll() is None for process in running)
    time.sleep(0.1)
  return running


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_dies_ends_the_other(fields, tmp_path, victim):
  running = started(fields, tmp_path)
  running[victim].kill()
  began = time.monotonic()
  done = process_runs.finish(running, timeout=120)
  print("seconds", time.monotonic() - began, done[1 - victim])
  code, _, err = done[1 - victim]
  assert code in (distributed.LOST_PEER, -signal.SIGABRT)
  if code == distributed.LOST_PEER:
    assert f"process {1 - victim} of 2 lost contact" in err


@pytest.mark.slow
@pytest.mark.parametrize(
  "number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1]
)
def test_a_signal_to_one_stops_and_saves_both(fields, tmp_path, number):
  running = started(fields, tmp_path)
  running[1].send_signal(number)
  done = process_runs.finish(running, timeout=200)
  assert [code for code, _, _ in done] == [75, 75], done
  steps = [int(path.name) for path in (tmp_path / "checkpoints").glob("[0-9]*")]
  assert max(steps) == max(process_runs.logged(tmp_path))


@pytest.mark.slow
def test_a_process_that_does_not_come_is_named_in_time(fields, tmp_path):
  began = time.monotonic()
  (done,) = process_runs.finish(
    process_runs.start_training(fields, tmp_path, missing=1, initialization=10)
  )
  print("seconds", time.monotonic() - began, done)
  assert done[0] != 0


@pytest.mark.slow
def test_configs_that_differ_are_refused(fields, tmp_path):
  both = process_runs.start_training(
    fields, tmp_path, devices=1, extra=(("--config.seed=1",), ())
  )
  done = process_runs.finish(both)
  assert all(code == 2 for code, _, _ in done), done
  assert "the config of process 1 is not that of process 0" in done[0][2]
