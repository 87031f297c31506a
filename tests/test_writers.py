"""The lines of metrics.jsonl through kills and resumes; events read back."""

import json
import math
import os
import signal
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import (
  EventAccumulator,
)

from spectraldiffusion_jax.errors import UserError
from spectraldiffusion_jax.writers import (
  MetricWriter,
  Progress,
  truncate_after,
)


def records(workdir):
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  return [json.loads(line, parse_constant=pytest.fail) for line in lines]


def steps(workdir):
  return [record["step"] for record in records(workdir)]


def log(workdir, wanted, **options):
  with MetricWriter(workdir, **options) as writer:
    for step in wanted:
      writer.write_scalars(step, {"train/loss": 1 / step})


def events(folder):
  accumulator = EventAccumulator(str(folder), size_guidance={"tensors": 0})
  return accumulator.Reload()


def test_one_json_object_a_step(tmp_path):
  with MetricWriter(tmp_path) as writer:
    writer.write_scalars(1, {"train/loss": jnp.float32(0.5), "val/n": 7})
    # On disk at once, without flush or close.
    assert records(tmp_path) == [{"step": 1, "train/loss": 0.5, "val/n": 7}]
    writer.write_scalars(
      2, {"train/loss": np.float64("nan"), "val/ari": math.inf}
    )
  assert records(tmp_path)[1] == {
    "step": 2,
    "train/loss": None,
    "val/ari": None,
  }


def test_a_step_has_one_line_however_often_it_is_logged(tmp_path):
  with MetricWriter(tmp_path) as writer:
    writer.write_scalars(1, {"train/loss": 2.0})
    writer.write_scalars(3, {"train/loss": 0.123456789, "train/n": 1})
    writer.write_scalars(3, {"val/ari": 0.9})
    assert records(tmp_path)[1] == {
      "step": 3,
      "train/loss": 0.123456789,
      "train/n": 1,
      "val/ari": 0.9,
    }
    # A shorter line leaves nothing of the longer one behind.
    writer.write_scalars(3, {"train/loss": 0.5})
    writer.write_scalars(4, {"train/loss": 0.25})
    with pytest.raises(ValueError, match="step 2 logged after step 4"):
      writer.write_scalars(2, {"train/loss": 1.0})
  # So it is after a resume at the last step that was logged.
  with MetricWriter(tmp_path, start=4) as writer:
    writer.write_scalars(4, {"val/ari": 0.8})
  assert [r.pop("step") for r in records(tmp_path)] == [1, 3, 4]
  assert records(tmp_path)[1]["train/loss"] == 0.5
  assert records(tmp_path)[2] == {"step": 4, "train/loss": 0.25, "val/ari": 0.8}


def test_resume_leaves_no_gap_and_no_double_line(tmp_path):
  log(tmp_path, [10, 20, 30, 40])
  log(tmp_path, [30, 40, 50], start=20)
  assert steps(tmp_path) == [10, 20, 30, 40, 50]
  # The checkpoint may lie between two logged steps.
  log(tmp_path, [50, 60], start=45)
  assert steps(tmp_path) == [10, 20, 30, 40, 50, 60]
  # Killed before the first checkpoint: all of it is logged again.
  log(tmp_path, [10, 20])
  assert steps(tmp_path) == [10, 20]


def test_torn_last_line_is_dropped_and_a_torn_middle_is_named(tmp_path):
  path = tmp_path / "metrics.jsonl"
  for torn in ('{"step": 3, "tr', '{"step"', "{}", "3"):
    path.write_text('{"step": 1}\n{"step": 2}\n' + torn)
    assert truncate_after(path, 9) == ({"step": 2}, 12)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
  # Only the newline is missing: the line is whole and stays.
  path.write_text('{"step": 1}\n{"step": 2}')
  assert truncate_after(path, 9) == ({"step": 2}, 12)
  assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
  path.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
  with pytest.raises(UserError, match="line 2"):
    truncate_after(path, 9)
  assert truncate_after(tmp_path / "none.jsonl", 5) == ({}, 0)


