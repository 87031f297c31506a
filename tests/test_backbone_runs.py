"""Runs on a backbone: their weights, checkpoints, and refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy
from PIL import Image
from published import TO_HUB, to_torch
from small_backbone import flat, images, random_backbone, small

from configs import cityscapes
from spectraldiffusion_jax import (
  build,
  build_encoder,
  checkpoint,
  convert,
  optim,
  train_loop,
  train_state,
)
from spectraldiffusion_jax import weights as weight_files
from spectraldiffusion_jax.errors import UserError
from spectraldiffusion_jax.run import Run


@pytest.fixture
def folder(tmp_path):
  """Three random images, the data set `images`."""
  (tmp_path / "images").mkdir()
  for i, image in enumerate(images(rows=3)):
    Image.fromarray(np.uint8(255 * image)).save(tmp_path / f"images/{i}.png")
  return tmp_path


def run_config(folder, name="vit_tiny", **fields):
  return small(
    name,
    data__dataset="images",
    data__data_root=str(folder / "images"),
    data__train_split="train",
    data__val_split="train",
    training__batch_size=8,
    **fields,
  )


def blank(run):
  """A state of zeros where the run has its own."""
  return jax.tree.map(
    lambda s: jax.device_put(np.zeros(s.shape, s.dtype), s.sharding),
    run.abstract_state,
  )


def test_a_run_starts_with_the_weights_of_the_file(folder):
  done = random_backbone("dinov2_vits14")
  published = folder / "model.safetensors"
  safetensors.numpy.save_file(to_torch(flat(done), TO_HUB, patch=14), published)
  path = folder / "vits14.safetensors"
  convert.convert_file(str(published), str(path))
  config = run_config(
    folder, "dinov2_vits14", model__backbone_weights=str(path)
  )
  run = Run(config)
  state = build.first_state(config, lambda: blank(run))
  started = flat(state.params["encoder"]["vit"])
  for name, value in flat(done).items():
    np.testing.assert_array_equal(started[name], value, err_msg=name)
  shardings = jax.tree.map(lambda x: x.sharding, state.params)
  assert shardings == jax.tree.map(
    lambda x: x.sharding, run.abstract_state.params
  )


def test_a_frozen_state_comes_back_from_its_checkpoint(tmp_path):
  layer = {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}
  params = {"encoder": {"vit": {"block_0": layer, "cls": jnp.ones(2)}}}
  params |= {"to_keys": jax.tree.map(lambda x: 2 * x, layer)}
  tx = optim.make_optimizer(
    optax.constant_schedule(1e-3),
    weight_decay=0.01,
    grad_clip=1.0,
    trainable=build_encoder.make_trainable(small()),
  )
  state = train_state.TrainState(
    jnp.int32(0), params, tx.init(params), train_state.no_history()
  )
  state = jax.tree.map(lambda x: x + 1, state)
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(0, state, config={}, metrics={})
  with checkpoint.Checkpoints(tmp_path, read_only=True) as checkpoints:
    restored, _ = checkpoints.restore_latest(
      jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
        state,
      )
    )
  jax.tree.map(np.testing.assert_array_equal, state, restored)
  moments = [x for x in jax.tree.leaves(restored.opt_state) if x.ndim]
  assert [x.shape for x in moments] == [(3,), (2, 3)] * 2  # of to_keys alone


@pytest.mark.parametrize(
  ("weights", "words"),
  [
    ("", "launch/convert.py.*model.backbone_weights='random'"),
    ("nowhere.safetensors", "no weights file at nowhere"),
    ("page", "web page"),
    ("other", "of vit_tiny, not of dinov2_vits14"),
    ("short", "truncated or damaged"),
  ],
)
def test_wrong_weights_of_a_run_are_one_line(folder, weights, words):
  if weights == "page":
    (folder / weights).write_text("<html>Sign in</html>")
  if weights in ("other", "short"):
    params = random_backbone("vit_tiny")
    weight_files.save_weights(folder / weights, "vit_tiny", params)
  if weights == "short":
    data = (folder / weights).read_bytes()
    (folder / weights).write_bytes(data[: len(data) // 2])
  path = folder / weights if (folder / weights).is_file() else weights
  config = small("dinov2_vits14", model__backbone_weights=str(path))

  def never():
    raise AssertionError("the weights are read before a state is made")

  with pytest.raises(UserError, match=words) as error:
    build.first_state(config, never)
  assert "\n" not in str(error.value)


def test_a_data_set_that_is_not_there_is_one_line(tmp_path):
  config = cityscapes.get_config().copy_and_resolve_references()
  with config.unlocked():
    config.data.data_root = str(tmp_path)
    config.training.batch_size = 16  # for the tests' eight devices
    config.model.backbone_weights = "random"
  with pytest.raises(UserError, match="'cityscapes' is not prepared") as error:
    train_loop.train_and_evaluate(config, str(tmp_path / "run"))
  assert "\n" not in str(error.value)
