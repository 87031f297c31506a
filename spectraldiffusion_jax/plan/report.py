"""Compiles a run's steps for a topology and says what they cost there."""

import dataclasses
import json
import pathlib
import re
import time
from collections.abc import Sequence

import jax
from ml_collections import ConfigDict

from spectraldiffusion_jax import config as config_lib
from spectraldiffusion_jax import optim, sharding
from spectraldiffusion_jax.errors import UserError
from spectraldiffusion_jax.plan import costs, hlo, verdict
from spectraldiffusion_jax.plan.collectives import (
  Collective,
  count_collectives,
)
from spectraldiffusion_jax.plan.roofline import Roofline, roofline
from spectraldiffusion_jax.plan.topology import Topology, open_topology
from spectraldiffusion_jax.program import Program

STEPS = ("train", "eval")
LENGTH = optim.Length(1000, 100_000, 1000, 1000)
"""Any length: a schedule costs the same whatever its numbers are."""


@dataclasses.dataclass(frozen=True)
class Memory:
  """Bytes on one device."""

  arguments: int  # state and batch
  outputs: int  # without what takes the place of a donated argument
  temporary: int  # activations, gradients, buffers
  code: int

  @property
  def peak(self) -> int:
    """Most that is in use at once."""
    return self.arguments + self.outputs + self.temporary + self.code


@dataclasses.dataclass(frozen=True)
class StepCost:
  """One compiled step; all figures for one device and one step."""

  name: str
  compile_seconds: float
  memory: Memory | None  # None: the compiler found no way to fit it
  overflow: str = ""  # then what it said
  flops: float = 0.0
  traffic: float = 0.0
  collectives: tuple[Collective, ...] = ()
  unknown_loops: int = 0
  roofline: Roofline | None = None


@dataclasses.dataclass(frozen=True)
class Plan:
  """The cost of a config on a topology."""

  topology: str
  devices: int
  mesh: dict[str, int]
  batch_size: int
  image_size: int
  hbm: float | None  # bytes of one device
  state: dict[str, int]  # bytes on one device of each part of the state
  steps: tuple[StepCost, ...]
  fits: bool | None = None  # None: no limit is known
  verdict: str = ""


def plan(
  config: ConfigDict, topology: str, *, steps: Sequence[str] = STEPS
) -> Plan:
  """Compiles the training and the evaluation step of a config.

  Args:
    config: locked; its mesh has to divide the topology.
    topology: see `open_topology`.
    steps: names in STEPS; fewer compile faster.

  Raises:
    UserError: config, batch, mesh and topology do not go together.
  """
  config_lib.validate(config)
  for name in set(steps) - set(STEPS):
    raise UserError(f"steps={name}: choose from {', '.join(STEPS)}")
  place = open_topology(topology)
  mesh = sharding.make_mesh(**config.mesh, devices=place.devices)
  program = Program(config, mesh, LENGTH)
  state, batch = program.abstract_state, program.abstract_batch
  calls = {
    "train": (program.train_step, (state, batch)),
    "eval": (program.eval_step, (state.params, batch["image"])),
  }
  found_steps = tuple(measure(name, *calls[name], place) for name in steps)
  found = Plan(
    topology=topology,
    devices=len(place.devices),
    mesh=dict(mesh.shape),
    batch_size=config.training.batch_size,
    image_size=config.model.image_size,
    hbm=place.chip and place.chip.hbm,
    state=state_bytes(state),
    steps=found_steps,
  )
  fits, text = verdict.judge(found, config)
  return dataclasses.replace(found, fits=fits, verdict=text)


def state_bytes(state) -> dict[str, int]:
  """Bytes on one device of each field of an abstract, sharded state."""

  def one(leaf):
    shard = leaf.sharding.shard_shape(leaf.shape)
    return jax.ShapeDtypeStruct(shard, leaf.dtype).size * leaf.dtype.itemsize

  return {
    field.name: sum(map(one, jax.tree.leaves(getattr(state, field.name))))
    for field in dataclasses.fields(state)
  }


def measure(name: str, step, arguments: tuple, place: Topology) -> StepCost:
  """Lowers and compiles one jitted step for its abstract arguments."""
  start = time.perf_counter()
  lowered = step.lower(*arguments)
  try:
    compiled = lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    text = str(error)
    if "RESOURCE_EXHAUSTED" not in text:
      raise
    said = re.search("Ran out of memory[^\n]*", text) or re.match(".*", text)
    return StepCost(name, time.perf_counter() - start, None, said[0])
  seconds = time.perf_counter() - start
  used = compiled.memory_analysis()
  program = hlo.parse(compiled.as_text())
  sent = count_collectives(program, devices=len(place.devices))
  flops, traffic = costs.flops(program), costs.memory_traffic(program)
  return StepCost(
    name=name,
    compile_seconds=seconds,
    memory=Memory(
      arguments=used.argument_size_in_bytes,
      outputs=used.output_size_in_bytes - used.alias_size_in_bytes,
      temporary=used.temp_size_in_bytes,
      code=used.generated_code_size_in_bytes,
    ),
    flops=flops,
    traffic=traffic,
    collectives=tuple(sent),
    unknown_loops=hlo.unknown_loops(program),
    roofline=place.chip
    and roofline(
      place.chip,
      flops=flops,
      traffic=traffic,
      wire=sum(row.wire for row in sent),
    ),
  )


def save(found: Plan, text: str, folder: pathlib.Path) -> pathlib.Path:
  """Writes the plan as JSON and its table as text; returns the JSON's path.

  Raises:
    UserError: the folder cannot be made.
  """
  try:
    folder.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise UserError(f"--output={folder}: {error.strerror}") from None
  mesh = "x".join(map(str, found.mesh.values()))
  path = folder / f"{found.topology.replace(':', '_')}_mesh_{mesh}.json"
  path.write_text(json.dumps(as_dict(found), indent=2) + "\n")
  path.with_suffix(".txt").write_text(text + "\n")
  return path


def as_dict(found: Plan) -> dict:
  """A plan as plain values, sums and bounds included."""
  values = dataclasses.asdict(found)
  for step, row in zip(found.steps, values["steps"], strict=True):
    row["collectives"] = [c._asdict() for c in step.collectives]
    if step.memory is not None:
      row["memory"]["peak"] = step.memory.peak
    if step.roofline is not None:
      row["roofline"] = step.roofline._asdict() | {
        "seconds": step.roofline.seconds,
        "bound": step.roofline.bound,
      }
  return values
