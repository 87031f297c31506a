"""Small models with slots on a backbone, and random parameters for them."""

import functools

import jax
import numpy as np
import optax
from flax import traverse_util

from configs import clevr
from spectraldiffusion_jax import (
  build,
  build_encoder,
  optim,
  train_state,
  train_step,
)
from spectraldiffusion_jax import config as config_lib
from spectraldiffusion_jax.models.vit_variants import abstract_params, make_vit


def small(name="vit_tiny", **fields):
  """The CLEVR config on a backbone, with narrow parts at 32 px."""
  config = clevr.get_config("dinov2").copy_and_resolve_references()
  with config.unlocked():
    config.model.update(
      dinov2_model=name,
      backbone_size=0,
      backbone_weights="random",
      image_size=32,
      num_slots=4,
      slot_dim=16,
      num_iterations=1,
      decoder_width=8,
    )
    config.mamba_slot.update(d_state=4, key_dim=8)
    config.diffusion.update(width=16, latent_dim=8, num_tokens=4)
    for name, value in fields.items():
      section, field = name.split("__")
      config[section][field] = value
  config_lib.validate(config)
  return config


def images(height=32, width=32, rows=2):
  shape = (rows, height, width, 3)
  return np.random.default_rng(0).uniform(size=shape).astype(np.float32)


def flat(tree):
  return traverse_util.flatten_dict(tree, sep="/")


def fill(shapes, seed=0):
  """Random arrays of these shapes; quicker than compiling an initialiser."""
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda s: np.float32(0.1) * (rng.random(s.shape, np.float32) - 0.5), shapes
  )


def random_backbone(name, seed=0, **fields):
  return fill(abstract_params(make_vit(name, **fields)), seed)


def make_step(config, **fields):
  """The model, its optimiser, what makes a state of an image, and one step.

  `fields` replace those of the backbone: scan=True traces one block for all.
  """
  rate = optax.constant_schedule(1e-3)
  tx = optim.make_optimizer(
    rate,
    weight_decay=0.01,
    grad_clip=1.0,
    trainable=build_encoder.make_trainable(config),
  )
  model = build.make_model(config)
  if fields:
    vit = model.encoder.vit.clone(**fields)
    model = model.clone(encoder=model.encoder.clone(vit=vit))
  loss = build.make_loss_fn(config, model)
  step = train_step.make_train_step(loss, tx, schedule=rate, seed=0)
  return (
    model,
    tx,
    functools.partial(train_state.create, model, tx, seed=0),
    step,
  )
