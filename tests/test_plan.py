"""Plans: the real steps compiled for devices, verdicts, mistakes in a line."""

import importlib.util
import json
import subprocess
import sys

import jax
import pytest

from configs import cityscapes, procedural
from spectraldiffusion_jax.errors import UserError
from spectraldiffusion_jax.plan import report, table, topology, verdict


def tiny(fsdp=2):
  config = procedural.get_config("baseline").unlock()
  config.model.image_size, config.model.width = 16, 8
  config.model.num_slots, config.model.slot_dim = 3, 8
  config.model.num_iterations, config.model.decoder_width = 1, 8
  config.training.batch_size = 16
  config.mesh.fsdp = fsdp
  return config.lock()


@pytest.fixture(scope="module")
def found():
  return report.plan(tiny(), "cpu:8")


def test_a_plan_of_eight_simulated_devices(found):
  assert found.devices == 8
  assert found.mesh == {"data": 4, "fsdp": 2, "model": 1}
  train, evaluation = found.steps
  assert train.flops > 2 * evaluation.flops > 0
  sent = {row.kind: row for row in train.collectives}
  # Gradients of what is split over fsdp are summed over data at least.
  assert sent["all-reduce"].payload > found.state["params"]
  assert train.memory.arguments > sum(found.state.values())
  assert found.fits is None and train.roofline is None


def test_state_is_counted_for_one_device(found):
  whole = report.plan(tiny(fsdp=1), "cpu:1", steps=()).state
  # Adam keeps two moments of every parameter, wherever that lies.
  for state in (found.state, whole):
    assert state["opt_state"] >= 2 * state["params"]
    assert state["opt_state"] < 2 * state["params"] + 64
  assert whole["params"] / 2 < found.state["params"] < whole["params"]


def test_what_is_written_is_what_is_printed(found, tmp_path):
  text = table.table(found)
  path = report.save(found, text, tmp_path / "plan")
  values = json.loads(path.read_text())
  assert path.name == "cpu_8_mesh_4x2x1.json"
  assert values["steps"][0]["memory"]["peak"] == found.steps[0].memory.peak
  assert values["steps"][0]["collectives"][0]["kind"] == "all-reduce"
  assert path.with_suffix(".txt").read_text() == text + "\n"
  assert "train step" in text and "eval step" in text and "verdict" in text


@pytest.mark.parametrize(
  "name", ["v9:2x2", "v5e", "v5e:16", "v5e:ax2", "cpu:0", "cpu:two", ""]
)
def test_unknown_topologies_are_refused(name):
  with pytest.raises(UserError, match="give cpu:N, or one of v4, v5e"):
    topology.open_topology(name)


def test_more_devices_than_the_process_has_are_refused():
  with pytest.raises(UserError, match="cpu:9: this process has 8 CPU devices"):
    topology.open_topology("cpu:9")


def test_a_batch_that_does_not_divide_names_the_numbers():
  config = cityscapes.get_config()  # 8 images, two micro-batches
  with pytest.raises(UserError, match=r"batch_size=8 .* multiple of 16"):
    report.plan(config, "cpu:8")


def test_an_unknown_step_is_refused():
  with pytest.raises(UserError, match="steps=test: choose from train, eval"):
    report.plan(tiny(), "cpu:8", steps=("test",))


class Overflowing:
  """A step that the compiler cannot fit."""

  def lower(self, *_):
    return self

  def compile(self):
    raise jax.errors.JaxRuntimeError(
      "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory "
      "in memory space hbm. Used 20.50G of 15.75G hbm.\nmore"
    )


def test_an_overflow_is_a_verdict_with_remedies():
  chip = topology.CHIPS["v5e"]
  place = topology.Topology("v5e:2x4", [None] * 8, chip)
  step = report.measure("train", Overflowing(), (), place)
  over = report.Plan(
    topology="v5e:2x4",
    devices=8,
    mesh={"data": 8, "fsdp": 1, "model": 1},
    batch_size=16,
    image_size=64,
    hbm=chip.hbm,
    state={"params": 2**32, "opt_state": 2**33},
    steps=(step,),
  )
  fits, text = verdict.judge(over, tiny())
  assert fits is False and "Used 20.50G of 15.75G" in text
  for flag in (
    "--config.mesh.data=1 --config.mesh.fsdp=8",
    "--config.model.compute_dtype=bfloat16",
    "--config.training.gradient_accumulation=2",
    "--config.training.remat=dots",
    "--config.training.batch_size=8",
  ):
    assert flag in text
  assert "Ran out of memory" in table.table(over)


def test_the_command_names_a_mistake_in_one_line(root):
  done = subprocess.run(
    [
      *(sys.executable, "launch/plan.py", "--topology=v9:2x2"),
      "--config=configs/procedural.py",
    ],
    cwd=root,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 2 and done.stdout == ""
  assert done.stderr.count("\n") == 1 and "--topology=v9:2x2" in done.stderr


def test_without_the_tpu_compiler_the_extra_is_named(monkeypatch):
  from jax.experimental import topologies

  def absent(**_):
    raise RuntimeError("JAX TPU support not installed")

  monkeypatch.setattr(topologies, "get_topology_desc", absent)
  with pytest.raises(UserError, match=r"pip install '\.\[tpu\]'"):
    topology.open_topology("v5e:4x4")


@pytest.mark.slow
def test_a_tpu_plan_has_a_roofline():
  if importlib.util.find_spec("libtpu") is None:
    pytest.skip("the TPU compiler is not installed: pip install '.[tpu]'")
  plan = report.plan(tiny(), "v5e:2x4", steps=("eval",))
  (step,) = plan.steps
  assert plan.fits and plan.hbm == 16 * 2**30
  assert step.roofline.seconds > 0
  assert "fits" in plan.verdict
