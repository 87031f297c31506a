"""Every config there is trains one step, made small by its widths."""

import functools
import importlib
import json
import pathlib

import jax
import numpy as np
import pytest

from spectraldiffusion_jax import (
  build,
  build_encoder,
  optim,
  train_state,
  train_step,
)
from spectraldiffusion_jax import config as config_lib

FOLDER = pathlib.Path(__file__).resolve().parent.parent / "configs"


def every_config():
  for path in sorted(FOLDER.glob("*.py")):
    if path.stem != "__init__":
      module = importlib.import_module(f"configs.{path.stem}")
      for variant in getattr(module, "VARIANTS", ("",)):
        yield path.stem, variant


def get(name, variant):
  module = importlib.import_module(f"configs.{name}")
  return module.get_config(variant) if variant else module.get_config()


LONG = {("bdd100k", ""), *(("clevr", v) for v in ("", "clevr6", "tiny"))}
"""Configs whose step is much like another's, and slow to compile."""


@pytest.mark.parametrize(
  ("name", "variant"),
  [
    pytest.param(*which, marks=[pytest.mark.slow] if which in LONG else [])
    for which in sorted(every_config())
  ],
)
def test_one_step(name, variant):
  config = get(name, variant)
  config_lib.validate(config)
  with config.unlocked():
    config.model.image_size, config.model.width = 32, 8
    config.model.num_slots, config.model.slot_dim = 5, 16
    config.model.num_iterations, config.mamba_slot.d_state = 1, 4
    config.diffusion.width = 8
    if config.model.dinov2_model:
      # test_slots_on_backbone.py has the published sizes.
      config.model.dinov2_model, config.model.backbone_size = "vit_tiny", 0
      config.model.token_stride, config.diffusion.num_tokens = 4, 4
  sections = ("model", "spectral", "mamba_slot", "diffusion", "composite")
  step_once(
    json.dumps(
      {s: config[s].to_dict() for s in (*sections, "loss_weights")}
      | {"training": {"remat": config.training.remat}},
      sort_keys=True,
    )
  )


@functools.cache
def step_once(sections: str) -> None:
  """One step; variants that differ in data or length alone share it."""
  config = config_lib.from_dict(json.loads(sections))
  schedule = optim.make_schedule(
    learning_rate=1e-3, length=optim.Length(1, 10, 0, 1)
  )
  tx = optim.make_optimizer(
    schedule,
    weight_decay=0.01,
    grad_clip=1.0,
    trainable=build_encoder.make_trainable(config),
  )
  model = build.make_model(config)
  step = train_step.make_train_step(
    build.make_loss_fn(config, model), tx, schedule=schedule, seed=0
  )
  batch = make_batch(labels=bool(config.composite.rounds))

  @jax.jit
  def run(batch):
    state = train_state.create(model, tx, batch["image"], 0)
    return state, step(state, batch)

  states = run(batch)
  # Else the second step would compile everything anew.
  types = [jax.tree.map(jax.typeof, s) for s in (states[0], states[1][0])]
  assert types[0] == types[1]
  before, (after, metrics) = jax.device_get(states)
  assert float(metrics["finite"]) == 1 and np.isfinite(metrics["loss"])
  moved = jax.tree.map(
    lambda a, b: not np.array_equal(a, b), before.params, after.params
  )
  assert any(jax.tree.leaves(moved)) and int(after.step) == 1
  assert np.isfinite(metrics["grad_norm"]) and metrics["grad_norm"] > 0


def make_batch(*, labels: bool):
  random = np.random.default_rng(0)
  batch = {"image": random.uniform(size=(2, 32, 32, 3)).astype(np.float32)}
  if labels:
    marks, flags = np.zeros((2, 32, 32), np.uint8), np.zeros(2, np.float32)
    marks[:, 3:13, 3:13], marks[:, 18:30, 15:29] = 1, 2
    batch |= {"labels": marks, "exact": flags, "distrust": flags}
  return batch
