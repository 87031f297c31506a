"""The ablation: cells that fit the configs, resumption, and the table."""

import dataclasses
import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from configs import procedural
from spectraldiffusion_jax.ablation import (
  chart,
  one,
  report,
  runner,
)
from spectraldiffusion_jax.errors import UserError

ROOT = pathlib.Path(__file__).resolve().parent.parent
IMAGES = 40


def result(mean, *, seed=0, controls=False, **fields):
  """What a run of a cell leaves: scores around `mean`, image by image."""
  shift = np.random.default_rng(seed).normal(0, 0.01, IMAGES)
  names = ("trained", "step0", "training_free") if controls else ("trained",)
  return {
    "scores": {
      name: {m: list(mean - 0.3 * i + shift) for m in one.SCORES}
      for i, name in enumerate(names)
    },
    "split": "test",
    "seconds": 60.0,
    "seconds_per_step": 0.2 + 0.01 * seed,
    "peak_mb": 900 + seed,
  } | fields


def told(share):
  return {"colour": share, "shading": share / 2, "size": -share}


def test_the_command_answers_a_wrong_name_in_one_line(tmp_path):
  done = subprocess.run(
    [
      sys.executable,
      "launch/ablate.py",
      "--config=configs/procedural.py",
      f"--workdir={tmp_path / 'a'}",
      "--cells=nonsense",
    ],
    cwd=ROOT,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 2 and "--cells='nonsense'" in done.stderr
  assert len(done.stderr.strip().splitlines()) == 1
  assert not (tmp_path / "a").exists()


def test_means_spreads_and_paired_differences():
  results = {
    "full": {s: result(0.9 + 0.01 * s, seed=s, controls=True) for s in (0, 1)},
    "gru_update": {s: result(0.8 + 0.01 * s, seed=s) for s in (0, 1)},
  }
  rows = {row["name"]: row for row in report.summarise(results)}
  assert list(rows) == ["training_free", "step0", "full", "gru_update"]
  base = [np.random.default_rng(s).normal(0, 0.01, IMAGES) for s in (0, 1)]
  means = [0.9 + 0.01 * s + base[s].mean() for s in (0, 1)]
  full = rows["full"]
  assert full["ari"] == pytest.approx(np.mean(means))
  assert full["ari_sd"] == pytest.approx(np.std(means, ddof=1))
  assert full["ari_gain"] is None
  # The same images and seeds: all that is left is the difference put in.
  gru = rows["gru_update"]
  assert gru["ari_gain"] == pytest.approx(-0.1)
  assert gru["ari_gain_se"] == pytest.approx(0, abs=1e-9)
  assert rows["step0"]["ari_gain"] == pytest.approx(-0.3)
  assert gru["seconds_per_step"] == 0.2 and gru["peak_mb"] == 901


def test_standard_error_counts_images_and_seeds():
  random = np.random.default_rng(0)
  errors, sizes = [], []
  for _ in range(400):
    seeds = random.normal(0, 0.02, (4, 1))
    images = random.normal(0, 0.05, (1, 50))
    mean, error = report.difference(list(seeds + images))
    errors.append(mean)
    sizes.append(error)
  assert np.std(errors) == pytest.approx(
    np.hypot(0.01, 0.05 / 50**0.5), rel=0.1
  )
  assert np.sqrt(np.mean(np.square(sizes))) == pytest.approx(
    np.std(errors), rel=0.1
  )
  assert report.difference([]) == (None, None)
  mean, error = report.difference([np.array([1.0, np.nan, 3.0])])
  assert (mean, error) == (2.0, pytest.approx(1.0))


def test_table_chart_and_json_agree(tmp_path):
  results = {
    "phase1": {0: result(0.1)},
    "full": {
      0: result(0.9, controls=True, readout=told(0.8)),
      1: result(0.95, controls=True, readout=told(0.6)),
    },
    "no_grey": {0: {"scores": {}, "split": "test", "diverged": True}},
  }
  text = report.write(results, tmp_path)
  lines = text.splitlines()
  assert (tmp_path / "ablation.md").read_text() == text
  assert len({line.count("|") for line in lines}) == 1
  names = [line.split("|")[1].strip() for line in lines[2:]]
  assert names == ["training_free", "step0", "phase1", "full", "no_grey"]
  assert "-0.800 +- " in lines[4] and "1 diverged" in lines[6]
  assert "| 0.70, 0.35, -0.70 |" in lines[5] and "0.70," not in lines[4]
  assert "slots tell" in lines[0]
  (tmp_path / "untold").mkdir()
  untold = report.write({"full": {0: result(0.9)}}, tmp_path / "untold")
  assert "slots tell" not in untold and "ARI - full" not in untold
  rows = json.loads((tmp_path / "ablation.json").read_text())
  assert [row["name"] for row in rows] == names
  picture = chart.draw(rows, report.METRICS)
  assert (tmp_path / "ablation.png").stat().st_size > 1000
  assert picture.dtype == np.uint8 and picture.min() < 50
  # A longer bar has more of its colour.
  bars = (picture == chart.COLOURS["ari"]).all(-1).sum(1)
  centre = [
    chart.SCALE * int(chart.TOP + chart.LINE * (i + 0.5) + 4) for i in (2, 3)
  ]
  assert bars[centre[1]] > 3 * bars[centre[0]] > 0


@dataclasses.dataclass
class Runs:
  """Stands in for the processes: what ran, and what each one returns."""

  codes: list
  done: list = dataclasses.field(default_factory=list)

  def __call__(self, place, split, *, controls):
    self.done.append(place.name)
    code = self.codes.pop(0) if self.codes else 0
    (place / "log.txt").write_text("error: the disk is full\n")
    if code == 0:
      content = result(0.9, controls=controls, split=split)
      (place / one.RESULT).write_text(json.dumps(content))
    return code


def ablate(monkeypatch, folder, *, codes=(), seeds=2, split="test", **fields):
  runs = Runs(list(codes))
  monkeypatch.setattr(runner, "run_one", runs)
  config = procedural.get_config().copy_and_resolve_references()
  config.training.update(fields)
  code = runner.run(
    config, folder, seeds=seeds, names=["full", "gru_update"], split=split
  )
  return code, runs.done


@pytest.mark.parametrize("stopped", [75, 143, -9])
def test_finished_cells_are_kept_and_a_stopped_one_comes_again(
  monkeypatch, tmp_path, capsys, stopped
):
  code, done = ablate(monkeypatch, tmp_path, codes=[0, stopped])
  assert code == 75 and done == ["full-0", "gru_update-0"]
  assert "gru_update" not in (tmp_path / "ablation.md").read_text()
  code, done = ablate(monkeypatch, tmp_path)
  assert code == 0 and done == ["gru_update-0", "full-1", "gru_update-1"]
  printed = capsys.readouterr().out
  assert "cell 1 of 4: full, seed 0: done before" in printed
  assert "cell 3 of 4: full, seed 1, eta 0:00:0" in printed
  assert printed.endswith((tmp_path / "ablation.md").read_text() + "\n")
  assert ablate(monkeypatch, tmp_path)[1] == []


def test_results_of_another_config_or_split_are_refused(monkeypatch, tmp_path):
  ablate(monkeypatch, tmp_path, seeds=1)
  with pytest.raises(UserError, match=r"training.num_steps: [0-9]+ -> 5"):
    ablate(monkeypatch, tmp_path, seeds=1, num_steps=5)
  with pytest.raises(UserError, match="split: test -> validation"):
    ablate(monkeypatch, tmp_path, seeds=1, split="validation")


def test_a_diverged_cell_is_a_row_and_a_failed_one_an_error(
  monkeypatch, tmp_path
):
  code, done = ablate(monkeypatch, tmp_path, codes=[0, 3], seeds=1)
  assert code == 0 and len(done) == 2
  assert "1 diverged" in (tmp_path / "ablation.md").read_text()
  with pytest.raises(UserError, match="full, seed 0: error: the disk is full"):
    ablate(monkeypatch, tmp_path / "b", codes=[2], seeds=1)


def test_the_fastest_interval_counts(tmp_path):
  rates = (0.1, 4.0, 2.0)
  path = tmp_path / "metrics.jsonl"
  path.write_text(
    "".join(
      json.dumps({"step": i, "steps_per_second": r}) + "\n"
      for i, r in enumerate(rates)
    )
  )
  assert one.fastest(path) == pytest.approx(0.25)


def run_command(flags):
  done = subprocess.run(
    [sys.executable, "launch/ablate.py", *flags],
    cwd=ROOT,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_two_cells_at_32_pixels(tmp_path):
  flags = [
    "--config=configs/procedural.py",
    f"--workdir={tmp_path / 'a'}",
    "--seeds=1",
    "--cells=full,no_diffusion",
    "--split=test[:8]",
    f"--config.data.data_root={tmp_path / 'data'}",
    "--config.data.dataset=procedural_clevr/easy_32",
    "--config.data.train_split=train[:16]",
    "--config.data.val_split=validation[:8]",
    "--config.model.image_size=32",
    "--config.model.width=8",
    "--config.model.slot_dim=16",
    "--config.model.num_iterations=1",
    "--config.mamba_slot.d_state=4",
    "--config.diffusion.width=8",
    "--config.training.batch_size=4",
    "--config.training.num_steps=4",
    "--config.logging.log_interval=1",
  ]
  run_command(flags)
  rows = json.loads((tmp_path / "a" / "ablation.json").read_text())
  assert [row["name"] for row in rows] == [
    "training_free",
    "step0",
    "full",
    "no_diffusion",
  ]
  assert all(np.isfinite(row["ari"]) for row in rows)
  assert rows[2]["seconds_per_step"] > 0 and rows[2]["peak_mb"] > 100
  assert rows[0]["ari"] > rows[1]["ari"]
  assert all(np.isfinite(row["slots_colour"]) for row in rows[2:])
  flags = [
    f"--trained={tmp_path / 'a' / 'cells' / 'full-0' / 'run'}",
    f"--workdir={tmp_path / 'b'}",
    "--cells=full,no_sharpening",
    "--split=test[:8]",
  ]
  run_command(flags)
  again = json.loads((tmp_path / "b" / "ablation.json").read_text())
  assert [r["name"] for r in again] == [
    "training_free",
    "full",
    "no_sharpening",
  ]
  assert again[1]["ari"] == pytest.approx(rows[2]["ari"], abs=1e-6)
