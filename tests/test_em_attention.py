"""Slots dropped at inference for their small mixing weight."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spectraldiffusion_jax.models import em_attention
from spectraldiffusion_jax.types import Mixtures, Slots

WEIGHT = np.array([[0.5, 0.25, 0.2, 0.04, 0.01], [0.0, 0.0, 0.0, 1.0, 0.0]])
K, N = 5, 12


def dropped(threshold, background):
  raw = np.random.default_rng(0).uniform(size=(2, K, N))
  active = np.array([[True] * K, [True, False, False, True, False]])
  raw = raw * active[:, :, None]
  slots = Slots(
    slots=jnp.zeros((2, K, 3)),
    attention=jnp.asarray(raw / raw.sum(1, keepdims=True), jnp.float32),
    active=jnp.asarray(active),
  )
  mixture = Mixtures(
    mean=jnp.zeros((2, K, 2)),
    variance=jnp.ones((2, K, 2)),
    weight=jnp.asarray(WEIGHT, jnp.float32),
  )
  run = jax.jit(
    lambda s, m: em_attention.without_light_slots(
      s, m, threshold=threshold, background=background
    )
  )
  return slots, run(slots, mixture)


@pytest.mark.parametrize(
  ("threshold", "background", "kept"),
  [
    (0.1, False, [0, 1, 2, 3]),  # 0.02 of all
    (1.1, False, [0, 1]),  # 0.22 of all
    (0.3, True, [0, 1, 2, 3]),  # 0.06 of the 0.5 that objects have
    (0.6, True, [0, 1, 2]),  # 0.12 of them
    (9.0, True, [0, 1]),  # the heaviest object stays
  ],
)
def test_light_slots_go_and_the_rest_share_what_they_held(
  threshold, background, kept
):
  before, after = dropped(threshold, background)
  assert np.flatnonzero(after.active[0]).tolist() == kept
  np.testing.assert_allclose(after.attention.sum(1), 1.0, atol=1e-5)
  gone = np.setdiff1d(np.arange(K), kept)
  np.testing.assert_array_equal(after.attention[0, gone], 0.0)
  was = np.asarray(before.attention[0, kept])
  np.testing.assert_allclose(
    after.attention[0, kept], was / was.sum(0), rtol=1e-4
  )


def test_what_was_inactive_stays_so_and_one_slot_is_always_left():
  _, after = dropped(9.0, False)
  assert np.flatnonzero(after.active[1]).tolist() == [3]
  np.testing.assert_allclose(after.attention[1, 3], 1.0, atol=1e-6)
