"""The runs of an ablation, one after the other, and the table after each."""

import datetime
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

from ml_collections import ConfigDict

from spectraldiffusion_jax import config as config_lib
from spectraldiffusion_jax import train_loop, workdir
from spectraldiffusion_jax.ablation import cells as cells_lib
from spectraldiffusion_jax.ablation import one, report
from spectraldiffusion_jax.errors import UserError

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent


def run(
  config: ConfigDict,
  folder: pathlib.Path,
  *,
  seeds: int,
  names: Sequence[str],
  split: str,
) -> int:
  """Runs every cell with every seed that has no result yet.

  All cells get their first seed before any gets its second: the table is
  whole early, and its spread comes later.

  Args:
    config: of the full model.
    folder: of the runs and of the tables, made if it is not there.
    seeds: runs of each cell, with seeds from `config.seed` on.
    names: of cells; none for all of them.
    split: that is scored.

  Returns:
    0, or the exit code with which a run was stopped by a signal.

  Raises:
    UserError: a cell, or what it makes of the config, does not exist, or the
      folder holds runs of another config.
  """
  folder = folder.expanduser().absolute()
  chosen = cells_lib.choose_changes(config, names)
  plan = [
    (cell, seed)
    for seed in range(config.seed, config.seed + seeds)
    for cell in chosen
  ]
  configs = [cells_lib.configure(config, *item) for item in plan]
  for made in configs:
    config_lib.validate(made)
  with workdir.locked(folder):
    code = _run_all(plan, configs, folder, split)
    results = collect(folder, split)
    if results:
      print(report.write(results, folder))
  return code


def _run_all(plan, configs, folder, split) -> int:
  """The runs in their order; the code of one that was stopped, or 0."""
  spent = []
  for i, ((cell, seed), config) in enumerate(zip(plan, configs, strict=True)):
    here = folder_of(folder, cell.name, seed)
    head = f"cell {i + 1} of {len(plan)}: {cell.name}, seed {seed}"
    claim(here, config, split)
    if (here / one.RESULT).exists():
      print(f"{head}: done before", flush=True)
      continue
    left = _left(spent, plan[i:], folder)
    print(f"{head}{left}", flush=True)
    start = time.monotonic()
    code = run_one(here, split, controls=cell.name == cells_lib.FULL)
    spent.append(time.monotonic() - start)
    if code == train_loop.DIVERGED:
      _note_divergence(here, split)
    elif code == train_loop.EXIT_CODE or code < 0 or code > 128:
      print(f"stopped; start again to go on with {cell.name}, seed {seed}")
      return train_loop.EXIT_CODE
    elif code:
      raise UserError(
        f"cell {cell.name}, seed {seed}: {_last_line(here / 'log.txt')} "
        f"(exit code {code}, {here / 'log.txt'})"
      )
    report.write(collect(folder, split), folder)
  return 0


def _left(spent, rest, folder) -> str:
  """Time left, from the mean of the runs so far."""
  if not spent:
    return ""
  todo = sum(
    not (folder_of(folder, cell.name, seed) / one.RESULT).exists()
    for cell, seed in rest
  )
  seconds = round(todo * sum(spent) / len(spent))
  return f", eta {datetime.timedelta(seconds=seconds)}"


def folder_of(folder: pathlib.Path, name: str, seed: int) -> pathlib.Path:
  """The folder of one run of a cell."""
  return folder / "cells" / f"{name}-{seed}"


def claim(place: pathlib.Path, config: ConfigDict, split: str) -> None:
  """Writes the run's config, or compares it with the one that is there.

  Raises:
    UserError: the folder holds a run of another config or split.
  """
  place.mkdir(parents=True, exist_ok=True)
  path = place / one.CONFIG
  if path.exists():
    old = config_lib.load(path).to_dict()
    changed = config_lib.differences(old, config.to_dict())
    if (place / one.RESULT).exists():
      scored = json.loads((place / one.RESULT).read_text())["split"]
      changed += [f"split: {scored} -> {split}"] if scored != split else []
    if changed:
      raise UserError(
        f"--workdir: {place} was made by another config: "
        f"{'; '.join(changed)}. Use another workdir, or the old values"
      )
  partial = path.with_suffix(".partial")
  config_lib.save(config, partial)
  partial.replace(path)


def run_one(place: pathlib.Path, split: str, *, controls: bool) -> int:
  """One run in a process of its own; its output goes to log.txt.

  SIGTERM to this process is passed on, so that the run saves before it ends.
  """
  # Seeds of a cell, and much of different cells, compile to the same program.
  cache = {"JAX_COMPILATION_CACHE_DIR": str(place.parent.parent / "cache")}
  path = {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
  with open(place / "log.txt", "a") as log:
    process = subprocess.Popen(
      [
        sys.executable,
        "-m",
        "spectraldiffusion_jax.ablation.one",
        str(place),
        split,
        *(["controls"] if controls else []),
      ],
      env=cache | os.environ | path,
      stdout=log,
      stderr=subprocess.STDOUT,
    )
    # Ctrl-C reaches the run by itself; waiting for it must outlive that.
    handlers = {
      signal.SIGTERM: lambda *_: process.terminate(),
      signal.SIGINT: lambda *_: None,
    }
    before = {n: signal.signal(n, handler) for n, handler in handlers.items()}
    try:
      return process.wait()
    finally:
      for number, handler in before.items():
        signal.signal(number, handler)


def _note_divergence(place: pathlib.Path, split: str) -> None:
  """A result without scores: the loss was not finite."""
  empty = {"scores": {}, "split": split, "diverged": True}
  (place / one.RESULT).write_text(json.dumps(empty))


def _last_line(path: pathlib.Path) -> str:
  lines = path.read_text().split("\n")
  return next((line for line in reversed(lines) if line.strip()), "no output")


def collect(folder: pathlib.Path, split: str) -> dict[str, dict[int, dict]]:
  """Every finished run's result: cell -> seed -> result, in table order."""
  results = {}
  for name in cells_lib.CELLS:
    for path in sorted((folder / "cells").glob(f"{name}-*/{one.RESULT}")):
      found = json.loads(path.read_text())
      if found["split"] == split:
        seed = int(path.parent.name.rpartition("-")[2])
        results.setdefault(name, {})[seed] = found
  return results
