"""One run of one cell, in a process of its own: train, score, measure.

  python -m spectraldiffusion_jax.ablation.one A/cells/full-0 test controls

Folder, split, and `controls` to score the model at step 0 and the
training-free step as well. The folder holds `cell.json`, the config, before
and `result.json` after.
Peak memory is the process's, so a cell never inherits another one's.
"""

import json
import pathlib
import resource
import sys
import time

from spectraldiffusion_jax import command

CONFIG, RESULT = "cell.json", "result.json"
SCORES = ("fg_ari", "ari", "mbo")


def main(argv: list[str]) -> int:
  """Trains to the end, then writes the result; returns training's code."""
  _, place, split, *controls = argv
  from spectraldiffusion_jax import config as config_lib
  from spectraldiffusion_jax import evaluate, segmenter, train_loop
  from spectraldiffusion_jax.ablation import readout
  from spectraldiffusion_jax.run import Run

  folder = pathlib.Path(place)
  config = config_lib.load(folder / CONFIG)
  start = time.perf_counter()
  parts = Run(config)
  code = train_loop.train_and_evaluate(config, str(folder / "run"), run=parts)
  if code:
    return code
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  seconds = time.perf_counter() - start
  trained = parts.place_params(segmenter.load(folder / "run").params)
  functions = {"trained": parts.segmenter(trained)}
  if controls:
    functions["step0"] = parts.segmenter(parts.init_state().params)
    functions["training_free"] = parts.training_free
  batches = parts.eval_batches(split)
  found = {
    name: evaluate.evaluate(segment, batches, mesh=parts.mesh).scores
    for name, segment in functions.items()
  }
  result = {
    "scores": {name: per_image(scores) for name, scores in found.items()},
    "readout": readout.read_out(parts, trained, split),
    "split": split,
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
