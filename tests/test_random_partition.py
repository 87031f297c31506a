"""Random starts: a partition, the nearest drawn token, and no counting."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.metrics import pairwise_distances_argmin

from spectraldiffusion_jax.ops.random_partition import random_partition

GRID = (6, 7)
N = GRID[0] * GRID[1]


def features(channels, seed=0):
  random = np.random.default_rng(seed)
  return random.uniform(size=(*GRID, channels)).astype(np.float32)


def run(x, **options):
  return jax.device_get(random_partition(jnp.asarray(x), **options))


def test_every_token_goes_to_the_nearest_drawn_one():
  x = features(2)
  part = run(x, num_slots=5, field=False)
  tokens = x.reshape(N, 2)
  draw = np.random.RandomState(0).random_sample(N).astype(np.float32)
  seeds = tokens[np.argsort(-draw)[:5]]
  expected = pairwise_distances_argmin(tokens, seeds)
  np.testing.assert_array_equal(part.assignment.argmax(1), expected)
  assert part.active.all() and part.count == 5
  other = run(x, num_slots=5, field=False, seed=1)
  assert (other.assignment != part.assignment).any()


def test_the_background_keeps_what_is_not_foreground():
  x = features(3)
  x[:3, :, 0], x[3:, :, 0] = 0.1, 0.8
  part = run(x, num_slots=5, field=True)
  np.testing.assert_allclose(part.assignment.sum(1), 1, atol=1e-6)
  np.testing.assert_allclose(
    part.assignment[:, 0], np.where(np.arange(N) < N // 2, 1.0, 0.2), atol=1e-6
  )
  # Seeds lie in the foreground: each holds at least itself.
  assert (part.assignment[N // 2 :, 1:].max(0) > 0.7).all()


@pytest.mark.parametrize("slots", [1, N + 5])
@pytest.mark.parametrize("field", [True, False])
def test_any_number_of_slots_and_bad_features_give_a_partition(slots, field):
  x = features(3)
  x[0, 0] = np.nan
  for case in (x, np.zeros_like(x)):
    part = run(case, num_slots=slots, field=field)
    assert part.assignment.shape == (N, slots)
    assert np.isfinite(part.assignment).all()
    assert part.count == part.active.sum() >= 1
