"""Selective scan modules: step against scan, fusion, directions, dtypes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_params import init, random

from spectraldiffusion_jax import optim
from spectraldiffusion_jax.errors import UserError
from spectraldiffusion_jax.models import ssm

B, D = 2, 12
SMALL = {"num_heads": 2, "head_dim": 4, "d_state": 6}


@pytest.mark.parametrize("method", ["chunked", "associative"])
def test_step_mode_equals_the_scan(method):
  module = ssm.SelectiveSSM(**SMALL, method=method)
  inputs = random(0, B, 9, D)
  params = init(module, inputs)
  y, z = jax.jit(module.apply)(params, inputs)
  step = jax.jit(lambda p, x, h: module.apply(p, x, h, method="step"))
  state = jnp.zeros((B, 2, 4, 6))
  for t in range(9):
    y_t, z_t, state = step(params, inputs[:, t], state)
    np.testing.assert_allclose(y_t, y[:, t], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(z_t, z[:, t], rtol=1e-4, atol=1e-5)


def test_initial_parameters():
  module = ssm.SelectiveSSM(num_heads=256)
  p = jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, 1, D)))["params"]
  dt, rate = jax.nn.softplus(p["dt_bias"]), jnp.exp(p["a_log"])
  assert 1e-3 * 0.99 <= dt.min() < 2e-3 and 0.08 < dt.max() <= 0.1 * 1.01
  # Log-uniform: the median is the geometric mean of the ends.
  assert 0.006 < np.median(dt) < 0.017
  assert 1 <= rate.min() < 1.5 and 15 < rate.max() <= 16
  mask = optim.decay_mask(p)
  assert not (mask["a_log"] or mask["dt_bias"] or mask["skip"])
  assert mask["in_proj"]["kernel"]


def test_every_token_sees_every_other():
  # Without fusion the two scans alone must reach both ways.
  module = ssm.SelectiveScan2D(**SMALL, use_spatial_fusion=False)
  tokens = random(0, 1, 3, 4, D)
  params = init(module, tokens)
  changed = tokens.at[0, 1, 1, 0].add(3.0)
  apply = jax.jit(module.apply)
  moved = jnp.abs(apply(params, changed) - apply(params, tokens))
  assert bool((moved[0].max(-1) > 1e-6).all())


def test_halves_of_the_heads_run_in_opposite_directions():
  module = ssm.SelectiveSSM(**SMALL, bidirectional=True)
  inputs = random(0, 1, 7, D)
  params = init(module, inputs)
  changed = inputs.at[0, 3].add(1.0)
  apply = jax.jit(module.apply)
  moved = jnp.abs(apply(params, changed)[0] - apply(params, inputs)[0])
  forward, backward = moved[0, :, :4].max(-1), moved[0, :, 4:].max(-1)
  assert bool((forward[:3] == 0).all() and (forward[3:] > 0).all())
  assert bool((backward[4:] == 0).all() and (backward[:4] > 0).all())
  with pytest.raises(UserError, match="num_heads=3"):
    ssm.SelectiveSSM(num_heads=3, bidirectional=True).init(
      jax.random.key(0), inputs
    )


def test_fusion_starts_as_the_identity():
  module, x = ssm.SpatialFusion(), random(0, B, 5, 7, 3)
  params = module.init(jax.random.key(0), x)
  np.testing.assert_array_equal(module.apply(params, x), x)


def convolve(x, taps, alpha):
  """The fusion by XLA's grouped convolution, border replicated."""
  total = 0.0
  for i, d in enumerate((1, 3, 5)):
    padded = jnp.pad(x, ((0, 0), (d, d), (d, d), (0, 0)), mode="edge")
    total += jax.lax.conv_general_dilated(
      padded,
      (alpha[i] * taps[i])[:, :, None],
      (1, 1),
      "VALID",
      rhs_dilation=(d, d),
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
      feature_group_count=x.shape[-1],
    )
  return total


@pytest.mark.parametrize("grid", [(6, 7), (1, 1), (1, 9)])
def test_fusion_equals_dilated_convolutions(grid):
  x = random(0, B, *grid, 3)
  params = init(ssm.SpatialFusion(), x)
  probe = random(1, *x.shape)

  def ours(x, p):
    return jnp.sum(ssm.SpatialFusion().apply(p, x) * probe)

  def theirs(x, p):
    p = p["params"]
    return jnp.sum(convolve(x, p["taps"], p["alpha"]) * probe)

  got = jax.jit(jax.value_and_grad(ours, argnums=(0, 1)))(x, params)
  expected = jax.jit(jax.value_and_grad(theirs, argnums=(0, 1)))(x, params)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4),
    got,
    expected,
  )


def test_block_starts_near_the_identity():
  tokens = random(0, B, 4, 4, 64)
  module = ssm.SelectiveScan2D()
  params = jax.jit(module.init)(jax.random.key(0), tokens)
  change = jax.jit(module.apply)(params, tokens) - tokens
  assert 0.03 < float(jnp.std(change)) < 0.2


def test_bf16_follows_float32():
  tokens = random(0, B, 4, 5, D)
  full = ssm.SelectiveScan2D(**SMALL)
  half = ssm.SelectiveScan2D(**SMALL, dtype=jnp.bfloat16)
  params = init(full, tokens)
  shapes = jax.eval_shape(half.init, jax.random.key(0), tokens)
  assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(shapes))
  y = jax.jit(half.apply)(params, tokens.astype(jnp.bfloat16))
  assert y.dtype == jnp.bfloat16
  expected = jax.jit(full.apply)(params, tokens)
  assert float(jnp.abs(y.astype(jnp.float32) - expected).max()) < 0.05


@pytest.mark.parametrize("grid", [(1, 1), (3, 5)])
def test_gradients_reach_every_parameter(grid):
  tokens = random(0, 1, *grid, D)
  module = ssm.SelectiveScan2D(**SMALL)
  params = init(module, tokens)
  grads = jax.jit(jax.grad(lambda p: jnp.sum(module.apply(p, tokens) ** 2)))(
    params
  )
  for path, grad in jax.tree_util.tree_leaves_with_path(grads):
    assert bool(jnp.isfinite(grad).all()), path
    if grid != (1, 1):
      assert float(jnp.abs(grad).max()) > 0, path
