"""Starts from the coarsest scale, and stopping by residuals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_spectral import normalised, separable

from spectraldiffusion_jax.ops import graph, landmarks, spectral


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
