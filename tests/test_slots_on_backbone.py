"""Slots on a pretrained backbone: shapes, and what trains."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_backbone import (
  fill,
  flat,
  images,
  make_step,
  random_backbone,
  small,
)

from configs import cityscapes
from spectraldiffusion_jax import (
  build,
  build_encoder,
  build_spectral,
  train_state,
  train_step,
)
from spectraldiffusion_jax import config as config_lib
from spectraldiffusion_jax.backbone import Backbone

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
    model__use_spectral_init=False,  # test_configs.py steps with it
    mamba_slot__use_gmm_prior=False,
    mamba_slot__use_spatial_fusion=False,
  )
  _, tx, create, step = make_step(config, **fields)
  image = images(side, side)
  before = fill(jax.eval_shape(create, image).params)
  state = train_state.TrainState(
    jnp.int32(0), before, tx.init(before), train_state.no_history()
  )
  after, metrics = jax.device_get(jax.jit(step)(state, {"image": image}))
  assert float(metrics["finite"]) == 1
  before, after = flat(before), flat(after.params)
  moved = {k for k in before if before[k].tobytes() != after[k].tobytes()}
  inside = {k for k in moved if k.startswith("encoder/vit/")}
  assert {k.split("/")[2] for k in inside} == tuned
  assert "attention/value/kernel" in moved
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
