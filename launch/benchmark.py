"""Measures parts against their alternatives, as ratios within one run.

  python launch/benchmark.py --output=bench
  python launch/benchmark.py --only=scan,spectral
  python launch/benchmark.py --only=sharding --config=configs/procedural.py

`sharding` takes the step of --config and is left out without one. Prints a
Markdown table each and writes NAME.json into --output. Nothing else should run
on the machine.
"""

import json
import pathlib

from absl import flags
from ml_collections import config_flags

from spectraldiffusion_jax import command

BENCHMARKS = {
  "scan": "forms of the selective scan against the loop over tokens",
  "spectral": "tokens to labels against scikit-learn",
  "vit": "the backbone against torch, where that is installed",
  "checkpoint": "steps with saves, asynchronous or waited for, against none",
  "sharding": "the step on a mesh of one device against a plain jit",
}
CONFIG = config_flags.DEFINE_config_file(
  "config", None, "Config of the step of `sharding`.", lock_config=True
)
ONLY = flags.DEFINE_list(
  "only", [], f"Of {', '.join(BENCHMARKS)}; default: all."
)
OUTPUT = flags.DEFINE_string("output", "", "Folder for JSON; empty: none.")


def main(argv: list[str]) -> None:
  """Runs one benchmark after the other."""
  command.no_arguments(argv)
  from spectraldiffusion_jax.errors import choose

  for name in ONLY.value:
    choose("--only", name, BENCHMARKS)
  names = ONLY.value or [
    n for n in BENCHMARKS if n != "sharding" or CONFIG.value
  ]
  if "sharding" in names:
    command.require(CONFIG, "config")
  for name in names:
    _show(name, _rows(name))


def _rows(name: str) -> list[dict]:
  """Runs the benchmark of that name.

  Raises:
    UserError: what it compares with is not installed.
  """
  import importlib

  from spectraldiffusion_jax.errors import UserError

  try:
    module = importlib.import_module(f"spectraldiffusion_jax.benchmarks.{name}")
  except ModuleNotFoundError as error:
    raise UserError(
      f"--only={name} needs {error.name}: pip install -e '.[test]'"
    ) from None
  found = module.run(CONFIG.value) if name == "sharding" else module.run()
  return [found] if isinstance(found, dict) else found


def _show(name: str, rows: list[dict]) -> None:
  """Prints the table, and writes it where --output says."""
  from spectraldiffusion_jax import markdown

  print(f"{name}: {BENCHMARKS[name]}\n\n{markdown.records(rows)}", flush=True)
  if OUTPUT.value:
    folder = pathlib.Path(OUTPUT.value).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(rows, indent=2)
    (folder / f"{name}.json").write_text(text + "\n")


if __name__ == "__main__":
  command.run(main)
