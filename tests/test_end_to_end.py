"""The real commands on a tiny run: train, be killed, go on, score, segment."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

import spectraldiffusion_jax as sd

ROOT = pathlib.Path(__file__).resolve().parent.parent
STEPS, SAVE = 12, 3
SLOW, STOPS = pytest.mark.slow, (signal.SIGTERM, signal.SIGINT)
KILLS = [signal.SIGKILL, *(pytest.param(n, marks=SLOW) for n in STOPS)]
TINY = [
  "--config=configs/procedural.py:easy",
  "--config.data.dataset=procedural_clevr/easy_32",
  "--config.data.train_split=train[:32]",
  "--config.data.val_split=validation[:8]",
  "--config.model.image_size=32",
  "--config.model.width=8",
  "--config.model.slot_dim=16",
  "--config.model.num_iterations=1",
  "--config.mamba_slot.d_state=4",
  "--config.mamba_slot.use_spatial_fusion=false",
  "--config.diffusion.width=16",
  "--config.training.batch_size=4",
  f"--config.training.num_steps={STEPS}",
  "--config.logging.log_interval=2",
  f"--config.logging.save_interval={SAVE}",
  "--config.logging.val_interval=1",
  "--config.logging.image_interval=12",
]


def command(script, *flags, data=None, wait=True):
  where = [f"--config.data.data_root={data}"] if data else []
  process = subprocess.Popen(
    [sys.executable, f"launch/{script}.py", *flags, *where],
    cwd=ROOT,
    env=os.environ | {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"},
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )
  if not wait:
    return process
  out, err = process.communicate(timeout=560)
  return process.returncode, out, err


@pytest.fixture(scope="module")
def place(tmp_path_factory):
  """Data and a finished, undisturbed run."""
  root = tmp_path_factory.mktemp("end_to_end")
  data = root / "data"
  code, out, err = command(
    "train", *TINY, f"--workdir={root / 'whole'}", data=data
  )
  assert code == 0, err
  assert "steps/s" in out and "eta" in out and "ari" in out
  return {"root": root, "data": data, "run": root / "whole"}


def lines(run):
  text = (run / "metrics.jsonl").read_text()
  return [json.loads(line) for line in text.splitlines()]


def timeless(run):
  return [
    {k: v for k, v in line.items() if not k.endswith("per_second")}
    for line in lines(run)
  ]


def parameters(run):
  return sd.load(run).params


def same(a, b):
  flat_a, flat_b = (dict(_flat(tree)) for tree in (a, b))
  assert flat_a.keys() == flat_b.keys()
  for name, value in flat_a.items():
    np.testing.assert_array_equal(value, flat_b[name], err_msg=name)


def _flat(tree, prefix=""):
  for name, value in tree.items():
    if isinstance(value, dict):
      yield from _flat(value, f"{prefix}{name}/")
    else:
      yield prefix + name, np.asarray(value)


def test_metrics_have_the_guides_names_and_no_gap(place):
  logged = lines(place["run"])
  steps = [line["step"] for line in logged]
  assert steps == sorted(set(steps)) and set(range(2, STEPS + 1, 2)) <= set(
    steps
  )
  for name in (
    "train/loss",
    "train/diffusion_loss",
    "train/gmm_prior_loss",
    "train/slot_similarity",
    "train/attention_entropy",
    "learning_rate",
  ):
    assert all(np.isfinite(line[name]) for line in logged), name
  assert {"val/ari", "val/fg_ari", "val/mbo"} <= logged[-1].keys()


@pytest.mark.parametrize("kill", KILLS)
def test_a_killed_run_goes_on_as_if_nothing_had_happened(place, kill):
  run = place["root"] / f"killed-{kill.name}"
  flags = [*TINY, f"--workdir={run}"]
  process = command("train", *flags, data=place["data"], wait=False)
  deadline = time.monotonic() + 200
  while not (run / "checkpoints" / str(SAVE)).exists():
    assert time.monotonic() < deadline and process.poll() is None
    time.sleep(0.02)
  process.send_signal(kill)
  process.communicate(timeout=300)
  assert process.returncode == (-kill if kill == signal.SIGKILL else 75)
  code, _, err = command("train", *flags, data=place["data"])
  assert code == 0, err
  same(parameters(run), parameters(place["run"]))
  assert timeless(run) == timeless(place["run"])


def test_a_complete_run_is_left_alone(place):
  before = (place["run"] / "metrics.jsonl").read_bytes()
  code, out, _ = command(
    "train",
    *TINY,
    f"--workdir={place['run']}",
    data=place["data"],
  )
  assert code == 0 and "complete" in out
  assert (place["run"] / "metrics.jsonl").read_bytes() == before


def test_a_run_can_start_from_the_state_of_another(place):
  run = place["root"] / "resumed"
  flags = [
    *TINY,
    f"--workdir={run}",
    f"--resume={place['run']}",
    f"--config.training.num_steps={STEPS + 2}",
    "--config.composite.rounds=1",
  ]
  code, out, err = command("train", *flags, data=place["data"])
  assert code == 0, err
  assert [line["step"] for line in lines(run)] == [STEPS + 2]
  code, _, err = command(
    "train",
    *TINY,
    f"--workdir={place['root'] / 'other'}",
    f"--resume={place['root']}",
    data=place["data"],
  )
  assert code == 2 and "--resume" in err


def test_another_config_is_refused_by_field(place):
  code, _, err = command(
    "train",
    *TINY,
    f"--workdir={place['run']}",
    "--config.seed=5",
    data=place["data"],
  )
  assert code == 2 and "seed: 0 -> 5" in err and len(err.splitlines()) == 1


def test_evaluation_writes_what_it_prints(place):
  code, out, err = command(
    "evaluate",
    f"--workdir={place['run']}",
    "--split=test[:10]",
    f"--output={place['root'] / 'eval'}",
  )
  assert code == 0, err
  assert "fg_ari" in out and "training-free" in out and "10 images" in out
  (report,) = (place["root"] / "eval").glob("*.json")
  content = json.loads(report.read_text())
  assert {"fg_ari", "ari", "mbo", "miou"} <= content.keys()
  assert content["num_images"] == 10
  assert content["ari_training_free"] > 0.5


@pytest.mark.parametrize(
  ("flags", "words"),
  [
    (["--split=test[:"], "split"),
    (["--split=nonsense"], "split"),
    (["--split=test", "--dataset=clevr_with_masks"], "launch/prepare.py"),
    (
      ["--split=test", "--dataset=images", "--data_root=/nonexistent/x"],
      "/nonexistent/x",
    ),
    (["--split=test", "--nonsense=1"], "nonsense"),
  ],
)
def test_wrong_evaluation_flags_are_one_line(place, flags, words):
  code, _, err = command("evaluate", f"--workdir={place['run']}", *flags)
  assert code == 2 and words in err
  assert len(err.strip().splitlines()) == 1, err


def test_own_images_of_every_kind(place):
  photos = place["root"] / "photos"
  photos.mkdir()
  random = np.random.default_rng(0)
  for name, shape in {
    "rgb.png": (50, 90, 3),
    "grey.png": (64, 64),
    "alpha.png": (31, 17, 4),
    "wide.jpg": (20, 400, 3),
    "dot.png": (1, 1, 3),
  }.items():
    pixels = random.integers(0, 255, shape, np.uint8)
    Image.fromarray(pixels).save(photos / name)
  (photos / "broken.png").write_bytes(b"not an image")
  out = place["root"] / "out"
  flags = [f"--workdir={place['run']}", f"--images={photos}", f"--output={out}"]
  code, text, err = command("predict", *flags)
  assert code == 1 and "broken.png" in err and "5 images segmented" in text
  for name, size in {"rgb": (90, 50), "wide": (400, 20), "dot": (1, 1)}.items():
    assert Image.open(out / f"{name}_labels.png").size == size
  assert (out / "contact_sheet.png").exists()
  code, _, err = command("predict", *flags)
  assert code == 2 and "--overwrite" in err


def test_an_empty_folder_and_a_missing_run_are_one_line(place):
  empty = place["root"] / "empty"
  empty.mkdir()
  for flags in (
    [f"--workdir={place['run']}", f"--images={empty}"],
    [f"--workdir={empty}", f"--images={place['root']}"],
    ["--workdir=pretrained:nonsense", f"--images={place['root']}"],
  ):
    code, _, err = command(
      "predict",
      *flags,
      f"--output={place['root'] / 'none'}",
    )
    assert code == 2 and len(err.strip().splitlines()) == 1, err
  assert not (place["root"] / "none").exists()


@pytest.mark.parametrize(
  ("flag", "words"),
  [
    ("--config.training.learning_rat=1", "learning_rat"),
    ("--config.training.num_steps=ten", "num_steps"),
    ("--config.model.image_size=63", "model.image_size=63"),
    ("--config.model.encoder=resnet", "model.encoder"),
    ("--config.training.batch_size=0", "training.batch_size"),
    ("--config.mesh.data=3", "mesh"),
  ],
)
def test_wrong_config_fields_are_one_line(place, flag, words):
  run = place["root"] / "never"
  code, _, err = command(
    "train",
    *TINY,
    f"--workdir={run}",
    flag,
    data=place["data"],
  )
  assert code == 2 and words in err
  assert len(err.strip().splitlines()) == 1, err
  assert not (run / "config.json").exists()
