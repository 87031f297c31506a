"""Evaluation of a finished run: table, JSON report, paired comparison."""

import functools
import pathlib
from collections.abc import Sequence

import jax
import numpy as np

from spectraldiffusion_jax import (
  build_spectral,
  distributed,
  evaluate,
  segmenter,
  sharding,
)
from spectraldiffusion_jax import config as config_lib
from spectraldiffusion_jax.data import pipeline
from spectraldiffusion_jax.version import __version__

COMPARED = ("fg_ari", "ari", "mbo")


def paired(
  ours: evaluate.Evaluation, other: evaluate.Evaluation
) -> dict[str, float]:
  """Mean difference and its standard error, image by image."""
  out = {}
  for name in COMPARED:
    a, b = getattr(ours.scores, name), getattr(other.scores, name)
    gain = (a - b)[ours.scores.mask]
    gain = gain[np.isfinite(gain)]
    out[f"{name}_gain"] = float(gain.mean())
    out[f"{name}_gain_se"] = float(gain.std(ddof=1) / len(gain) ** 0.5)
  return out


def evaluate_run(
  workdir: str,
  split: str,
  *,
  dataset: str,
  data_root: str,
  batch_size: int,
  output: pathlib.Path,
  settings: Sequence[str] = (),
) -> dict[str, float]:
  """Scores a run and the training-free step on the same images.

  Args:
    workdir: see `segmenter.load`.
    split: TFDS split.
    dataset: data set, "" for the run's own.
    data_root: folder of data sets, "" for the run's own.
    batch_size: images a step, 0 for the run's own.
    output: folder of DATASET_SPLIT.json, whose content is returned.
    settings: see `config.override`; fields that change the parameters'
      shapes cannot be set.

  Raises:
    UserError: run, data set or split do not exist.
  """
  model = _load(workdir, settings)
  dataset = dataset or model.config.data.dataset
  mesh = sharding.make_mesh(data=-1)
  split_batches = batches(
    model.config,
    dataset,
    split,
    data_root or model.config.data.data_root,
    batch_size=batch_size,
    mesh=mesh,
  )
  run = functools.partial(evaluate.evaluate, batches=split_batches, mesh=mesh)
  jit = functools.partial(jax.jit, out_shardings=sharding.batch_sharding(mesh))
  everywhere = sharding.replicated(mesh)
  params = jax.device_put(jax.device_get(model.params), everywhere)
  trained = run(functools.partial(jit(model.labels), params))
  free = run(jit(build_spectral.make_training_free(model.config)))
  columns = {"model": trained.summary, "training-free": free.summary}
  print(evaluate.table(columns))
  report = _report(trained, free) | {
    "dataset": dataset,
    "split": split,
    "workdir": workdir,
    "settings": list(settings),
  }
  if jax.process_index() == 0:
    path = output / evaluate.report_name(dataset, split)
    evaluate.write_report(path, report)
    print(f"written to {path}")
  return report


def _load(workdir, settings):
  """The run's model, with other settings if there are any."""
  model = segmenter.load(workdir)
  changed = config_lib.override(model.config, settings)
  return segmenter.Segmenter(changed, model.params) if settings else model


def _report(
  trained: evaluate.Evaluation, free: evaluate.Evaluation
) -> dict[str, float | str]:
  """The scores of both, how they differ, and what ran where."""
  return (
    trained.summary
    | paired(trained, free)
    | {f"{k}_training_free": free.summary[k] for k in COMPARED}
    | {
      "seconds": round(trained.seconds, 3),
      "version": __version__,
      "jax": jax.__version__,
      "device": jax.devices()[0].device_kind,
    }
  )


def batches(config, dataset, split, data_root, *, batch_size, mesh):
  """The split as the run saw its data, in batches the devices can share."""
  config_lib.validate_model(config, also=("data.",))
  data = config.data
  size = batch_size or config.training.batch_size
  rows = sharding.batch_rows(mesh)
  index, count = sharding.row_share(mesh)
  make = functools.partial(
    pipeline.make_eval,
    dataset=dataset,
    split=split,
    data_root=data_root,
    image_size=config.model.image_size,
    crop=crop_for(dataset, data),
    max_objects=data.max_objects or None,
    max_pixels=data.max_pixels,
    batch_size=-(-size // rows) * rows,
    num_threads=data.num_threads,
    cache=True,
    process_index=index,
    process_count=count,
  )
  return distributed.first_alone(make)


def crop_for(dataset: str, data) -> tuple[int, int, int, int] | None:
  """The run's crop on its own data set; another one is used whole.

  CLEVR with masks always has the field's crop: rows 29:221, columns 64:256.
  """
  if dataset == data.dataset:
    return tuple(data.crop) or None
  return (29, 221, 64, 256) if dataset == "clevr_with_masks" else None
