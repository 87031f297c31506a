"""Slots on a pretrained backbone: shapes, what trains, weights, refusals."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import traverse_util
from PIL import Image
from published import TO_HUB, to_torch

from configs import cityscapes, clevr
from spectraldiffusion_jax import (
  build,
  build_encoder,
  checkpoint,
  convert,
  optim,
  train_loop,
  train_state,
  train_step,
)
from spectraldiffusion_jax import config as config_lib
from spectraldiffusion_jax import weights as weight_files
from spectraldiffusion_jax.backbone import load_backbone
from spectraldiffusion_jax.errors import UserError
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


def make_step(config):
  """The initial state of an image, and one step, both to be jitted."""
  rate = optax.constant_schedule(1e-3)
  tx = optim.make_optimizer(
    rate,
    weight_decay=0.01,
    grad_clip=1.0,
    trainable=build_encoder.make_trainable(config),
  )
  model = build.make_model(config)
  loss = build.make_loss_fn(config, model)
  step = train_step.make_train_step(loss, tx, schedule=rate, seed=0)
  return functools.partial(train_state.create, model, tx, seed=0), step


# ---- shapes -----------------------------------------------------------------


def test_the_cityscapes_model_has_shapes_at_full_size():
  config = cityscapes.get_config()
  config_lib.validate(config)
  side, slots = config.model.image_size, config.model.num_slots
  assert build_encoder.grid_of(config) == (37, 37)
  create, step = make_step(config)
  image = jax.ShapeDtypeStruct((2, side, side, 3), jnp.float32)
  state = jax.eval_shape(create, image)
  after, metrics = jax.eval_shape(step, state, {"image": image})
  assert jax.tree.map(lambda x: x.shape, after) == jax.tree.map(
    lambda x: x.shape, state
  )
  assert metrics["loss"].shape == ()
  seen = jax.eval_shape(
    train_step.make_eval_step(build.make_model(config)), state.params, image
  )
  assert seen.masks.shape == (2, slots, side, side)
  assert seen.slots.slots.shape == (2, slots, 768)
  # ViT-L has 304,367,616 parameters, of which none has moments.
  count = lambda tree: sum(x.size for x in jax.tree.leaves(tree))
  frozen = count(state.params["encoder"]["vit"])
  assert frozen == 304_367_616
  trained = count(state.params) - frozen
  assert 0 <= count(state.opt_state) - 2 * trained < 10  # and step counters


@pytest.mark.parametrize(
  ("mode", "features", "size"),
  [
    ("fused", "tokens", (32, 32)),
    ("per_scale", "keys", (30, 45)),  # seen at 32 x 48: 4 x 6 tokens
    ("graph", "tokens", (24, 50)),
  ],
)
def test_masks_are_a_partition_at_image_size(mode, features, size):
  config = small(spectral__mode=mode, model__backbone_features=features)
  model, image = build.make_model(config), images(*size)

  @jax.jit
  def run(image):
    rngs = train_state.stream_keys(0, 0)
    labels = jnp.zeros(image.shape[:3], jnp.int32)
    params = model.init(rngs, image, labels, label_slots=2)
    return model.apply(params, image, rngs=rngs)

  output = jax.device_get(run(image))
  assert output.masks.shape == (2, 4, *size)
  np.testing.assert_allclose(output.masks.sum(1), 1, atol=1e-4)
  attention = output.slots.attention
  grid = tuple(int(side / 8 + 0.5) for side in size)
  assert attention.shape == (2, 4, grid[0] * grid[1])
  assert output.slots.active.sum(1).min() >= 2  # the spectral step cut it


def test_the_graph_sees_what_load_backbone_gives():
  config = small(
    model__backbone_features="keys", mamba_slot__use_spatial_fusion=False
  )
  backbone = load_backbone("vit_tiny", "random", features="keys", seed=3)
  encoder = build_encoder.make_encoder(config)
  image = jnp.asarray(images(30, 45))
  found = jax.jit(encoder.apply)({"params": {"vit": backbone.params}}, image)
  np.testing.assert_allclose(found.tokens, backbone(image), atol=1e-5)
  np.testing.assert_array_equal(found.tokens, found.backbone)


# ---- what trains ------------------------------------------------------------


@pytest.mark.parametrize("last", [0, 1])
def test_a_step_trains_the_slots_and_the_last_blocks_alone(last):
  config = small(
    "dinov2_vits14", model__image_size=42, model__backbone_trainable=last
  )
  create, step = make_step(config)

  @jax.jit
  def run(image):
    state = create(image)
    return state.params, step(state, {"image": image})

  before, (after, metrics) = jax.device_get(run(images(42, 42)))
  assert float(metrics["finite"]) == 1
  before, after = flat(before), flat(after.params)
  moved = {k for k in before if before[k].tobytes() != after[k].tobytes()}
  inside = {k for k in moved if k.startswith("encoder/vit/")}
  tuned = {"norm", "block_11"} if last else set()
  assert {k.split("/")[2] for k in inside} == tuned
  assert {"to_keys/kernel", "attention/value/kernel"} <= moved - inside
  kernels = {k for k in before if k.endswith("kernel") and "/vit/" not in k}
  assert len(kernels & moved) > 0.8 * len(kernels)


def test_tuned_everything_has_the_gradient_of_no_stop():
  def gradient(tuned):
    model = build_encoder.make_backbone(
      small(model__backbone_trainable=tuned)
    ).clone(depth=2)
    params = load_backbone("vit_tiny", "random", depth=2).params
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
  create, step = make_step(config)
  marks = np.zeros((2, 32, 32), np.uint8)
  marks[:, 3:13, 3:13] = 1
  flags = np.zeros(2, np.float32)
  batch = {"image": images(), "labels": marks, "exact": flags}
  batch["distrust"] = flags
  run = jax.jit(lambda batch: step(create(batch["image"]), batch)[1])
  assert float(run(batch)["finite"]) == 1


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


def test_a_run_starts_with_the_weights_of_the_file(folder):
  done = load_backbone("dinov2_vits14", "random", seed=9).params
  published = folder / "model.safetensors"
  import safetensors.numpy

  safetensors.numpy.save_file(
    to_torch({k: np.asarray(v) for k, v in flat(done).items()}, TO_HUB),
    published,
  )
  path = folder / "vits14.safetensors"
  convert.convert_file(str(published), str(path))
  config = run_config(
    folder, "dinov2_vits14", model__backbone_weights=str(path)
  )
  run = Run(config)
  state = build.first_state(config, run.init_state)
  started = flat(state.params["encoder"]["vit"])
  for name, value in flat(done).items():
    np.testing.assert_array_equal(started[name], value, err_msg=name)
  shardings = jax.tree.map(lambda x: x.sharding, state.params)
  assert shardings == jax.tree.map(
    lambda x: x.sharding, run.abstract_state.params
  )


def test_a_frozen_state_comes_back_from_its_checkpoint(folder):
  config = run_config(folder)
  run = Run(config)
  state = build.first_state(config, run.init_state)
  with checkpoint.Checkpoints(folder) as checkpoints:
    checkpoints.save(0, state, config={}, metrics={})
  with checkpoint.Checkpoints(folder, read_only=True) as checkpoints:
    restored, _ = checkpoints.restore_latest(build.abstract_state(config))
  jax.tree.map(np.testing.assert_array_equal, state, restored)
  assert len(jax.tree.leaves(restored.opt_state)) > 2


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
    params = load_backbone("vit_tiny", "random").params
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
    config.model.backbone_weights = "random"
  with pytest.raises(UserError, match="'cityscapes' is not prepared") as error:
    train_loop.train_and_evaluate(config, str(tmp_path / "run"))
  assert "\n" not in str(error.value)
