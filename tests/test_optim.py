"""Run length, schedule, decay mask and clipping."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from spectraldiffusion_jax import optim


def length(**changes):
  options = dict(
    num_examples=105,
    batch_size=10,
    num_epochs=4,
    num_steps=0,
    warmup_epochs=1.0,
    val_interval=2,
  )
  return optim.run_length(**(options | changes))


def test_epochs_become_steps():
  # 105 // 10 = 10 steps an epoch; warm-up is capped at a tenth of the run.
  assert length() == optim.Length(10, 40, 5, 20)
  assert length(num_steps=7).num_steps == 7
  assert length(warmup_epochs=0.2).warmup_steps == 2


def test_schedule_meets_its_corners():
  run = length(num_epochs=20, warmup_epochs=2)
  schedule = optim.make_schedule(learning_rate=3e-4, length=run)
  at = lambda step: float(schedule(step))
  assert at(0) == 0
  np.testing.assert_allclose(at(run.warmup_steps), 3e-4, rtol=1e-6)
  middle = (run.warmup_steps + run.num_steps) / 2
  np.testing.assert_allclose(at(middle), 1.5e-4, rtol=1e-4)
  np.testing.assert_allclose(at(run.num_steps), 0, atol=1e-10)


def test_without_warm_up_the_first_step_moves():
  run = length(warmup_epochs=0)
  schedule = optim.make_schedule(learning_rate=1e-3, length=run)
  assert float(schedule(0)) == pytest.approx(1e-3)


def test_decay_spares_offsets_norms_and_state_space_rates():
  params = {
    "dense": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)},
    "ssm": {"a_log": jnp.ones((4, 1)), "kernel": jnp.ones((2, 2))},
  }
  assert optim.decay_mask(params) == {
    "dense": {"kernel": True, "bias": False},
    "ssm": {"a_log": False, "kernel": True},
  }


def test_gradient_is_clipped_by_its_global_norm():
  # Adam is invariant to the scale of a constant gradient, so clipping shows
  # in the moments: |m| = (1 - b1) * clip for a gradient of any larger norm.
  params = {"w": jnp.zeros((3, 3))}
  tx = optim.make_optimizer(
    optax.constant_schedule(1e-3), weight_decay=0.0, grad_clip=1.0
  )
  grads = {"w": jnp.full((3, 3), 100.0)}
  _, state = tx.update(grads, tx.init(params), params)
  moments = [x for x in jax.tree.leaves(state) if x.shape == (3, 3)]
  np.testing.assert_allclose(optax.tree.norm(moments[0]), 0.1, rtol=1e-5)
