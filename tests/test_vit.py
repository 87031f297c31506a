"""Vision transformers: parts, fields, precision, training, sharding."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from vit_reference import (
  GOLDEN_MODELS,
  apply,
  golden_image,
  our_model,
)

from spectraldiffusion_jax.errors import UserError
from spectraldiffusion_jax.models import vit
from spectraldiffusion_jax.models.vit_variants import (
  abstract_params,
  make_vit,
  stack_blocks,
  unstack_blocks,
)
from spectraldiffusion_jax.sharding import make_mesh, state_sharding


def test_image_that_does_not_tile_is_refused():
  model, params = our_model("plain")
  with pytest.raises(UserError, match="12 x 30 .* patches of 4"):
    model.apply(params, jnp.zeros((1, 12, 30, 3)))


def test_without_positions_tokens_follow_their_patches():
  model, params = our_model("plain")
  params = {"params": params["params"] | {"pos_embed": np.zeros((1, 26, 32))}}
  params = jax.tree.map(lambda x: np.asarray(x, np.float32), params)
  image = golden_image()
  out = apply(model, params, image)
  flipped = image.reshape(1, 12, 7, 4, 3)[:, :, ::-1].reshape(image.shape)
  mirrored = apply(model, params, flipped)
  np.testing.assert_allclose(mirrored.tokens[:, :, ::-1], out.tokens, atol=1e-5)
  np.testing.assert_allclose(mirrored.cls, out.cls, atol=1e-5)


def test_scan_and_remat_change_nothing():
  model, params = our_model("registers")
  image = golden_image()

  def loss(params, model):
    out = model.apply({"params": params}, image)
    return jnp.sum(out.tokens**2) + jnp.sum(out.keys) + jnp.sum(out.cls)

  grad = jax.jit(jax.value_and_grad(loss), static_argnums=1)
  value, plain = grad(params["params"], model)
  stacked = stack_blocks(params["params"])
  scanned = model.clone(scan=True, remat="full")
  scanned_value, scanned_grad = grad(stacked, scanned)
  np.testing.assert_allclose(scanned_value, value, rtol=1e-5)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-4),
    plain,
    unstack_blocks(scanned_grad),
  )
  assert jax.tree.map(jnp.shape, stacked) == jax.tree.map(
    jnp.shape, dict(abstract_params(scanned))
  )


def test_remat_recomputes():
  model, params = our_model("plain")

  def loss(params, model):
    return model.apply(params, golden_image()).tokens.sum()

  texts = [
    str(jax.make_jaxpr(lambda p, m=m: jax.grad(loss)(p, m))(params))
    for m in (model, model.clone(remat="full"))
  ]
  # Attention by rows has its own, in either.
  plain, recomputed = (text.count("remat") for text in texts)
  assert recomputed >= plain + 2


def test_bfloat16_is_close():
  model, params = our_model("registers")
  out = apply(model, params, golden_image())
  half = apply(model.clone(dtype=jnp.bfloat16), params, golden_image())
  error = jax.tree.map(
    lambda a, b: float(jnp.linalg.norm(a - b) / jnp.linalg.norm(a)), out, half
  )
  assert 1e-4 < max(jax.tree.leaves(error)) < 2e-2, error


@pytest.mark.parametrize(
  ("field", "value"),
  [
    *(("patch", 2), ("width", 48), ("depth", 3), ("heads", 4), ("hidden", 96)),
    *(("gated", False), ("registers", 2), ("grid", 6), ("grid", None)),
    *(("pos_antialias", False), ("pos_offset", 0.1), ("key_bias", False)),
    *(("layer_scale", None), ("norm_eps", 1e-1), ("dtype", jnp.bfloat16)),
  ],
)
def test_every_field_matters(field, value):
  model, params = our_model("registers")
  changed = model.clone(**{field: value})
  trees = [
    jax.tree.map(jnp.shape, abstract_params(m)) for m in (model, changed)
  ]
  if trees[0] == trees[1]:
    image = golden_image()
    a, b = (apply(m, params, image).tokens for m in (model, changed))
    assert a.shape != b.shape or jnp.abs(a - b).max() > 1e-4


def test_layer_scale_starts_at_its_value():
  model = vit.Vit(**GOLDEN_MODELS["plain"], layer_scale=0.125)
  init = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 4, 4, 3)))
  assert set(np.asarray(init["params"]["block_1"]["mlp_scale"])) == {0.125}


def random_params(model, size, seed=0):
  """Every parameter random, so that none can be left out unnoticed."""
  params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, *size, 3)))
  leaves, tree = jax.tree.flatten(params)
  rng = np.random.default_rng(seed)
  return jax.tree.unflatten(
    tree, [x + rng.normal(0, 0.3, x.shape).astype(np.float32) for x in leaves]
  )


def test_small_vit_trains_from_scratch():
  # The mean colour of the whole image from any one token: only attention
  # brings it there.
  model = make_vit("vit_tiny", patch=4, width=48, depth=2, hidden=96, grid=4)
  rng = np.random.default_rng(0)
  image = rng.normal(size=(32, 16, 16, 3)) + rng.normal(size=(32, 1, 1, 3))
  image = jnp.asarray(image, jnp.float32)
  target = image.mean((1, 2), keepdims=True)
  params = jax.jit(model.init)(jax.random.key(0), image)
  tx = optax.adam(3e-3)

  @jax.jit
  def step(params, state):
    def loss(params):
      tokens = model.apply(params, image).tokens
      error = tokens[..., :3] - jnp.broadcast_to(target, (32, 4, 4, 3))
      return jnp.mean(error**2)

    value, grads = jax.value_and_grad(loss)(params)
    updates, state = tx.update(grads, state)
    return optax.apply_updates(params, updates), state, value

  state, losses = tx.init(params), []
  for _ in range(80):
    params, state, value = step(params, state)
    losses.append(float(value))
  assert losses[-1] < 0.1 * losses[0], losses[::20]


def test_sharded_equals_one_device():
  model = vit.Vit(**GOLDEN_MODELS["registers"])
  params = random_params(model, (8, 8))
  image = jnp.asarray(np.repeat(golden_image(), 8, axis=0))
  wanted = apply(model, params, image)
  mesh = make_mesh(data=2, fsdp=2, model=2)
  sharding = state_sharding(params, mesh)
  up = sharding["params"]["block_0"]["mlp"]["up"]["kernel"]
  assert up.spec == jax.P("fsdp", "model")
  out = apply(model, jax.device_put(params, sharding), image)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), wanted, out
  )
