"""The first run of a new user: train, compare, draw, one RESULT line."""

import json
import pathlib
import time

import numpy as np
from ml_collections import ConfigDict

from spectraldiffusion_jax import config as config_lib
from spectraldiffusion_jax import (
  evaluate,
  reports,
  segmenter,
  train_loop,
  visualise,
)
from spectraldiffusion_jax.run import Run

SPLIT = "test"
NAMES = ("fg_ari", "ari", "mbo")
PICTURES = 6
TITLES = {
  "trained": "trained",
  "step0": "before training",
  "training_free": "training-free step",
}


def run(config: ConfigDict, output: pathlib.Path, *, started: float) -> int:
  """Trains `config` in `output`/run and compares it on the test split.

  Args:
    config: any config whose data set has a test split.
    output: folder of the run, `result.json` and `segmentation.png`.
    started: Unix time from which seconds count, 0 for now.

  Returns:
    The exit code of the training, whose RESULT line only comes if it is 0.
  """
  started = started or time.time()
  config_lib.validate(config)
  parts = Run(config)
  code = train_loop.train_and_evaluate(config, str(output / "run"), run=parts)
  if code:
    return code
  batches = parts.eval_batches(SPLIT)
  trained = parts.segmenter(
    parts.place_params(segmenter.load(output / "run").params)
  )
  columns = {
    "trained": trained,
    "step0": parts.segmenter(parts.init_state().params),
    "training_free": parts.training_free,
  }
  found = {
    name: evaluate.evaluate(segment, batches, mesh=parts.mesh)
    for name, segment in columns.items()
  }
  print(evaluate.table({name: f.summary for name, f in found.items()}))
  _draw(parts, columns, found, batches, output / "segmentation.png")
  result = {name: round(found["trained"].summary[name], 4) for name in NAMES}
  for column in ("step0", "training_free"):
    result |= {
      f"{name}_{column}": round(found[column].summary[name], 4)
      for name in NAMES
    }
  result |= reports.paired(found["trained"], found["training_free"])
  result["seconds"] = round(time.time() - started, 1)
  evaluate.write_report(output / "result.json", result)
  print(f"pictures: {output / 'segmentation.png'}")
  print("RESULT " + json.dumps(result))
  return 0


def _draw(parts, columns, found, batches, path) -> None:
  """First test images: truth and the three segmentations side by side."""
  batch = next(iter(batches))
  image = parts.place_image(batch["image"])
  labels = {name: np.asarray(run(image)) for name, run in columns.items()}
  rows, captions = [], []
  for i in range(min(PICTURES, int(batch["mask"].sum()))):
    truth = batch["segmentation"][i]
    row = [batch["image"][i], visualise.colour_masks(truth)]
    for name in columns:
      found_here = labels[name][i]
      names = visualise.matching_names(truth, found_here)
      row.append(visualise.colour_masks(visualise.renamed(found_here, names)))
    rows.append(row)
    scores = found["trained"].scores
    captions.append(
      f"FG-ARI {scores.fg_ari[i]:.2f}, ARI {scores.ari[i]:.2f} (trained)"
    )
  sheet = visualise.contact_sheet(
    rows,
    captions=captions,
    titles=["image", "truth", *(TITLES[name] for name in columns)],
    height=160,
  )
  visualise.write_png(path, sheet)
