"""Slot cells: their equations, the scan they are steps of, equivariance."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from random_params import init, random

from spectraldiffusion_jax.models import slot_update, ssm

B, K, D, E = 2, 4, 12, 5
SMALL = {"num_heads": 2, "head_dim": 4, "d_state": 6}
CELLS = {
  "ssm": slot_update.SlotSSMCell(**SMALL, gate_dim=E),
  "gru": slot_update.GRUSlotCell(gate_dim=E),
}


def test_slot_cell_equals_a_scan_over_its_rounds():
  # The inputs of a cell's rounds, replayed as one sequence: the same modules
  # with the same parameters, W_u first, then the scan form of the SSM.
  cell = CELLS["ssm"]
  slots, updates = random(0, B, K, D), random(1, 3, B, K, D)
  state = cell.initial_state(slots)
  params = init(cell, slots, updates[0], state)

  def record(next_fun, args, kwargs, context):
    if isinstance(context.module, ssm.SelectiveSSM) and (
      context.method_name == "step"
    ):
      seen.append(args[0].reshape(B * K, -1))
      out = next_fun(*args, **kwargs)
      seen.append(out[0])
      return out
    return next_fun(*args, **kwargs)

  seen = []

  @jax.jit
  def rounds(params, slots, state):
    for update in updates:
      with nn.intercept_methods(record):
        slots, state, _ = cell.apply(params, slots, update, state)
    return jnp.stack(seen[::2], 1), jnp.stack(seen[1::2], 1)

  inputs, outputs = rounds(params, slots, state)
  scanned = ssm.SelectiveSSM(**SMALL, activate=False)
  scan = jax.jit(
    lambda x: scanned.apply({"params": params["params"]["ssm"]}, x)
  )
  np.testing.assert_allclose(outputs, scan(inputs)[0], rtol=1e-4, atol=1e-5)
  # The state matters: without the first round the last reads otherwise.
  without = scan(inputs.at[:, 0].set(0.0))[0]
  assert not np.allclose(without[:, 2], outputs[:, 2], atol=1e-3)


def test_slot_cell_equations_in_numpy():
  cell = CELLS["ssm"]
  slots, update = random(0, 1, 1, D), random(1, 1, 1, D)
  state = random(2, 1, 1, 2, 4, 6)
  params = init(cell, slots, update, state)
  new, new_state, gate = jax.jit(cell.apply)(params, slots, update, state)
  p = jax.tree.map(lambda x: np.asarray(x, np.float64), params["params"])
  s, u, h = (np.asarray(x, np.float64) for x in (slots, update, state))
  s, u, h = s[0, 0], u[0, 0], h[0, 0]

  def norm(x, layer):
    x = (x - x.mean()) / np.sqrt(x.var() + 1e-6)
    return x * layer["scale"] + layer["bias"]

  def dense(x, layer):
    return x @ layer["kernel"] + layer.get("bias", 0.0)

  def softplus(x):
    return np.log1p(np.exp(x))

  def sigmoid(x):
    return 1 / (1 + np.exp(-x))

  both = np.concatenate([norm(u, p["update_norm"]), norm(s, p["slot_norm"])])
  mixed = dense(both, p["mix"])
  z, x, b, c, dt = np.split(
    dense(mixed, p["ssm"]["in_proj"]), np.cumsum([8, 8, 6, 6])
  )
  dt, rate = softplus(dt + p["ssm"]["dt_bias"]), -np.exp(p["ssm"]["a_log"])
  x = x.reshape(2, 4)
  gain = np.expm1(dt * rate) / rate
  h = np.exp(dt * rate)[:, None, None] * h
  h += gain[:, None, None] * x[:, :, None] * b
  y = (h @ c + p["ssm"]["skip"][:, None] * x).reshape(-1) * z * sigmoid(z)
  y = y / np.sqrt(np.mean(y**2) + 1e-6) * p["out_norm"]["scale"]
  s = s + dense(y, p["out_proj"])
  hidden = norm(s, p["mlp"]["LayerNorm_0"])
  hidden = np.maximum(dense(hidden, p["mlp"]["Dense_0"]), 0)
  s = s + dense(hidden, p["mlp"]["Dense_1"])
  np.testing.assert_allclose(new[0, 0], s, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(new_state[0, 0], h, rtol=1e-4, atol=1e-5)
  expected = sigmoid(dense(mixed, p["gate"]))
  np.testing.assert_allclose(gate[0, 0], expected, rtol=1e-4)


@pytest.mark.parametrize("name", CELLS)
def test_cells_share_one_signature(name):
  cell = slot_update.CELLS[name](gate_dim=E)
  slots, update = random(0, B, K, D), random(1, B, K, D)
  state = cell.initial_state(slots)
  params = init(cell, slots, update, state)
  new, next_state, gate = jax.jit(cell.apply)(params, slots, update, state)
  assert new.shape == slots.shape and next_state.shape == state.shape
  assert gate.shape == (B, K, E) and gate.dtype == jnp.float32
  assert bool(((gate > 0) & (gate <= 1)).all())
  if name == "gru":
    assert bool((gate == 1).all())


@pytest.mark.parametrize("name", CELLS)
def test_slots_permute(name):
  cell, order = CELLS[name], jnp.array([2, 0, 3, 1])
  slots, update = random(0, B, K, D), random(1, B, K, D)
  state = cell.initial_state(slots)
  state = state + random(2, *state.shape)
  params = init(cell, slots, update, state)
  apply = jax.jit(cell.apply)
  plain = apply(params, slots, update, state)
  moved = apply(params, slots[:, order], update[:, order], state[:, order])
  for a, b in zip(plain, moved, strict=True):
    np.testing.assert_allclose(a[:, order], b, rtol=1e-5, atol=1e-6)


def test_slots_move_within_three_rounds():
  # Pitfall: with language-model steps (dt 1e-3 to 0.1) the state, and with
  # it the slots, would hardly change in so few rounds.
  def written(rate_range, dt_range):
    module = ssm.SelectiveSSM(
      num_heads=64, rate_range=rate_range, dt_range=dt_range
    )
    p = jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, 1, D)))["params"]
    return 1 - jnp.exp(-jax.nn.softplus(p["dt_bias"]) * jnp.exp(p["a_log"]))

  cell = written((1.0, 4.0), (0.2, 1.0))
  assert 0.18 <= cell.min() and cell.max() <= 0.983
  language = written((1.0, 1.0), (1e-3, 0.1))
  assert language.max() <= 0.0952


@pytest.mark.parametrize("name", CELLS)
def test_cell_gradients_reach_every_parameter(name):
  cell, slots = CELLS[name], random(0, B, K, D)
  updates = random(1, 2, B, K, D)
  params = init(cell, slots, updates[0], cell.initial_state(slots))

  def loss(params):
    s, state, gates = slots, cell.initial_state(slots), 0.0
    for update in updates:
      s, state, gate = cell.apply(params, s, update, state)
      gates += jnp.sum(gate)
    return jnp.sum(s**2) + gates

  for path, grad in jax.tree_util.tree_leaves_with_path(
    jax.jit(jax.grad(loss))(params)
  ):
    assert bool(jnp.isfinite(grad).all()), path
    assert float(jnp.abs(grad).max()) > 0, path


def test_constant_and_equal_slots_stay_finite():
  cell, slots = CELLS["ssm"], jnp.zeros((B, K, D))
  state = cell.initial_state(slots)
  params = init(cell, slots, slots, state)
  loss = jax.jit(
    jax.grad(lambda s: jnp.sum(cell.apply(params, s, s, state)[0] ** 2))
  )
  assert bool(jnp.isfinite(loss(slots)).all())


def test_bf16_keeps_a_float32_state_and_gate():
  cell = slot_update.SlotSSMCell(**SMALL, gate_dim=E, dtype=jnp.bfloat16)
  slots = random(1, B, K, D).astype(jnp.bfloat16)
  state = cell.initial_state(slots)
  params = init(cell, slots, slots, state)
  new, state, gate = jax.jit(cell.apply)(params, slots, slots, state)
  assert new.dtype == jnp.bfloat16
  assert state.dtype == gate.dtype == jnp.float32
