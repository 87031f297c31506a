"""Leading eigenpairs of token graphs: outside oracles, counts, early stops."""

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


def prescribed(values, seed):
  """Symmetric matrix with the given eigenvalues and a random basis."""
  random = np.random.default_rng(seed)
  basis = np.linalg.qr(random.standard_normal((len(values),) * 2))[0]
  return (basis * values) @ basis.T, basis


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


def test_a_stray_pair_takes_no_place_among_the_leading_pairs():
  weight, _ = separable()
  faint = np.ones(64)
  faint[[5, 6, 9]] = 1e-5, 1e-5, 0.0  # a stray pair, and a lone token
  weight = weight * jnp.asarray(np.outer(faint, faint), jnp.float32)
  store = graph.DenseGraph(weight.at[5, 6].set(1e-3).at[6, 5].set(1e-3))

  @jax.jit
  def values(uniform):
    matvec, lead = spectral.normalised_operator(store, uniform=uniform)
    return spectral.leading_eigenpairs(matvec, lead, count=7, rounds=6).value

  found, bare = np.asarray(values(0.03)), np.asarray(values(1e-7))
  assert np.isfinite(found).all() and (found > 0.5).sum() == 4
  assert (bare > 0.5).sum() == 5


@pytest.mark.parametrize("grid", [(16, 16), (8, 20), (3, 3), (1, 1)])
def test_fused_graphs_start_from_their_coarsest_scale(grid):
  """Few or no rounds, yet eigh's values; and what a random start lacks."""
  features = jax.random.normal(jax.random.key(0), (*grid, 6))
  size = grid[0] * grid[1]
  count = min(6, size)

  @jax.jit
  def solve(features):
    store = landmarks.fused_graph(features, scales=(4, 8))
    pairs = spectral.graph_eigenpairs(
      store, count=count, rounds=12, tolerance=1e-4
    )
    return store.matvec(jnp.eye(size)), pairs.value

  whole, value = solve(features)
  want = np.linalg.eigvalsh(normalised(whole))[::-1][:count]
  np.testing.assert_allclose(value, want, atol=1e-4)


def test_the_tolerance_stops_the_rounds():
  matvec, lead = spectral.normalised_operator(graph.DenseGraph(separable()[0]))
  worst = {}
  for tolerance in (0.5, 1e-3):
    pairs = jax.jit(
      lambda t: spectral.leading_eigenpairs(
        matvec, lead, count=5, rounds=20, degree=2, tolerance=t
      )
    )(tolerance)
    worst[tolerance] = float(spectral.residuals(matvec, pairs)[:4].max())
  assert worst[1e-3] <= 1.1e-3 < worst[0.5] <= 0.51
