"""One step: accumulation, refusal of bad updates, sharding, rng streams."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from spectraldiffusion_jax import sharding, train_step
from spectraldiffusion_jax.train_state import (
  TrainState,
  no_history,
  stream_keys,
)

ROWS, WIDTH = 16, 4


def loss_fn(params, batch, rngs):
  del rngs
  error = batch["x"] @ params["w"] - batch["y"]
  loss = jnp.mean(error**2)
  return loss, {"fit_loss": loss}


def make(accumulation=1, loss=loss_fn, **options):
  schedule = optax.constant_schedule(0.1)
  tx = optax.adam(schedule)
  params = {"w": jnp.ones(WIDTH)}
  state = TrainState(
    jnp.zeros((), jnp.int32), params, tx.init(params), no_history()
  )
  step = train_step.make_train_step(
    loss,
    tx,
    schedule=schedule,
    seed=0,
    accumulation=accumulation,
    **options,
  )
  return state, step


def batch(seed=0):
  random = np.random.default_rng(seed)
  x = random.normal(size=(ROWS, WIDTH)).astype(np.float32)
  return {"x": x, "y": x.sum(1) * 2}


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulated_steps_equal_whole_ones(parts):
  whole, step = make()
  split, step_split = make(parts)
  for seed in range(3):
    whole, a = jax.jit(step)(whole, batch(seed))
    split, b = jax.jit(step_split)(split, batch(seed))
  np.testing.assert_allclose(whole.params["w"], split.params["w"], rtol=1e-5)
  np.testing.assert_allclose(a["loss"], b["loss"], rtol=1e-5)
  np.testing.assert_allclose(a["fit_loss"], b["fit_loss"], rtol=1e-5)


def test_a_bad_step_changes_nothing_but_the_count():
  state, step = make()
  step = jax.jit(step)
  state, _ = step(state, batch())
  bad = batch(1)
  bad["x"][3, 1] = np.nan
  after, metrics = step(state, bad)
  assert float(metrics["finite"]) == 0 and int(after.step) == 2
  jax.tree.map(
    np.testing.assert_array_equal,
    (after.params, after.opt_state),
    (state.params, state.opt_state),
  )
  recovered, metrics = step(after, batch(2))
  assert float(metrics["finite"]) == 1
  assert not np.array_equal(recovered.params["w"], after.params["w"])


def test_eight_devices_take_the_step_of_one():
  state, step = make()
  one, _ = jax.jit(step)(state, batch())
  mesh = sharding.make_mesh(data=4, fsdp=2)
  at = sharding.batch_sharding(mesh)
  many = jax.jit(step, in_shardings=(sharding.replicated(mesh), at))
  many, _ = many(state, sharding.shard_batch(batch(), mesh))
  np.testing.assert_allclose(one.params["w"], many.params["w"], rtol=1e-6)


def test_streams_differ_by_name_step_and_seed():
  data = [
    jax.random.key_data(key).tolist()
    for seed, step in ((0, 0), (0, 1), (1, 0))
    for key in stream_keys(seed, step).values()
  ]
  assert len({str(d) for d in data}) == len(data)
