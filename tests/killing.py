"""Tiny runs in processes of their own, to be killed and compared.

A run is a fork of this process, which has imported the program but never
used JAX: a new life costs what a restart costs less the imports. Whoever
uses this module leaves JAX alone outside `in_child`.
"""

import collections
import json
import os
import pathlib
import pickle
import sys
import time
from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

from configs import procedural

EXAMPLES, BATCH, STEPS, SAVE = 10, 4, 16, 2


def environment(cache: pathlib.Path) -> dict[str, str]:
  """Variables to be set before JAX is imported: the CPU, compiled once."""
  return {
    "JAX_PLATFORMS": "cpu",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    "JAX_COMPILATION_CACHE_DIR": str(cache),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
  }


def prepare(data_root: pathlib.Path) -> None:
  """Renders only as many images as `config` asks for; call in a child."""
  from spectraldiffusion_jax.data import procedural_clevr

  procedural_clevr.SPLITS = {"train": (EXAMPLES, 0), "validation": (4, 1)}
  procedural_clevr.prepare("easy_64", data_root)


def fields(data_root: pathlib.Path) -> dict[str, Any]:
  """Plain slot attention on 10 images of 32 pixels, a checkpoint every 2."""
  return {
    "data.data_root": str(data_root),
    "data.train_split": f"train[:{EXAMPLES}]",
    "data.val_split": "validation[:4]",
    "data.num_threads": 1,
    "model.image_size": 32,
    "model.width": 8,
    "model.slot_dim": 16,
    "model.num_iterations": 1,
    "model.num_slots": 3,
    "training.batch_size": BATCH,
    "training.max_rollbacks": 1,
    "training.num_steps": STEPS,
    "logging.log_interval": 1,
    "logging.save_interval": SAVE,
    "logging.val_interval": 1000,
    "logging.image_interval": 0,
    "logging.examples": True,
  }


def config(data_root: pathlib.Path) -> ConfigDict:
  """configs/procedural.py:baseline with `fields`."""
  c = procedural.get_config("baseline").unlock()
  c.update_from_flattened_dict(fields(data_root))
  return c.lock()


def spawn(job: Callable[[], int], log: pathlib.Path) -> int:
  """Forks; the child runs `job` with its output in `log`. Returns its pid."""
  sys.stdout.flush()
  pid = os.fork()
  if pid:
    return pid
  try:
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    code = job()
    sys.stdout.flush()
  except BaseException as error:
    print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
    code = 2 if type(error).__name__ == "UserError" else 1
  os._exit(code)


def exit_code(pid: int, *, patience: float = 900.0) -> int:
  """Waits for a child; a signal's number is negative.

  Raises:
    TimeoutError: it is still there after `patience` seconds.
  """
  deadline = time.monotonic() + patience
  while time.monotonic() < deadline:
    done, status = os.waitpid(pid, os.WNOHANG)
    if done:
      return os.waitstatus_to_exitcode(status)
    time.sleep(0.01)
  raise TimeoutError(f"process {pid} does not end")


def in_child(job: Callable[[], Any], scratch: pathlib.Path) -> Any:
  """`job()`, computed in a child that may use JAX."""
  result = scratch / "result.pkl"
  result.unlink(missing_ok=True)

  def write() -> int:
    result.write_bytes(pickle.dumps(job()))
    return 0

  log = scratch / "child.log"
  if exit_code(spawn(write, log)):
    raise RuntimeError(log.read_text()[-2000:])
  return pickle.loads(result.read_bytes())


def train(
  config: ConfigDict, workdir: pathlib.Path, *, poison: int = -1
) -> int:
  """Starts or continues a run, batch number `poison` all NaN; its pid."""

  def job() -> int:
    from spectraldiffusion_jax import run, train_loop

    place = run.Run.place

    def poisoned(self, batch, step):
      factor = float("nan") if step == poison else 1
      return place(self, batch | {"image": batch["image"] * factor}, step)

    if poison >= 0:
      run.Run.place = poisoned
    return train_loop.train_and_evaluate(config, str(workdir))

  workdir.mkdir(parents=True, exist_ok=True)
  return spawn(job, workdir / "log.txt")


def ledger(workdir: pathlib.Path) -> list[dict]:
  """Steps and the ids they consumed, in all of the run's processes.

  A line that is being written, or that not every process has, is left out.
  """
  steps = collections.defaultdict(list)
  files = sorted(workdir.glob("examples-*.jsonl"))
  for path in files:
    for text in path.read_text().split("\n")[:-1]:
      line = json.loads(text)
      steps[line["step"]].append(line["index"])
  return [
    {"step": step, "index": sum(parts, [])}
    for step, parts in steps.items()
    if len(parts) == len(files)
  ]


def metrics(workdir: pathlib.Path) -> list[dict]:
  """The lines of metrics.jsonl, without what depends on the clock."""
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  return [
    {
      name: value
      for name, value in json.loads(line).items()
      if not name.endswith("per_second")
    }
    for line in lines
  ]


def saving(workdir: pathlib.Path) -> bool:
  """Whether a checkpoint is being written now."""
  return any((workdir / "checkpoints").glob("*tmp*"))


def final_state(config: ConfigDict, workdir: pathlib.Path, step: int) -> list:
  """Every array of a checkpoint, in tree order; call in a child."""
  import jax
  import numpy as np

  from spectraldiffusion_jax import build
  from spectraldiffusion_jax.checkpoint import Checkpoints

  with Checkpoints(workdir, read_only=True) as checkpoints:
    state, _ = checkpoints.restore(step, build.abstract_state(config))
  return [np.asarray(x) for x in jax.tree.leaves(state)]


def miscounted(workdir: pathlib.Path) -> int:
  """Examples lost or doubled in any full epoch, by the ids logged."""
  lines = ledger(workdir)
  if [line["step"] for line in lines] != list(range(1, STEPS + 1)):
    return STEPS * BATCH
  ids = [i for line in lines for i in line["index"]]
  epochs = [ids[i : i + EXAMPLES] for i in range(0, len(ids), EXAMPLES)]
  wrong = sum(
    abs(epoch.count(i) - 1) for epoch in epochs[:-1] for i in range(EXAMPLES)
  )
  return wrong + len(epochs[-1]) - len(set(epochs[-1]))
