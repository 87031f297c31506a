"""What meshes and shardings cost a single device: nothing, it should be.

The training step of a run, with its mesh of one device, its explicit
shardings and its placed batches, takes turns with the same function under a
plain `jax.jit`, so that a change in the machine's load meets both. A third
runner, plain again, shows how far two equal programs differ here.
"""

import statistics
import time
from collections.abc import Callable

import jax
import numpy as np
from ml_collections import ConfigDict

from spectraldiffusion_jax import build, effort, optim, sharding, train_step
from spectraldiffusion_jax.program import Program

LENGTH = optim.Length(100, 1000, 10, 100)


def _batch(program: Program) -> dict[str, np.ndarray]:
  """Random images; labels of two segments where there are any."""
  random = np.random.default_rng(0)
  batch = {
    name: np.zeros(like.shape, like.dtype)
    for name, like in program.abstract_batch.items()
  }
  batch["image"] = random.uniform(size=batch["image"].shape).astype(np.float32)
  if "labels" in batch:
    batch["labels"][:, 3:13, 3:13] = 1
    batch["labels"][:, 18:30, 15:29] = 2
  return batch


class _Runner:
  """One compiled step and the state it goes on from."""

  def __init__(self, step: Callable, state, place: Callable[[dict], dict]):
    self.step, self.state, self.place = step, state, place

  def seconds(self, batch: dict) -> float:
    """Places the batch, takes a step, waits for it."""
    start = time.perf_counter()
    self.state, metrics = self.step(self.state, self.place(batch))
    jax.block_until_ready(metrics)
    return time.perf_counter() - start


def run(config: ConfigDict, *, repeats: int = 20) -> dict:
  """Measures both; the order within each round is reversed every time.

  Args:
    config: locked; its mesh is ignored, one device is used.
    repeats: rounds, after one that compiles.

  Returns:
    steps_per_s of `sharded` and `plain`, the median ratio of their paired
    times (above 1: the mesh is slower) and that of plain with itself.
  """
  device = jax.devices()[0]
  program = Program(config, sharding.make_mesh(devices=[device]), LENGTH)
  batch = _batch(program)
  plain = jax.jit(
    _plain_step(config, program),
    donate_argnums=0,
    compiler_options=effort.on_cpu(1, device),
  )

  def fresh():
    return jax.device_put(jax.device_get(program.init_state()), device)

  runners = [
    _Runner(
      program.train_step,
      program.init_state(),
      lambda rows: sharding.shard_batch(rows, program.mesh),
    ),
    *(
      _Runner(plain, fresh(), lambda rows: jax.device_put(rows, device))
      for _ in range(2)
    ),
  ]
  for runner in runners:
    runner.seconds(batch)
  times = []
  for number in range(repeats):
    order = list(enumerate(runners))[:: 1 if number % 2 else -1]
    row = {place: runner.seconds(batch) for place, runner in order}
    times.append([row[place] for place in range(len(runners))])
  sharded, first, second = zip(*times, strict=True)
  return {
    "device": device.device_kind,
    "batch_size": config.training.batch_size,
    "sharded_steps_per_s": 1 / statistics.median(sharded),
    "plain_steps_per_s": 1 / statistics.median(first),
    "sharded_over_plain": _ratio(sharded, first),
    "plain_over_plain": _ratio(second, first),
  }


def _plain_step(config: ConfigDict, program: Program) -> Callable:
  """The function that `program.train_step` compiles, built anew."""
  schedule = optim.make_schedule(
    learning_rate=config.training.learning_rate, length=LENGTH
  )
  return train_step.make_train_step(
    build.make_loss_fn(config, program.model),
    program.optimizer,
    schedule=schedule,
    seed=config.seed,
    accumulation=config.training.gradient_accumulation,
  )


def _ratio(times, others) -> float:
  return statistics.median(a / b for a, b in zip(times, others, strict=True))
