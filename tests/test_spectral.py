"""The eigen-solver: theorem T1 on prescribed spectra, and outside oracles.

T1: for M symmetric with |m_1| >= ... >= |m_N|, k <= p, |m_k| > |m_{p+1}| and
Q_t = qr(M Q_{t-1}), sin(u_i, span Q_t) <= tan theta_0 |m_{p+1}/m_i|^t.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
import scipy.sparse.linalg

from spectraldiffusion_jax.ops import (
  affinity,
  clustering,
  graph,
  landmarks,
  spectral,
)

SIZE, WANTED, BLOCK = 24, 3, 5


def prescribed(values, seed):
  """Symmetric matrix with the given eigenvalues and a random basis."""
  random = np.random.default_rng(seed)
  basis = np.linalg.qr(random.standard_normal((len(values),) * 2))[0]
  return (basis * values) @ basis.T, basis


def sine(vector, block):
  """Sine of the angle between a unit vector and the span of a block."""
  return np.linalg.norm(vector - block @ (block.T @ vector))


def tangent(leading, block):
  """tan of the largest angle between span(leading) and the block."""
  other = scipy.linalg.null_space(leading.T)
  ratio = other.T @ block @ np.linalg.inv(leading.T @ block)
  return np.linalg.norm(ratio, 2)


def psd_spectrum(seed):
  """Falling eigenvalues in [0, 1], the first of them 1."""
  value = np.sort(np.random.default_rng(seed).uniform(0, 1, SIZE))[::-1]
  return value / value[0]


def trials(count):
  """Random operators, bases, spectra and start blocks, in float64."""
  value = np.stack([psd_spectrum(seed) for seed in range(count)])
  pairs = [prescribed(value[seed], seed) for seed in range(count)]
  start = np.random.default_rng(7).standard_normal((count, SIZE, BLOCK))
  return np.stack([p[0] for p in pairs]), [p[1] for p in pairs], value, start


def test_power_iteration_obeys_the_bound_in_200_trials():
  with jax.enable_x64(True):
    operator, basis, value, start = trials(200)
    step = jax.jit(
      jax.vmap(lambda m, q: spectral.block_power(lambda x: m @ x, q, steps=1))
    )
    block = np.asarray(jax.jit(jax.vmap(spectral.orthonormalise))(start))
    slope = [
      tangent(u[:, :BLOCK], q) for u, q in zip(basis, block, strict=True)
    ]
    violations = loose = 0
    for t in range(1, 21):
      block = np.asarray(step(operator, block))
      for u, m, q, start_tan in zip(basis, value, block, slope, strict=True):
        for i in range(WANTED):
          error = sine(u[:, i], q)
          bound = start_tan * (m[BLOCK] / m[i]) ** t
          violations += error > 1.01 * bound + 1e-6
          # Negative control: twice the rate is not a bound.
          loose += error > 1.01 * bound * (m[BLOCK] / m[i]) ** t + 1e-6
    assert violations == 0
    assert loose > 100


def test_tail_slope_is_the_ratio_of_eigenvalues():
  value = np.array([1.0, 0.9, 0.8, 0.7, 0.65, 0.5] + [0.3] * 18)
  with jax.enable_x64(True):
    operator, basis = prescribed(value, 0)
    start = np.random.default_rng(1).standard_normal((SIZE, BLOCK))
    error = [
      sine(
        basis[:, 2],
        np.asarray(
          spectral.block_power(
            lambda x: operator @ x, jnp.asarray(start), steps=steps
          )
        ),
      )
      for steps in (15, 30)
    ]
  slope = np.log(error[1] / error[0]) / 15
  assert abs(slope / np.log(0.5 / 0.8) - 1) < 0.05


def test_shift_changes_the_rate_and_rescues_the_limit():
  # -0.95 beats 0.9 in size: without a shift the block converges elsewhere.
  value = np.array([1.0, 0.9, 0.6, 0.3, 0.1, 0.0] + [-0.2] * 16 + [-0.9, -0.95])
  with jax.enable_x64(True):
    operator, basis = prescribed(value, 3)
    start = jnp.asarray(np.random.default_rng(2).standard_normal((SIZE, 2)))
    find = lambda shift, steps: np.asarray(
      spectral.block_power(
        lambda x: operator @ x, start, steps=steps, shift=shift
      )
    )
    lazy, plain = find(1.0, 60), find(0.0, 200)
    assert sine(basis[:, 1], lazy) < 1e-3
    assert sine(basis[:, 1], plain) > 0.1
    ratio = [sine(basis[:, 1], find(1.0, t)) for t in (40, 60)]
    slope = np.log(ratio[1] / ratio[0]) / 20
    # (1 + 0.6)/(1 + 0.9) instead of 0.6/0.9: the shift halves the gap.
    assert abs(slope / np.log(1.6 / 1.9) - 1) < 0.05


@pytest.mark.parametrize("degree", [2, 5, 12])
def test_chebyshev_obeys_its_bound_and_beats_power_steps(degree):
  solve = jax.jit(
    lambda operator, start, low, high: spectral.orthonormalise(
      spectral.chebyshev_filter(
        lambda x: operator @ x, start, degree=degree, low=low, high=high
      )
    )
  )
  for operator, basis, value, start in zip(*trials(20), strict=True):
    low, high = value[-1], value[BLOCK]
    start = np.linalg.qr(start)[0]
    with jax.enable_x64(True):
      block = solve(operator, start, low, high)
    spread = tangent(basis[:, :BLOCK], start)
    for i in range(WANTED):
      x = (value[i] - (low + high) / 2) / ((high - low) / 2)
      bound = spread / np.cosh(degree * np.arccosh(x))
      assert sine(basis[:, i], np.asarray(block)) <= 1.01 * bound + 1e-6


def test_chebyshev_filter_is_the_polynomial():
  value = np.linspace(-1, 1, SIZE)
  with jax.enable_x64(True):
    got = spectral.chebyshev_filter(
      lambda x: jnp.asarray(value)[:, None] * x,
      jnp.ones((SIZE, 1)),
      degree=7,
      low=-0.5,
      high=0.7,
    )
  want = np.polynomial.chebyshev.Chebyshev.basis(7)((value - 0.1) / 0.6)
  np.testing.assert_allclose(got[:, 0], want, rtol=1e-9, atol=1e-9)


def test_ritz_values_obey_their_bound():

  @jax.jit
  def solve(operator, start):
    block = spectral.block_power(lambda x: operator @ x, start, steps=3)
    pairs = spectral.rayleigh_ritz(lambda x: operator @ x, block)
    return block, pairs, spectral.residuals(lambda x: operator @ x, pairs)

  for operator, basis, value, start in zip(*trials(30), strict=True):
    with jax.enable_x64(True):
      block, pairs, rest = solve(operator, start)
    angle = np.arctan(tangent(basis[:, :BLOCK], np.asarray(block)))
    bound = (value[0] - value[-1]) * np.sin(angle) ** 2
    error = value[:BLOCK] - np.asarray(pairs.value)
    assert (error >= -1e-12).all() and (error <= 1.01 * bound + 1e-9).all()
    # Each residual bounds the distance to some true eigenvalue.
    near = np.abs(value[:, None] - np.asarray(pairs.value)).min(0)
    assert (near <= np.asarray(rest) + 1e-12).all()


def separable(blocks=4, per=16, seed=0):
  """Random dense weights, strong inside blocks and weak between."""
  random = np.random.default_rng(seed)
  label = np.repeat(np.arange(blocks), per)
  weight = random.uniform(0.5, 1.0, (blocks * per,) * 2)
  weight = weight * np.where(label[:, None] == label, 1.0, 0.02)
  weight = (weight + weight.T) / 2
  np.fill_diagonal(weight, 0)
  return jnp.asarray(weight, jnp.float32), label


def normalised(weight, uniform=0.03):
  """The dense operator in float64, faint edges included."""
  weight = np.asarray(weight, np.float64) + uniform / len(weight)
  scale = weight.sum(1) ** -0.5
  return weight * scale[:, None] * scale


GRAPHS = {
  "dense": lambda: graph.DenseGraph(separable()[0]),
  "stencil": lambda: affinity.stencil_graph(
    jax.random.normal(jax.random.key(0), (8, 8, 3)), sigma=1.5
  ),
  "knn": lambda: affinity.knn_graph(
    jax.random.normal(jax.random.key(1), (8, 8, 6)), k=8
  ),
  "fused": lambda: landmarks.fused_graph(
    jax.random.normal(jax.random.key(2), (8, 8, 6)), scales=(2, 4, 8)
  ),
}


@pytest.mark.parametrize("name", GRAPHS)
def test_leading_pairs_equal_eigh_and_arpack(name):
  @jax.jit
  def solve():
    store = GRAPHS[name]()
    matvec, lead = spectral.normalised_operator(store)
    pairs = spectral.leading_eigenpairs(matvec, lead, count=5, rounds=14)
    return store.matvec(jnp.eye(64)), pairs, spectral.residuals(matvec, pairs)

  whole, pairs, rest = solve()
  whole = normalised(whole)
  value, vector = np.linalg.eigh(whole)
  np.testing.assert_allclose(pairs.value, value[::-1][:5], atol=2e-5)
  start = np.random.default_rng(0).standard_normal(64)
  arpack = scipy.sparse.linalg.eigsh(whole, k=5, which="LA", v0=start)[0]
  np.testing.assert_allclose(pairs.value, arpack[::-1], atol=2e-5)
  assert np.asarray(rest).max() < 2e-3
  top = vector[:, ::-1][:, :5]
  gap = np.linalg.norm(
    top - np.asarray(pairs.vector) @ (np.asarray(pairs.vector).T @ top), axis=0
  )
  clear = np.abs(np.diff(value[::-1][:6])).min() > 5e-3
  assert gap[:4].max() < 0.05 or not clear
  np.testing.assert_allclose(
    pairs.vector.T @ pairs.vector, np.eye(5), atol=1e-5
  )


def test_lead_is_exact_and_deflation_removes_it():
  matvec, lead = spectral.normalised_operator(graph.DenseGraph(separable()[0]))
  np.testing.assert_allclose(matvec(lead[:, None])[:, 0], lead, atol=1e-6)
  random = jax.random.normal(jax.random.key(0), (64, 3))
  left = spectral.deflate(random + 5 * lead[:, None], lead)
  np.testing.assert_allclose(lead @ left, 0.0, atol=1e-5)


def test_oversampling_is_what_makes_few_rounds_enough():
  value = np.array([1.0, 0.98, 0.97, 0.96, 0.955, 0.95, 0.6] + [0.1] * 57)
  operator, basis = prescribed(value, 0)
  operator = jnp.asarray(operator, jnp.float32)
  lead = jnp.asarray(basis[:, 0], jnp.float32)
  error = {}
  for extra in (0, 4):
    pairs = spectral.leading_eigenpairs(
      lambda x: operator @ x, lead, count=4, oversample=extra, rounds=1
    )
    error[extra] = 0.96 - float(pairs.value[3])
  assert error[4] < 0.2 * error[0]


def test_counts_find_blocks_and_components():
  weight, label = separable()
  joined = graph.DenseGraph(weight)
  apart = graph.DenseGraph(weight * (label[:, None] == label))
  find = jax.jit(
    lambda g: (
      spectral.leading_eigenpairs(
        *spectral.normalised_operator(g, uniform=1e-4), count=9, rounds=6
      ).value
    )
  )
  assert int(clustering.eigengap_count(find(joined))) == 4
  assert int(clustering.count_above(find(apart), threshold=0.999)) == 4
  assert int(clustering.count_above(find(joined), threshold=0.999)) == 2
  assert int(clustering.count_above(jnp.array([1.0]), threshold=0.9)) == 1
  falling = jnp.array([1.0, 0.2, 0.1, 0.0])
  assert int(clustering.eigengap_count(falling)) == 2  # never one cluster


def test_more_pairs_than_tokens_are_padded_with_zeros():
  weight = jnp.ones((3, 3)) - jnp.eye(3)
  matvec, lead = spectral.normalised_operator(graph.DenseGraph(weight))
  solve = jax.jit(lambda: spectral.leading_eigenpairs(matvec, lead, count=6))
  pairs = solve()
  assert pairs.vector.shape == (3, 6) and pairs.value.shape == (6,)
  np.testing.assert_array_equal(pairs.vector[:, 3:], 0)
  want = np.linalg.eigvalsh(normalised(weight))[::-1]
  np.testing.assert_allclose(pairs.value[:3], want, atol=1e-5)
