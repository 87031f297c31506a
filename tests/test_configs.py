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


COMPILED = {("procedural", "baseline")}
"""The steps of others are compiled in the slow checks; a U-Net's runs in
test_end_to_end.py as well, a backbone's in test_slots_on_backbone.py."""


def parametrize(fast):
  return pytest.mark.parametrize(
    ("name", "variant"),
    [
      pytest.param(*which, marks=[] if which in fast else [pytest.mark.slow])
      for which in sorted(every_config())
    ],
  )


@parametrize(fast=set(every_config()))
def test_a_step_keeps_the_types_of_its_state(name, variant):
  config = small(name, variant)
  sections = ("model", "spectral", "mamba_slot", "diffusion", "composite")
  check_types(
    json.dumps(
      {s: config[s].to_dict() for s in (*sections, "loss_weights")}
      | {"training": {"remat": config.training.remat}},
      sort_keys=True,
    )
  )


@functools.cache
def check_types(sections: str) -> None:
  """Of the step of these sections: configs that differ in others share it.

  If a type changed, the second step would compile everything anew.
  """
  config = config_lib.from_dict(json.loads(sections))
  model, tx, step, batch = make_step(config)

  def run(batch):
    state = train_state.create(model, tx, batch["image"], 0)
    return state, step(state, batch)

  before, (after, metrics) = jax.eval_shape(run, batch)
  assert jax.tree.map(types_of, before) == jax.tree.map(types_of, after)
  assert metrics["loss"].shape == metrics["finite"].shape == ()


def types_of(x):
  return x.shape, x.dtype, x.weak_type


@parametrize(fast=COMPILED)
def test_one_step(name, variant):
  model, tx, step, batch = make_step(small(name, variant))

  @jax.jit
  def run(batch):
    state = train_state.create(model, tx, batch["image"], 0)
    return state, step(state, batch)

  before, (after, metrics) = jax.device_get(run(batch))
  assert float(metrics["finite"]) == 1 and np.isfinite(metrics["loss"])
  moved = jax.tree.map(
    lambda a, b: not np.array_equal(a, b), before.params, after.params
  )
  assert any(jax.tree.leaves(moved)) and int(after.step) == 1
  assert np.isfinite(metrics["grad_norm"]) and metrics["grad_norm"] > 0


def small(name, variant):
  """The config, made small by its widths."""
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
  return config


def make_step(config):
  """Model, optimiser, step and a batch for it."""
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
  return model, tx, step, make_batch(labels=bool(config.composite.rounds))


def make_batch(*, labels: bool):
  random = np.random.default_rng(0)
  batch = {"image": random.uniform(size=(2, 32, 32, 3)).astype(np.float32)}
  if labels:
    marks, flags = np.zeros((2, 32, 32), np.uint8), np.zeros(2, np.float32)
    marks[:, 3:13, 3:13], marks[:, 18:30, 15:29] = 1, 2
    batch |= {"labels": marks, "exact": flags, "distrust": flags}
  return batch
