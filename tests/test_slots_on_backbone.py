"""Slots on a pretrained backbone: shapes, what trains, weights, refusals."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy
from flax import traverse_util
from PIL import Image
from published import TO_HUB, to_torch

from configs import cityscapes, clevr
from spectraldiffusion_jax import (
  build,
  build_encoder,
  build_spectral,
  checkpoint,
  convert,
  optim,
  train_loop,
  train_state,
  train_step,
)
from spectraldiffusion_jax import config as config_lib
from spectraldiffusion_jax import weights as weight_files
from spectraldiffusion_jax.backbone import Backbone
from spectraldiffusion_jax.errors import UserError
from spectraldiffusion_jax.models.vit_variants import abstract_params, make_vit
from spectraldiffusion_jax.run import Run


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


# ---- shapes -----------------------------------------------------------------


@pytest.mark.parametrize(
  "scan", [True, pytest.param(False, marks=pytest.mark.slow)]
)
def test_the_cityscapes_model_has_shapes_at_full_size(scan):
  config = cityscapes.get_config()
  config_lib.validate(config)
  side, slots = config.model.image_size, config.model.num_slots
  assert build_encoder.grid_of(config) == (37, 37)
  model, _, create, step = make_step(config, scan=scan)
  image = jax.ShapeDtypeStruct((2, side, side, 3), jnp.float32)
  state = jax.eval_shape(create, image)
  after, metrics = jax.eval_shape(step, state, {"image": image})
  assert jax.tree.map(lambda x: x.shape, after) == jax.tree.map(
    lambda x: x.shape, state
  )
  assert metrics["loss"].shape == ()
  seen = jax.eval_shape(train_step.make_eval_step(model), state.params, image)
  assert seen.masks.shape == (2, slots, side, side)
  assert seen.slots.slots.shape == (2, slots, 768)
  # ViT-L has 304,367,616 parameters, of which none has moments.
  count = lambda tree: sum(x.size for x in jax.tree.leaves(tree))
  frozen = count(state.params["encoder"]["vit"])
  assert frozen == 304_367_616
  trained = count(state.params) - frozen
  assert 0 <= count(state.opt_state) - 2 * trained < 10  # and step counters


@pytest.mark.parametrize("mode", ["fused", "per_scale", "graph"])
def test_every_mode_tells_two_kinds_of_tokens_apart(mode):
  config = small(spectral__mode=mode)
  rng = np.random.default_rng(0)
  kinds = rng.normal(size=(2, 32))
  side = np.zeros((6, 9), int)
  side[2:5, 3:7] = 1
  tokens = kinds[side] + 0.1 * rng.normal(size=(6, 9, 32))
  tokens = tokens - tokens.mean((0, 1))
  tokens /= np.linalg.norm(tokens, axis=-1, keepdims=True)
  run = jax.jit(build_spectral.make_partition(config))
  share, active = run(jnp.float32(tokens[None]))
  label = np.asarray(share)[0].argmax(0).reshape(6, 9)
  assert active.shape == (1, 4) and active[0].sum() >= 2
  assert not set(label[side == 1]) & set(label[side == 0])


def test_masks_are_a_partition_at_the_size_of_any_image():
  config = small(model__backbone_features="keys")
  model, image = build.make_model(config), jnp.asarray(images(30, 45))
  rngs = train_state.stream_keys(0, 0)
  labels = jnp.zeros(image.shape[:3], jnp.int32)
  shapes = jax.eval_shape(
    lambda: model.init(rngs, image, labels, label_slots=2)
  )
  run = jax.jit(lambda params: model.apply(params, image, rngs=rngs))
  output = jax.device_get(run(fill(shapes)))
  assert output.masks.shape == (2, 4, 30, 45)
  np.testing.assert_allclose(output.masks.sum(1), 1, atol=1e-4)
  assert output.slots.attention.shape == (2, 4, 4 * 6)  # seen at 32 x 48


def test_the_graph_sees_what_load_backbone_gives():
  config = small(
    model__backbone_features="keys", mamba_slot__use_spatial_fusion=False
  )
  params = random_backbone("vit_tiny", seed=3)
  encoder = build_encoder.make_encoder(config)
  image = jnp.asarray(images(30, 45))
  found = jax.jit(encoder.apply)({"params": {"vit": params}}, image)
  model = build_encoder.make_backbone(config)
  whole = Backbone(params, model, "vit_tiny", "keys", 0)(image)
  np.testing.assert_allclose(found.tokens, whole, atol=1e-5)
  np.testing.assert_array_equal(found.tokens, found.backbone)


# ---- what trains ------------------------------------------------------------


@pytest.mark.parametrize(
  ("name", "side", "last", "tuned", "fields"),
  [
    ("dinov2_vits14", 42, 0, set(), {"scan": True}),
    ("vit_tiny", 32, 1, {"norm", "block_1"}, {"depth": 2}),
    pytest.param(
      *("dinov2_vits14", 42, 2, {"norm", "block_10", "block_11"}, {}),
      marks=pytest.mark.slow,
    ),
  ],
)
def test_a_step_trains_the_slots_and_the_last_blocks_alone(
  name, side, last, tuned, fields
):
  config = small(
    name,
    model__image_size=side,
    model__backbone_trainable=last,
    model__slot_update="gru",
    mamba_slot__use_spatial_fusion=False,
  )
  _, tx, create, step = make_step(config, **fields)
  image = images(side, side)
  before = fill(jax.eval_shape(create, image).params)
  state = train_state.TrainState(jnp.int32(0), before, tx.init(before))
  after, metrics = jax.device_get(jax.jit(step)(state, {"image": image}))
  assert float(metrics["finite"]) == 1
  before, after = flat(before), flat(after.params)
  moved = {k for k in before if before[k].tobytes() != after[k].tobytes()}
  inside = {k for k in moved if k.startswith("encoder/vit/")}
  assert {k.split("/")[2] for k in inside} == tuned
  assert {"to_keys/kernel", "attention/value/kernel"} <= moved - inside
  kernels = {k for k in before if k.endswith("kernel") and "/vit/" not in k}
  assert kernels <= moved


def test_tuned_everything_has_the_gradient_of_no_stop():
  def gradient(tuned):
    model = build_encoder.make_backbone(
      small(model__backbone_trainable=tuned)
    ).clone(depth=2)
    params = random_backbone("vit_tiny", depth=2)
    loss = lambda p: (model.apply({"params": p}, images(8, 16)).keys ** 2).sum()
    return jax.jit(jax.grad(loss))(params)

  whole, some = flat(gradient(2)), flat(gradient(1))
  for name, value in some.items():
    if name.startswith("block_1/"):
      np.testing.assert_allclose(value, whole[name], rtol=1e-4, atol=1e-5)
    else:
      assert not np.any(value)
  assert np.any(whole["pos_embed"])
  assert not any(map(np.any, jax.tree.leaves(gradient(0))))


def test_labels_can_stand_in_for_the_spectral_step():
  config = small(composite__rounds=1)
  *_, create, step = make_step(config)
  batch = {"image": images(), "labels": np.ones((2, 32, 32), np.uint8)}
  batch |= dict.fromkeys(("exact", "distrust"), np.zeros(2, np.float32))
  state = jax.eval_shape(create, batch["image"])
  after, metrics = jax.eval_shape(step, state, batch)
  assert after.params.keys() == state.params.keys()
  assert "foreground_loss" not in metrics  # that needs a field


# ---- weights ----------------------------------------------------------------


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
  state = train_state.TrainState(jnp.int32(0), params, tx.init(params))
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
