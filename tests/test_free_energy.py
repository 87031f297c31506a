"""Theorem 2: no round lowers the free energy, and what breaks that."""

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
from sklearn.mixture import GaussianMixture

from spectraldiffusion_jax.ops import em


@functools.partial(jax.jit, static_argnames=("alpha", "rounds"))
def refine(keys, mixture, gates, untie, *, tau, nu, alpha, rounds=8):
  """F after every round; `untie` maps means before they meet the keys."""
  prior = em.prior_variance(keys)
  active = jnp.ones(mixture.weight.shape, bool)
  energies = []
  for t in range(rounds):
    query = mixture.mean @ untie
    attention, _ = em.e_step(keys, query, *mixture[1:], active, tau=tau)
    options = {"prior": prior, "nu": nu, "alpha": alpha}
    if t:
      energies.append(
        em.free_energy(keys, attention, mixture, active, tau=tau, **options)
      )
    mixture = em.m_step(
      keys, attention, mixture.mean, active, gate=gates[t], **options
    )
  return jnp.stack(energies)


def test_plain_em_equals_sklearn():
  keys, mixture = tokens(), start(3)
  model = GaussianMixture(
    K,
    covariance_type="diag",
    tol=0,
    max_iter=15,
    reg_covar=0,
    weights_init=mixture.weight,
    means_init=mixture.mean,
    precisions_init=1 / mixture.variance,
  )
  with pytest.warns(Warning, match="did not converge"):
    model.fit(keys)
  with jax.enable_x64(True):
    x, ours = jnp.asarray(keys), em.Mixture(*map(jnp.asarray, mixture))
    prior = prior_variance(x)
    for _ in range(15):
      attention, likelihood = e_step(x, *ours, ACTIVE, tau=1.0)
      ours = m_step(
        x, attention, ours.mean, ACTIVE, prior=prior, nu=0.0, floor=1e-9
      )
    np.testing.assert_allclose(likelihood, model.lower_bound_, rtol=1e-9)
    np.testing.assert_allclose(ours.mean, model.means_, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(ours.variance, model.covariances_, rtol=1e-5)
    np.testing.assert_allclose(ours.weight, model.weights_, rtol=1e-5)
    final, _ = e_step(x, *ours, ACTIVE, tau=1.0)
    np.testing.assert_allclose(final.T, model.predict_proba(keys), atol=1e-5)


def least_rise(energies):
  """Smallest change of F from round to round, relative to |F|."""
  energies = np.asarray(energies, np.float64)
  return np.min(np.diff(energies) / np.abs(energies[1:]))


@pytest.mark.parametrize("alpha", [1.0, 2.0])
def test_free_energy_never_falls(alpha):
  # Theorem 2, with more slots than clusters and any gates in [0, 2].
  for seed in range(12):
    rng = np.random.default_rng(seed)
    keys = tokens(seed, clusters=1 + seed % 4)
    gates = rng.uniform(0, 2 if seed % 2 else 1, size=(8, K, E))
    tau = (1.0, 2.0, E**0.5)[seed % 3]
    nu = (0.0, 10.0)[seed // 3 % 2]
    for x64, tolerance in ((True, 1e-9), (False, 1e-5)):
      with jax.enable_x64(x64):
        energies = refine(
          jnp.asarray(keys),
          em.Mixture(*map(jnp.asarray, start(seed))),
          jnp.asarray(gates),
          jnp.eye(E),
          tau=tau,
          nu=nu,
          alpha=alpha,
        )
        assert least_rise(energies) >= -tolerance, (seed, x64)


def fall(untie, gate):
  """Worst step of F over seeds, with given query map and gate."""
  worst = np.inf
  with jax.enable_x64(True):
    for seed in range(6):
      energies = refine(
        jnp.asarray(tokens(seed)),
        em.Mixture(*map(jnp.asarray, start(seed))),
        jnp.full((8, K, E), gate),
        jnp.asarray(untie),
        tau=2.0,
        nu=10.0,
        alpha=1.0,
      )
      worst = min(worst, least_rise(energies))
  return worst


def test_untied_queries_and_large_gates_break_it():
  # Negative controls: the assumptions of theorem 2 are needed.
  rotation = np.linalg.qr(np.random.default_rng(0).normal(size=(E, E)))[0]
  assert fall(np.eye(E), 1.0) > -1e-9
  assert fall(rotation, 1.0) < -5e-4
  assert fall(np.eye(E), 2.6) < -1e-3


def test_free_energy_value():
  # At the responsibilities of the E-step and tau = 1, nu = 0, alpha = 1 the
  # free energy is the log-likelihood.
  keys, mixture = tokens(), start()
  with jax.enable_x64(True):
    x, ours = jnp.asarray(keys), em.Mixture(*map(jnp.asarray, mixture))
    attention, likelihood = e_step(x, *ours, ACTIVE, tau=1.0)
    value = em.free_energy(
      x, attention, ours, ACTIVE, prior=prior_variance(x), tau=1.0, nu=0.0
    )
    np.testing.assert_allclose(value, N * likelihood, rtol=1e-7)
    # A: no other responsibilities do better.
    flat = jnp.full((K, N), 1 / K)
    other = em.free_energy(
      x, flat, ours, ACTIVE, prior=prior_variance(x), tau=1.0, nu=0.0
    )
    assert other < value
