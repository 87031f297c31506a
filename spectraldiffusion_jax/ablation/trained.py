"""Parts switched off in a model that is trained already: seconds, not hours.

Only fields that leave the parameters as they are can be changed so. What a
part is worth here is what it is worth to the masks, not to the training.
"""

import functools
import json
import pathlib
from collections.abc import Sequence

import jax

from spectraldiffusion_jax import (
  build_spectral,
  evaluate,
  reports,
  segmenter,
  sharding,
  workdir,
)
from spectraldiffusion_jax.ablation import cells as cells_lib
from spectraldiffusion_jax.ablation import one, report, runner

FIELDS = (
  "model.num_iterations",
  "model.stickiness",
  "model.use_spectral_init",
  "spectral.chroma_sigma",
  "spectral.use_power_iteration",
)
"""What a trained model can be asked to do without."""


def choose(names: Sequence[str]) -> list[cells_lib.Cell]:
  """The named cells, all that can be had for none.

  Raises:
    UserError: a named cell has to be trained.
  """
  every = cells_lib.CELLS.values()
  fitting = [cell.name for cell in every if set(cell.fields) <= set(FIELDS)]
  reason = f"has to be trained; with --trained there are {', '.join(fitting)}"
  return cells_lib.choose_cells(
    names, lambda cell: "" if cell.name in fitting else reason
  )


def run(
  trained: str,
  folder: pathlib.Path,
  *,
  names: Sequence[str],
  split: str,
  dataset: str,
  data_root: str,
) -> int:
  """Scores a trained run with its parts switched off, and writes the tables.

  Args:
    trained: run to load, see `segmenter.load`.
    folder: of the tables, made if it is not there.
    names: of cells, none for all that need no training.
    split: that is scored.
    dataset: data set, "" for the run's own.
    data_root: folder of data sets, "" for the run's own.

  Returns:
    0.

  Raises:
    UserError: run, cell, data set or split do not exist.
  """
  chosen = choose(names)
  model = segmenter.load(trained)
  mesh = sharding.make_mesh(data=-1)
  batches = reports.batches(
    model.config,
    dataset or model.config.data.dataset,
    split,
    data_root or model.config.data.data_root,
    batch_size=0,
    mesh=mesh,
  )
  with workdir.locked(folder):
    # Results of one folder are of one model on one split.
    scored = f"{trained} on {split}"
    for i, cell in enumerate(chosen):
      print(f"cell {i + 1} of {len(chosen)}: {cell.name}", flush=True)
      config = cells_lib.configure(model.config, cell, model.config.seed)
      place = runner.folder_of(folder, cell.name, config.seed)
      runner.claim(place, config, scored)
      if not (place / one.RESULT).exists():
        result = _score(
          config, model.params, batches, mesh, free=cell.name == cells_lib.FULL
        )
        result["split"] = scored
        (place / one.RESULT).write_text(json.dumps(result))
      table = report.write(runner.collect(folder, scored), folder)
  print(table)
  return 0


def _score(config, params, batches, mesh, *, free: bool) -> dict:
  """Scores of these parameters under this config, image by image."""
  jit = functools.partial(jax.jit, out_shardings=sharding.batch_sharding(mesh))
  step = jit(segmenter.Segmenter(config, params).labels)
  params = jax.device_put(params, sharding.replicated(mesh))
  functions = {"trained": functools.partial(step, params)}
  if free:
    functions["training_free"] = jit(build_spectral.make_training_free(config))
  found = {
    name: evaluate.evaluate(function, batches, mesh=mesh)
    for name, function in functions.items()
  }
  return {
    "scores": {name: one.per_image(f.scores) for name, f in found.items()},
    "seconds": found["trained"].seconds,
  }