def test_events_hold_scalars_images_and_text(tmp_path):
  image = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
  with MetricWriter(tmp_path, log_dir=str(tmp_path / "tb")) as writer:
    writer.write_scalars(5, {"train/loss": 0.25, "val/pq": math.nan})
    writer.write_images(5, {"val/panels": image})
    writer.write_text(5, {"advice": "slots collapsed: **0.9**"})
    # Everything can be read while the run is still going on.
    read = events(tmp_path / "tb")
  assert read.Scalars("train/loss")[0].value == 0.25
  assert math.isnan(read.Scalars("val/pq")[0].value)
  shown = read.Images("val/panels")[0]
  assert (shown.step, shown.height, shown.width) == (5, 4, 6)
  text = read.Tensors("advice/text_summary")[0].tensor_proto.string_val[0]
  assert text == b"slots collapsed: **0.9**"
  assert not list(tmp_path.glob("events*"))


def test_resume_purges_later_events(tmp_path):
  # All within one second, as after a quick restart: no file is overwritten.
  log(tmp_path, [1, 2, 3, 4])
  log(tmp_path, [3, 4, 5], start=2)
  log(tmp_path, [6], start=5)
  assert len(list(tmp_path.glob("events*"))) == 3
  read = [e.step for e in events(tmp_path).Scalars("train/loss")]
  assert read == [1, 2, 3, 4, 5, 6]


def test_other_processes_write_nothing(tmp_path, capsys):
  log(tmp_path / "w", [1, 1], active=False)
  assert not (tmp_path / "w").exists()
  Progress(total=10, batch_size=1, active=False).log(1, 1.0)
  assert capsys.readouterr().out == ""


def test_sigkill_loses_no_logged_line(tmp_path, root):
  code = (
    "import sys; from spectraldiffusion_jax.writers import MetricWriter\n"
    f"w = MetricWriter({str(tmp_path)!r})\n"
    "for step in range(1, 10**9):\n"
    "  w.write_scalars(step, {'train/loss': 0.5})\n"
    "  if step == 50: print('go', flush=True)\n"
  )
  process = subprocess.Popen(
    [sys.executable, "-c", code],
    cwd=root,
    stdout=subprocess.PIPE,
    env=os.environ | {"JAX_PLATFORMS": "cpu"},
  )
  with process:
    assert process.stdout.readline() == b"go\n"
    process.send_signal(signal.SIGKILL)
  last = truncate_after(tmp_path / "metrics.jsonl", 10**9)[0]["step"]
  assert last >= 50
  assert steps(tmp_path) == list(range(1, last + 1))
  log(tmp_path, [41], start=40)
  read = [e.step for e in events(tmp_path).Scalars("train/loss")]
  assert read == steps(tmp_path) == list(range(1, 42))


def test_progress_lines(capsys):
  now = [0.0]
  progress = Progress(total=90, batch_size=8, clock=lambda: now[0])
  with progress.compiling():
    now[0] = 100.0
  progress.log(1, 0.75)  # the step that was compiled says nothing
  now[0] = 109.0  # 9 steps in 9 s
  progress.log(10, 0.5)
  with progress.paused():
    now[0] += 1000.0
  now[0] += 5.0  # 2 steps/s: 0.7 * 1 + 0.3 * 2 = 1.3; 70 / 1.3 = 54 s
  rates = progress.log(20, 0.25, 0.9)
  assert rates == {"steps_per_second": 2.0, "images_per_second": 16.0}
  now[0] += 10.0  # 1 step/s: 0.7 * 1.3 + 0.3 * 1 = 1.21; 60 / 1.21 = 50 s
  progress.log(30, 0.125, ari=0.9)
  assert capsys.readouterr().out.splitlines() == [
    "compiling the training step",
    "step  1/90  0.00 steps/s  0 images/s  eta unknown  loss 0.75",
    "step 10/90  1.00 steps/s  8 images/s  eta 0:01:20  loss 0.5",
    "step 20/90  2.00 steps/s  16 images/s  eta 0:00:54  loss 0.25  ari 0.900",
    "step 30/90  1.00 steps/s  8 images/s  eta 0:00:50  loss 0.125  ari 0.900",
  ]


def test_progress_after_a_resume_and_at_the_end(capsys):
  now = [0.0]
  progress = Progress(total=50, batch_size=1, start=40, clock=lambda: now[0])
  now[0] = 2.0
  assert progress.log(50, 1.0)["steps_per_second"] == 5.0
  assert progress.log(50, 1.0)["steps_per_second"] == 0.0
  assert "eta 0:00:00" in capsys.readouterr().out.splitlines()[-1]
