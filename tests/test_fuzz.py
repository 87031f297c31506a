"""Hostile inputs on every surface: done or refused in one line, no more.

The default run takes a slice of the cases, `make fuzz` all of them.
"""

import contextlib
import functools
import io
import pathlib
import subprocess
import sys

import fuzz_configs
import fuzz_images
import fuzz_records
import fuzz_weights
import numpy as np
import pytest
from absl import flags
from fuzz_harness import Broken, Harness
from ml_collections import config_flags

from spectraldiffusion_jax import build, command, convert, predict
from spectraldiffusion_jax import config as config_lib
from spectraldiffusion_jax.data import clevr_with_masks, prepare, tfrecord
from spectraldiffusion_jax.data.images import read_rgb
from spectraldiffusion_jax.errors import UserError
from spectraldiffusion_jax.segmenter import Segmentation
from spectraldiffusion_jax.weights import load_weights

ALL = {"configs": 500, "records": 500, "images": 300, "weights": 200}
MAX_PIXELS = 4_000_000


def counts(surface: str, slice_: int):
  """The slice of the default run, and all cases for `make fuzz`."""
  return pytest.mark.parametrize(
    "cases", [slice_, pytest.param(ALL[surface], marks=pytest.mark.slow)]
  )


@pytest.fixture
def harness(tmp_path, root, monkeypatch):
  monkeypatch.chdir(tmp_path)
  return Harness(tmp_path)


def finish(harness: Harness, surface: str, cases: int) -> None:
  """Both outcomes occurred: else the corpus tests nothing."""
  print(harness.summary(surface))
  assert harness.accepted and harness.refused
  assert harness.accepted + harness.refused >= cases


# ---- configs ----------------------------------------------------------------


def parse(arguments: list[str]):
  """The config that launch/train.py would get; a UserError for its one line."""
  values = flags.FlagValues()
  argv = ["train", *arguments]
  holder = config_flags.DEFINE_config_file(
    "config", None, flag_values=values, sys_argv=argv, lock_config=True
  )
  said = io.StringIO()
  try:
    with contextlib.redirect_stderr(said):
      rest = command._parse(argv, values)
  except SystemExit as stop:
    assert stop.code == 2 and said.getvalue().count("\n") == 1
    assert "Traceback" not in said.getvalue()
    raise UserError(said.getvalue()) from None
  command.no_arguments(rest)
  return command.require(holder, "config")


def use(config) -> None:
  config_lib.validate(config)
  build.make_model(config)


@counts("configs", 60)
def test_configs(harness, cases, root, monkeypatch):
  monkeypatch.chdir(root)  # where configs/ is

  def load():
    config = config_lib.load(harness.inputs / "config.json")
    config_lib.validate_model(config)
    use(config)

  for seed in range(cases // 2):
    arguments = fuzz_configs.arguments(seed)
    harness.run(f"{seed}: {arguments}", lambda a=arguments: use(parse(a)))
    (harness.inputs / "config.json").write_bytes(fuzz_configs.text(seed))
    harness.run(f"config.json {seed}", load)
  finish(harness, "configs", cases)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_configs_through_the_command(seed, root, tmp_path):
  done = subprocess.run(
    [
      sys.executable,
      "launch/train.py",
      *fuzz_configs.arguments(9 * seed + seed % 2),
      "--config.data.data_root=nowhere",
      "--config.data.dataset=nothing",
      f"--workdir={tmp_path / 'run'}",
    ],
    cwd=root,
    capture_output=True,
    text=True,
    timeout=200,
  )
  assert done.returncode == 2, done.stderr
  assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


# ---- records ----------------------------------------------------------------


@counts("records", 40)
def test_records(harness, cases):
  path = harness.inputs / "clevr_with_masks.tfrecords"

  def read():
    for record in tfrecord.read_examples(path):
      clevr_with_masks.to_example(record)

  for seed in range(cases):
    path.write_bytes(fuzz_records.case(seed))
    harness.run(f"record {seed}", read)
    if seed % 50 == 1:
      harness.run(
        f"record {seed} prepared",
        lambda: prepare.prepare(
          "clevr_with_masks",
          data_root=harness.out,
          source=harness.inputs,
          overwrite=True,
        ),
      )
  assert not list(harness.out.glob(".preparing_*"))
  finish(harness, "records", cases)


# ---- images -----------------------------------------------------------------


class Halves:
  """Stands for a model: the upper half is the background."""

  def segment(self, images):
    found = []
    for image in images:
      labels = np.zeros(image.shape[:2], np.int32)
      labels[len(labels) // 2 :] = 1
      found.append(Segmentation(labels, labels[None], 2))
    return found


@counts("images", 40)
def test_images(harness, cases):
  for start in range(0, cases, 20):
    folder = harness.inputs / str(start)
    folder.mkdir()
    for seed in range(start, min(start + 20, cases)):
      form = list(fuzz_images.MODES)[seed % len(fuzz_images.MODES)].lower()
      path = folder / f"{seed % 5}.{form}".replace("ppm", "png")
      path = path.with_stem(f"{path.stem}-{seed // 10}")
      path.write_bytes(fuzz_images.case(seed))
      harness.run(
        f"image {seed}", lambda p=path: read_rgb(p, max_pixels=MAX_PIXELS)
      )
    output = harness.out / str(start)
    harness.run(f"folder {start}", lambda f=folder, o=output: segment(f, o))
  finish(harness, "images", cases)


def segment(folder: pathlib.Path, output: pathlib.Path) -> None:
  paths = predict.find_images(str(folder), output=output)
  done = predict.predict(
    Halves(), paths, output, max_pixels=MAX_PIXELS, overwrite=False
  )
  assert len(done.written) + len(done.failed) == len(paths)
  assert len(list(output.glob("*_labels.png"))) == len(done.written)
  assert all(reason.isprintable() for _, reason in done.failed)


# ---- weights ----------------------------------------------------------------


@counts("weights", 48)
def test_weights(harness, cases, tmp_path):
  path = harness.inputs / "weights"
  for seed in range(cases):
    path.write_bytes(fuzz_weights.case(seed, harness.inputs))
    output = str(harness.out / "converted.safetensors")
    for name, use_file in {
      "read": lambda: convert.read_source(str(path)),
      "converted": lambda o=output: convert.convert_file(str(path), o),
      "loaded": lambda: load_weights(path),
    }.items():
      harness.run(f"weights {seed} {name}", use_file)
  finish(harness, "weights", cases)


# ---- the harness itself -----------------------------------------------------


def hang():
  while True:
    pass


def stray(root):
  (root / "stray").write_text("here")


def defect():
  raise KeyError("a")


def lines():
  error = UserError("")
  error.args = ("two\nlines",)
  raise error


def large():
  return bytearray(64 << 20)[::4096]


@pytest.mark.parametrize(
  ("case", "words"),
  [
    (hang, "more than 0.2 s"),
    (stray, "outside"),
    (defect, "KeyError"),
    (lines, "is no line"),
    (large, "took 6. MiB"),
  ],
)
def test_the_harness_sees_what_it_is_for(tmp_path, case, words):
  seconds = 0.2 if case is hang else 10
  harness = Harness(tmp_path, seconds=seconds, growth=50 << 20)
  if case is stray:
    case = functools.partial(stray, tmp_path)
  with pytest.raises(Broken, match=words):
    harness.run("case", case)
