"""Input that no segmentation is defined for, through the whole tiny model."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import procedural
from spectraldiffusion_jax import build, segmenter
from spectraldiffusion_jax.errors import UserError
from spectraldiffusion_jax.train_state import stream_keys

SIZE = 32
BAD = (
  "constant",
  "two colours",
  "disconnected halves",
  "one object",
  "no label known",
)


def tiny(num_slots):
  """The whole model at 32 px with the narrowest parts."""
  config = procedural.get_config("easy").copy_and_resolve_references()
  with config.unlocked():
    config.model.update(
      image_size=SIZE, width=8, slot_dim=16, num_slots=num_slots
    )
    config.mamba_slot.d_state = 4
    config.diffusion.width = 16
  return config


def batch():
  """A bad image a row, with the labels the first round would give it."""
  image = np.full((len(BAD), SIZE, SIZE, 3), 0.5, np.float32)
  labels = np.zeros((len(BAD), SIZE, SIZE), np.uint8)
  image[1, :, 16:] = 0.1
  image[2, :16], image[2, 16:] = [1, 0, 0], [0, 0, 1]
  image[3, 10:20, 10:20] = [0.9, 0.1, 0.1]
  labels[3, 10:20, 10:20] = 1
  labels[4] = 255
  zeros = np.zeros(len(BAD), np.float32)
  return dict(image=image, labels=labels, exact=zeros, distrust=zeros)


@functools.cache
def made(num_slots):
  """Config, parameters, loss with gradient, and masks, compiled once."""
  config = tiny(num_slots)
  model = build.make_model(config)
  rngs = stream_keys(0, 0)
  init = jax.jit(
    lambda image, labels: model.init(
      rngs, image, labels, label_slots=2, train=True
    )
  )
  params = init(
    jnp.zeros((1, SIZE, SIZE, 3)), jnp.zeros((1, SIZE, SIZE), jnp.int32)
  )["params"]
  loss = jax.jit(
    jax.value_and_grad(build.make_loss_fn(config, model), has_aux=True)
  )
  return config, params, lambda rows: loss(params, rows, rngs)


def test_loss_and_gradients_stay_finite():
  (total, metrics), grads = made(11)[2](batch())
  assert np.isfinite(total)
  assert all(np.isfinite(value) for value in metrics.values()), metrics
  assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


def test_nan_in_an_image_is_seen_and_not_hidden():
  # What the training step needs to leave the parameters alone.
  rows = batch()
  rows["image"][0, 3, 3] = np.nan
  (total, _), _ = made(11)[2](rows)
  assert not np.isfinite(total)


def test_images_of_any_kind_get_masks_that_are_a_partition():
  config, params, _ = made(11)
  pixel = np.full((1, 1, 3), 200, np.uint8)
  line = np.zeros((1, 40), np.uint8)
  images = [*batch()["image"], pixel, line]
  found = segmenter.Segmenter(config, params).segment(images, batch_size=7)
  for image, one in zip(images, found, strict=True):
    assert one.labels.shape == image.shape[:2]
    assert 0 <= one.labels.min() and one.labels.max() < 11
    assert np.isfinite(one.masks).all() and (one.masks >= 0).all()
    np.testing.assert_allclose(one.masks.sum(0), 1.0, atol=1e-4)


@pytest.mark.parametrize("value", [np.nan, np.inf, 7.0])
def test_images_that_are_no_images_are_refused(value):
  config, params, _ = made(11)
  with pytest.raises(UserError, match="image"):
    segmenter.Segmenter(config, params).segment(
      [np.full((8, 8, 3), value, np.float32)]
    )
