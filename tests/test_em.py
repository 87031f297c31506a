"""E-step, M-step and pooling against float64 loops; degenerate images."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mixtures import (
  ACTIVE,
  E,
  K,
  N,
  e_step,
  m_step,
  prior_variance,
  start,
  tokens,
)

from spectraldiffusion_jax.ops import em


def reference_e_step(keys, mixture, tau):
  """Responsibilities and log-likelihood by float64 loops over slots."""
  logits = np.stack(
    [
      np.log(w)
      - 0.5 * np.sum((keys - m) ** 2 / v + np.log(2 * np.pi * v), 1) / tau
      for m, v, w in zip(*mixture, strict=True)
    ]
  )
  top = logits.max(0)
  total = np.exp(logits - top).sum(0)
  return np.exp(logits - top) / total, np.mean(top + np.log(total))


@pytest.mark.parametrize("tau", [1.0, 2.0])
@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_e_step_matches_float64_loop(tau, offset):
  # Keys far from 0 are where the expanded square loses its digits.
  keys, mixture = np.float32(tokens() + offset), start()
  mixture = mixture._replace(mean=np.float32(mixture.mean + offset))
  expected, likelihood = reference_e_step(np.float64(keys), mixture, tau)
  attention, value = e_step(
    jnp.asarray(keys), *map(jnp.float32, mixture), ACTIVE, tau=tau
  )
  # A float32 near 1000 carries 6e-5, which the mean of keys inherits.
  tolerance = 2e-3 if offset else 1e-5
  np.testing.assert_allclose(attention, expected, atol=tolerance)
  np.testing.assert_allclose(value, likelihood, rtol=tolerance)
  np.testing.assert_allclose(jnp.sum(attention, 0), 1.0, rtol=1e-5)


def test_m_step_matches_float64_loop():
  keys, mixture = tokens(), start()
  attention = np.random.default_rng(1).dirichlet(np.ones(K), size=N).T
  gate = np.random.default_rng(2).uniform(size=(K, E))
  nu, alpha, floor = 3.0, 1.5, 1.0
  prior = keys.var(0)
  with jax.enable_x64(True):
    got = m_step(
      jnp.asarray(keys),
      jnp.asarray(attention),
      jnp.asarray(mixture.mean),
      ACTIVE,
      prior=jnp.asarray(prior),
      gate=jnp.asarray(gate),
      nu=nu,
      alpha=alpha,
      floor=floor,
    )
  clipped = 0
  for k in range(K):
    count = attention[k].sum()
    target = attention[k] @ keys / count
    mean = mixture.mean[k] + gate[k] * (target - mixture.mean[k])
    scatter = attention[k] @ (keys - mean) ** 2
    variance = (scatter + nu * prior) / (count + nu)
    clipped += np.sum(variance < floor * prior)
    np.testing.assert_allclose(got.mean[k], mean, rtol=1e-7, atol=1e-8)
    np.testing.assert_allclose(
      got.variance[k], np.maximum(variance, floor * prior), rtol=1e-7
    )
    weight = (count + alpha - 1) / (N + K * (alpha - 1))
    np.testing.assert_allclose(got.weight[k], weight, rtol=1e-12)
  assert 0 < clipped < K * E


def test_inactive_slots_take_nothing():
  keys, mixture = jnp.float32(tokens()), start()
  ours = em.Mixture(*map(jnp.float32, mixture))
  active = jnp.array([True, False, True, False, True])
  attention, likelihood = e_step(keys, *ours, active, tau=2.0)
  assert bool((attention[~active] == 0).all())
  # As if the others did not exist.
  few = em.Mixture(*(x[active] for x in ours))
  expected, value = em.e_step(keys, *few, jnp.ones(3, bool), tau=2.0)
  np.testing.assert_allclose(attention[active], expected, atol=1e-6)
  np.testing.assert_allclose(likelihood, value, rtol=1e-6)
  new = m_step(
    keys, attention, ours.mean, active, prior=prior_variance(keys), alpha=2.0
  )
  np.testing.assert_array_equal(new.mean[~active], ours.mean[~active])
  assert bool((new.weight[~active] == 0).all())
  np.testing.assert_allclose(jnp.sum(new.weight), 1.0, rtol=1e-6)
  nobody, value = e_step(keys, *ours, jnp.zeros(K, bool), tau=2.0)
  assert float(nobody.sum()) == 0 and bool(jnp.isfinite(value))


def test_sparse_prior_removes_small_slots():
  attention = np.zeros((3, N))
  attention[0, :80] = attention[1, 80:-2] = attention[2, -2:] = 1.0
  keys = jnp.float32(tokens())
  new = m_step(
    keys,
    jnp.float32(attention),
    jnp.zeros((3, E)),
    jnp.ones(3, bool),
    prior=prior_variance(keys),
    alpha=-4.0,
  )
  np.testing.assert_allclose(new.weight, [75 / 108, 33 / 108, 0], rtol=1e-6)


def test_slots_permute():
  keys, mixture = jnp.float32(tokens()), start()
  ours = em.Mixture(*map(jnp.float32, mixture))
  order = jnp.array([3, 1, 4, 0, 2])
  moved = em.Mixture(*(x[order] for x in ours))
  a, _ = e_step(keys, *ours, ACTIVE, tau=2.0)
  b, _ = e_step(keys, *moved, ACTIVE, tau=2.0)
  np.testing.assert_allclose(b, a[order], atol=1e-6)


def test_initial_m_step_is_the_cluster_statistics():
  keys = tokens()
  label = np.random.default_rng(0).integers(3, size=N)
  attention = np.float32(np.arange(K)[:, None] == label)  # slots 3, 4 empty
  x = jnp.float32(keys)
  got = em.initial_m_step(
    jnp.asarray(attention),
    x,
    ACTIVE,
    prior=prior_variance(x),
    nu=0.0,
    floor=0.0,
  )
  for k in range(3):
    mine = keys[label == k]
    np.testing.assert_allclose(got.mean[k], mine.mean(0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(got.variance[k], mine.var(0), rtol=1e-4)
    np.testing.assert_allclose(got.weight[k], len(mine) / N, rtol=1e-6)
    np.testing.assert_allclose(
      em.pool(jnp.asarray(attention), x)[k], mine.mean(0), rtol=1e-4, atol=1e-5
    )
  np.testing.assert_allclose(
    got.mean[3:], keys.mean(0)[None].repeat(2, 0), 1e-4
  )
  np.testing.assert_allclose(got.variance[3:], keys.var(0)[None].repeat(2, 0))
  assert float(got.weight[3:].sum()) == 0


HARD = {
  "constant image": np.ones((10, E)),
  "one token": np.ones((1, E)),
  "two distinct tokens": np.repeat(np.eye(2, E), 5, axis=0),
  "far apart": np.repeat(1e3 * np.eye(2, E), 5, axis=0),
}


@jax.jit
@functools.partial(jax.value_and_grad, has_aux=True)
def whole_refinement(keys, active):
  prior = em.prior_variance(keys)
  # Everything in slot 0, as one spectral cluster would have it.
  attention = jnp.zeros((len(active), len(keys))).at[0].set(1.0)
  mixture = em.initial_m_step(attention, keys, active, prior=prior)
  for _ in range(2):
    attention, likelihood = em.e_step(keys, *mixture, active)
    mixture = em.m_step(keys, attention, mixture.mean, active, prior=prior)
  return likelihood + jnp.sum(em.pool(attention, keys)), attention


@pytest.mark.parametrize("name", HARD)
@pytest.mark.parametrize("slots", [1, 11])
def test_degenerate_images_stay_finite(name, slots):
  active = jnp.arange(slots) < max(1, slots - 2)
  (loss, attention), grad = whole_refinement(jnp.float32(HARD[name]), active)
  assert bool(jnp.isfinite(loss)) and bool(jnp.isfinite(grad).all())
  np.testing.assert_allclose(jnp.sum(attention, 0), 1.0, rtol=1e-5)


def test_gradient_matches_finite_differences():
  keys, mixture = tokens(shape=(20, E)), start()

  def value(keys, mean, tau):
    prior, rest = 1.5 * jnp.ones(E), map(jnp.asarray, mixture[1:])
    attention, _ = em.e_step(keys, mean, *rest, ACTIVE, tau=tau)
    new = em.m_step(keys, attention, mean, ACTIVE, prior=prior, gate=0.7)
    attention, likelihood = em.e_step(keys, *new, ACTIVE, tau=tau)
    return likelihood + jnp.sum(em.pool(attention, keys) ** 2)

  with jax.enable_x64(True):
    point = [jnp.asarray(keys), jnp.asarray(mixture.mean), jnp.asarray(2.0)]
    grads = jax.jit(jax.grad(value, argnums=(0, 1, 2)))(*point)
    function = jax.jit(value)
    for i, grad in enumerate(grads):
      step = np.random.default_rng(i).normal(size=grad.shape) * 1e-6
      up, down = list(point), list(point)
      up[i], down[i] = point[i] + step, point[i] - step
      expected = (function(*up) - function(*down)) / 2
      np.testing.assert_allclose(jnp.sum(grad * step), expected, rtol=1e-5)


def test_batches_by_vmap_and_raises_bf16():
  keys = jnp.stack([jnp.bfloat16(tokens(s)) for s in range(3)])
  ours = em.Mixture(*map(jnp.float32, start()))
  attention, _ = jax.jit(jax.vmap(lambda x: em.e_step(x, *ours, ACTIVE)))(keys)
  assert attention.dtype == jnp.float32 and attention.shape == (3, K, N)
  alone, _ = e_step(keys[1].astype(jnp.float32), *ours, ACTIVE)
  np.testing.assert_allclose(attention[1], alone, atol=1e-6)


def test_large_key_width_needs_the_temperature():
  # Why tau is there: at tau = 1 wide keys are one-hot in the first round.
  keys = jnp.float32(tokens(shape=(N, 64)))
  mixture = em.Mixture(*map(jnp.float32, start(width=64)))
  sharp, soft = (
    float(jnp.mean(jnp.max(e_step(keys, *mixture, ACTIVE, tau=t)[0], 0)))
    for t in (1.0, 8.0)
  )
  assert sharp > 0.95 and soft < 0.85
