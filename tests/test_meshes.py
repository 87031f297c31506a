"""One run on any mesh and in two real processes: the same numbers."""

import functools
import shutil

import jax
import numpy as np
import process_runs
import pytest
import toy_scenes

from spectraldiffusion_jax import sharding, train_loop
from spectraldiffusion_jax.preemption import EXIT_CODE, StopRequest

STEPS, LONG = 6, 30
TOLERANCE = 1e-5
"""Relative, of the loss of every step. The gradient of a batch is a sum whose
order depends on the mesh, and float32 has 6e-8: rounding grows by what the
optimiser makes of it, and stays far below this in 30 steps."""
MESHES = {"8x1x1": (8, 1, 1), "2x4x1": (2, 4, 1), "2x2x2": (2, 2, 2)}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  return toy_scenes.prepare(tmp_path_factory.mktemp("data"))


def fields(data, steps, mesh=(-1, 1, 1), base=process_runs.CHEAP):
  names = ("mesh.data", "mesh.fsdp", "mesh.model")
  return base | {
    "data.data_root": str(data),
    "training.num_steps": steps,
    **dict(zip(names, mesh, strict=True)),
  }


def train_here(config_fields, workdir, devices=8):
  """A run in this process on its first devices; returns its metrics."""
  make = sharding.make_mesh
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(
      sharding,
      "make_mesh",
      lambda **sizes: make(**sizes, devices=jax.devices()[:devices]),
    )
    config = process_runs.make_config(config_fields)
    assert train_loop.train_and_evaluate(config, str(workdir)) == 0
  return process_runs.logged(workdir)


def worst(one, other, last=LONG):
  """Largest relative difference of the loss up to a step."""
  assert one.keys() == other.keys() and len(one) > 0
  return max(
    abs(one[s]["train/loss"] - other[s]["train/loss"])
    / abs(one[s]["train/loss"])
    for s in one
    if s <= last
  )


def assert_same_run(one, other, steps):
  assert len(one) == steps
  assert worst(one, other) < TOLERANCE
  last, end = one[steps], other[steps]
  scores = [name for name in last if name.startswith("val/")]
  assert scores
  for name in scores:
    np.testing.assert_allclose(end[name], last[name], rtol=1e-6, err_msg=name)


@pytest.fixture(scope="module")
def alone(data, tmp_path_factory):
  """The run on one device."""
  folder = tmp_path_factory.mktemp("alone")
  return train_here(fields(data, STEPS), folder, devices=1)


def test_two_processes_train_what_one_device_trains(data, alone, tmp_path):
  done = process_runs.train(fields(data, STEPS), tmp_path)
  assert [code for code, _, _ in done] == [0, 0], done
  assert "2 process(es), 8 cpu device(s)" in done[0][1]
  # Gloo reports its connections on the same stream.
  assert "steps/s" in done[0][1] and "steps/s" not in done[1][1]
  assert_same_run(alone, process_runs.logged(tmp_path), STEPS)


def test_a_mesh_of_eight_trains_what_one_device_trains(data, alone, tmp_path):
  found = train_here(fields(data, STEPS, MESHES["2x2x2"]), tmp_path)
  assert_same_run(alone, found, STEPS)


@pytest.fixture(scope="module")
def long_alone(data, tmp_path_factory):
  """Thirty steps on one device: config's name -> metrics."""
  return functools.cache(
    lambda base: train_here(
      fields(data, LONG, base=getattr(process_runs, base)),
      tmp_path_factory.mktemp(base),
      devices=1,
    )
  )


def assert_same_until_rounding_shows(one, other):
  """The complete model multiplies a difference by 1.5 or so a step.

  Ten steps agree as far as those of plain slot attention, thirty to a
  thousandth: measured on every mesh (docs/clusters.md).
  """
  assert worst(one, other, last=10) < TOLERANCE
  assert worst(one, other) < 3e-3
  for name in (name for name in one[LONG] if name.startswith("val/")):
    np.testing.assert_allclose(
      other[LONG][name], one[LONG][name], atol=5e-3, err_msg=name
    )


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("base", ["CHEAP", "COMPLETE"])
@pytest.mark.parametrize("name", ["8x1x1", "2x4x1", "2x2x2", "two"])
def test_thirty_steps_agree(data, long_alone, tmp_path, base, name):
  same = {
    "CHEAP": lambda *runs: assert_same_run(*runs, LONG),
    "COMPLETE": assert_same_until_rounding_shows,
  }[base]
  alone, base = long_alone(base), getattr(process_runs, base)
  if name == "two":
    done = process_runs.train(fields(data, LONG, base=base), tmp_path)
    assert [code for code, _, _ in done] == [0, 0], done
    found = process_runs.logged(tmp_path)
  else:
    found = train_here(fields(data, LONG, MESHES[name], base), tmp_path)
  print(name, worst(alone, found, last=10), worst(alone, found))
  same(alone, found)


def stopped_at(config_fields, workdir, step):
  """The run on eight devices, stopped and saved after a step."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(StopRequest, "requested", lambda self, now: now == step)
    config = process_runs.make_config(config_fields)
    assert train_loop.train_and_evaluate(config, str(workdir)) == EXIT_CODE


@pytest.mark.slow
def test_a_checkpoint_of_eight_devices_goes_on_anywhere(data, alone, tmp_path):
  stopped_at(fields(data, STEPS, MESHES["2x4x1"]), tmp_path / "eight", 3)
  for name in ("one", "8x1x1", "two"):
    folder = tmp_path / name
    shutil.copytree(tmp_path / "eight", folder)
    if name == "two":
      done = process_runs.train(fields(data, STEPS), folder)
      assert [code for code, _, _ in done] == [0, 0], done
    else:
      train_here(fields(data, STEPS), folder, devices=1 if name == "one" else 8)
    assert_same_run(alone, process_runs.logged(folder), STEPS)
