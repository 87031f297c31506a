"""One run of one cell, in a process of its own: train, score, measure.

  python -m spectraldiffusion_jax.ablation.one --run=A/cells/full-0 \
    --split=test --controls

The folder holds `cell.json`, the config, before, and `result.json` after.
Peak memory is the process's, so a cell never inherits another one's.
"""

import json
import pathlib
import resource
import sys
import time

from absl import flags

from spectraldiffusion_jax import command

FOLDER = flags.DEFINE_string("run", None, "Folder of the run, with cell.json.")
SPLIT = flags.DEFINE_string("split", "test", "TFDS split that is scored.")
CONTROLS = flags.DEFINE_bool(
  "controls", False, "Score the model at step 0 and the training-free step."
)
CONFIG, RESULT = "cell.json", "result.json"
SCORES = ("fg_ari", "ari", "mbo")


def main(argv: list[str]) -> int:
  """Trains to the end, then writes the result; returns training's code."""
  command.no_arguments(argv)
  from spectraldiffusion_jax import config as config_lib
  from spectraldiffusion_jax import evaluate, segmenter, train_loop
  from spectraldiffusion_jax.run import Run

  folder = pathlib.Path(command.require(FOLDER, "run"))
  config = config_lib.load(folder / CONFIG)
  start = time.perf_counter()
  code = train_loop.train_and_evaluate(config, str(folder / "run"))
  if code:
    return code
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  seconds = time.perf_counter() - start
  parts = Run(config)
  trained = segmenter.load(folder / "run").params
  functions = {"trained": parts.segmenter(parts.place_params(trained))}
  if CONTROLS.value:
    functions["step0"] = parts.segmenter(parts.init_state().params)
    functions["training_free"] = parts.training_free
  batches = parts.eval_batches(SPLIT.value)
  found = {
    name: evaluate.evaluate(segment, batches, mesh=parts.mesh).scores
    for name, segment in functions.items()
  }
  result = {
    "scores": {name: per_image(scores) for name, scores in found.items()},
    "split": SPLIT.value,
    "seconds": round(seconds, 1),
    "seconds_per_step": fastest(folder / "run" / "metrics.jsonl"),
    # Linux counts kilobytes, macOS bytes.
    "peak_mb": round(peak / (2**20 if sys.platform == "darwin" else 2**10)),
  }
  partial = folder / f"{RESULT}.partial"
  partial.write_text(json.dumps(result))
  partial.replace(folder / RESULT)
  return 0


def per_image(scores) -> dict[str, list[float | None]]:
  """Every score of every image, null where an image has none."""
  return {
    name: [
      None if value != value else round(float(value), 6)
      for value in getattr(scores, name)[scores.mask]
    ]
    for name in SCORES
  }


def fastest(path: pathlib.Path) -> float:
  """Seconds a step in the fastest logged interval.

  Compilation and other programs only ever make an interval slower.
  """
  lines = [json.loads(line) for line in path.read_text().splitlines()]
  return 1 / max(line["steps_per_second"] for line in lines)


if __name__ == "__main__":
  command.run(main)
