"""Token graphs against scikit-learn, loops in float64 and their own laws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.neighbors import kneighbors_graph

from spectraldiffusion_jax.errors import UserError
from spectraldiffusion_jax.ops import affinity, landmarks
from spectraldiffusion_jax.ops import graph as graphs

RANDOM = np.random.default_rng(0)


def field(*shape, seed=0):
  return jnp.asarray(
    np.random.default_rng(seed).standard_normal(shape), jnp.float32
  )


@pytest.mark.parametrize("k", [1, 3, 7])
def test_top_k_equals_a_sort(k):
  values = RANDOM.standard_normal((20, 7)).astype(np.float32)
  value, column = jax.jit(lambda v: graphs.top_k(v, k=k))(values)
  want = np.argsort(-values, axis=1)[:, :k]
  np.testing.assert_array_equal(column, want)
  np.testing.assert_array_equal(value, np.take_along_axis(values, want, 1))


def test_squared_distance_survives_a_large_common_offset():
  x = RANDOM.standard_normal((30, 4))
  want = ((x[:, None] - x[None]) ** 2).sum(-1)
  got = graphs.squared_distance(jnp.asarray(x + 100.0, jnp.float32))
  np.testing.assert_allclose(got, want, atol=2e-3)


def test_knn_graph_equals_scikit_learn():
  features = field(6, 8, 12)
  tokens = np.asarray(features, np.float64).reshape(48, 12)
  tokens = tokens - tokens.mean(0)
  near = kneighbors_graph(tokens, 5, metric="cosine").toarray() > 0
  unit = tokens / np.linalg.norm(tokens, axis=1, keepdims=True)
  want = np.maximum(unit @ unit.T, 0) * (near | near.T)
  want += 1e-5 * (1 - np.eye(48))
  got = jax.jit(lambda f: affinity.knn_graph(f, k=5).weight)(features)
  np.testing.assert_allclose(got, want, atol=1e-5)


def test_knn_graph_without_centring_differs():
  features = field(4, 5, 6) + 3.0
  with_mean = affinity.knn_graph(features, k=3, centre=False).weight
  without = affinity.knn_graph(features, k=3).weight
  assert not np.allclose(with_mean, without, atol=0.1)


def test_colour_term_counts_both_neighbour_graphs():
  features, colour = field(5, 6, 4), field(5, 6, 3, seed=1)
  plain = jax.jit(lambda f: affinity.knn_graph(f, k=3).weight)(features)
  joint = jax.jit(
    lambda f, c: affinity.knn_graph(f, k=3, colour=c, colour_weight=2.0).weight
  )(features, colour)
  place = np.stack(
    np.meshgrid(*map(lambda n: np.linspace(0, 1, n), (5, 6)), indexing="ij"), -1
  ).reshape(30, 2)
  want = np.zeros((30, 30))
  for k, omega in ((20, 2.0), (10, 0.1)):
    both = np.concatenate([np.asarray(colour).reshape(30, 3), omega * place], 1)
    near = kneighbors_graph(both, k).toarray() > 0
    want += near | near.T
  np.testing.assert_allclose(joint - plain, 2.0 * want, atol=1e-5)


def test_knn_graph_refuses_more_tokens_than_it_can_hold():
  with pytest.raises(UserError, match="1056 tokens exceed 1024"):
    affinity.knn_graph(jnp.zeros((33, 32, 2)))


def stencil_by_loops(features, sigma, far):
  """The stencil graph, edge by edge in float64."""
  height, width, _ = features.shape
  tokens = np.asarray(features, np.float64).reshape(height * width, -1)
  weight = np.zeros((len(tokens),) * 2)
  for n in range(len(tokens)):
    for m in range(len(tokens)):
      rows = abs(n // width - m // width)
      columns = abs(n % width - m % width)
      square = ((tokens[n] - tokens[m]) ** 2).sum()
      if n != m and max(rows, columns) <= 2:
        weight[n, m] += np.exp(-square / sigma**2)
      if n != m:
        times = (far[n] == m).sum()
        weight[n, m] += times * 0.5 * np.exp(-4 * square / sigma**2)
  return weight


def test_stencil_graph_equals_loops_and_the_neighbour_store():
  features = field(5, 7, 3)
  far = affinity._far_partners(35, 10, 0)
  want = stencil_by_loops(features, 1.5, far)
  dense = jax.jit(affinity.stencil_graph)(features, sigma=1.5)
  np.testing.assert_allclose(dense.weight, want, atol=1e-5)
  sparse = jax.jit(lambda f: affinity.stencil_graph(f, sigma=1.5, max_dense=1))(
    features
  )
  assert isinstance(sparse, graphs.NeighbourGraph)
  x = field(35, 4, seed=2)
  np.testing.assert_allclose(sparse.matvec(x), dense.matvec(x), atol=1e-4)
  np.testing.assert_allclose(sparse.degree(), dense.degree(), atol=1e-4)


def test_far_edges_are_symmetric_fixed_and_reach_far():
  far = affinity._far_partners(1024, 10, 0)
  table = np.zeros((1024, 1024), int)
  np.add.at(table, (np.arange(1024)[:, None], far), 1)
  np.testing.assert_array_equal(table, table.T)
  # Golden values: the far edges are part of what a slot is.
  assert far[0, :4].tolist() == [927, 538, 353, 791]
  rows = np.abs(far // 32 - np.arange(1024)[:, None] // 32)
  assert rows.mean() > 8  # 32/3 expected of uniform partners, 1 of a stencil


@pytest.mark.parametrize(
  "build",
  [
    lambda f: affinity.stencil_graph(f, sigma=1.0),
    lambda f: affinity.knn_graph(f, k=4),
    lambda f: landmarks.fused_graph(f, scales=(2, 4)),
  ],
)
def test_every_store_is_symmetric_non_negative_with_its_degree(build):
  graph = jax.jit(build)(field(6, 9, 5))
  whole = np.asarray(graph.matvec(jnp.eye(54)))
  np.testing.assert_allclose(whole, whole.T, atol=1e-6)
  assert whole.min() >= 0
  np.testing.assert_allclose(graph.degree(), whole.sum(1), rtol=1e-5)


@pytest.mark.parametrize("grid", [(16, 16), (8, 20), (1, 1)])
@pytest.mark.parametrize("scales", [(8, 16, 32), (4,)])
def test_fused_graph_has_unit_degree_and_is_psd(grid, scales):
  build = jax.jit(lambda f: landmarks.fused_graph(f, scales=scales))
  graph = build(field(*grid, 6))
  np.testing.assert_allclose(graph.degree(), 1.0, atol=1e-5)
  whole = np.asarray(graph.matvec(jnp.eye(grid[0] * grid[1])), np.float64)
  value = np.linalg.eigvalsh((whole + whole.T) / 2)
  assert value[0] >= -1e-6 and abs(value[-1] - 1) < 1e-5


def test_cosine_graph_is_not_psd():
  # Negative control: why the kNN graph needs a shift and this one does not.
  weight = np.asarray(affinity.knn_graph(field(8, 8, 6), k=5).weight)
  assert np.linalg.eigvalsh(weight)[0] < -0.1


def factor_of(part):
  """The dense N x M factor of a scale."""
  return np.asarray(part.expand(jnp.eye(part.total.shape[0])), np.float64)


def test_landmark_factors_equal_a_loop_and_tokens_skip_themselves():
  features = field(4, 6, 5)
  graph = jax.jit(
    lambda f: landmarks.fused_graph(f, scales=(2, 4), nearest=3, knn_k=7)
  )(features)
  x = np.asarray(features, np.float64).reshape(24, 5)
  x -= x.mean(0)
  x /= np.linalg.norm(x, axis=1, keepdims=True)
  pooled = x.reshape(2, 2, 3, 2, 5).mean((1, 3)).reshape(6, 5)
  pooled /= np.linalg.norm(pooled, axis=1, keepdims=True)
  for part, anchors, k in zip(graph.parts, (pooled, x), (3, 7), strict=True):
    cosine = x @ anchors.T
    if anchors is x:
      np.fill_diagonal(cosine, -np.inf)
    share = np.zeros_like(cosine)
    for n, row in enumerate(cosine):
      best = np.argsort(-row)[:k]
      share[n, best] = np.exp((row[best] - 1) / 0.1)
    share /= share.sum(1, keepdims=True)
    mass = share.sum(0)
    want = share / np.sqrt(np.where(mass > 0, mass, 1)) / np.sqrt(2)
    np.testing.assert_allclose(factor_of(part), want, atol=1e-4)
    np.testing.assert_allclose(part.total, want.sum(0), atol=1e-4)


def test_compressed_tokens_keep_products_inside_the_span_of_the_pooled():
  # 40 directions, fewer than the 64 pooled tokens: nothing lies outside.
  random = np.random.default_rng(0)
  basis = random.standard_normal((40, 300))
  flat = random.standard_normal((256, 40)) @ basis + 5
  flat = jnp.asarray(flat, jnp.float32)
  short = jax.jit(landmarks.compressed)(flat.reshape(16, 16, 300), flat.mean(0))
  assert short.shape == (256, 64)
  tokens = graphs.unit_rows(flat - flat.mean(0, keepdims=True))
  np.testing.assert_allclose(short @ short.T, tokens @ tokens.T, atol=0.02)
  # Negative control: white noise in 300 dimensions does lie outside.
  noise = field(256, 300)
  short = landmarks.compressed(noise.reshape(16, 16, 300), jnp.zeros(300))
  noise = graphs.unit_rows(noise)
  assert float(jnp.abs(short @ short.T - noise @ noise.T).max()) > 0.2


def test_searching_among_the_parts_of_near_cells_finds_most_neighbours(
  monkeypatch,
):
  # Smooth features, as those of a network: near cells have near parts.
  place = np.stack(np.indices((16, 16)), -1).reshape(256, 2) / 16
  wave = np.random.default_rng(0).standard_normal((2, 12)) * 5
  features = jnp.asarray(np.sin(place @ wave).reshape(16, 16, 12), jnp.float32)

  def finest(beam):
    build = jax.jit(
      lambda f: landmarks.fused_graph(f, scales=(8, 16), knn_k=8, beam=beam)
    )
    return factor_of(build(features).parts[-1]) > 0

  monkeypatch.setattr(landmarks, "MAX_DIRECT", 64)
  exact, found, narrow = finest(None), finest(5), finest(2)
  assert (exact.sum(1) == 8).all() and not np.diag(found).any()
  assert (found & exact).sum() > 0.9 * exact.sum()
  assert (narrow & exact).sum() < (found & exact).sum()


def test_scale_grids_keep_aspect_and_drop_duplicates():
  grids = landmarks.scale_grids((64, 128), scales=(8, 16, 32))
  assert grids == [(8, 16), (16, 32), (32, 64)]
  assert landmarks.scale_grids((9, 9), scales=(8, 16, 32)) == [(8, 8), (9, 9)]


def biggest_array(function, *args):
  """Number of entries of the largest array any step of a function makes."""
  sizes = []

  def walk(jaxpr):
    for equation in jaxpr.eqns:
      sizes.extend(v.aval.size for v in equation.outvars)
      for value in jax.tree.leaves(
        equation.params,
        is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr"),
      ):
        inner = getattr(value, "jaxpr", value)
        if hasattr(inner, "eqns"):
          walk(inner)

  walk(jax.make_jaxpr(function)(*args).jaxpr)
  return max(sizes)


def test_8192_tokens_never_meet_all_pairs():
  shape = jax.ShapeDtypeStruct((64, 128, 16), jnp.float32)

  def products(build):
    def run(features):
      graph = build(features)
      return graph.matvec(jnp.ones((8192, 12))), graph.degree()

    return biggest_array(run, shape)

  stencil = products(lambda f: affinity.stencil_graph(f, sigma=1.0))
  fused = products(landmarks.fused_graph)
  assert stencil <= 8192 * 44 * 16 and fused <= 8192 * 1024
  # Negative control: the probe does see a full table.
  full = jax.ShapeDtypeStruct((8192, 3), jnp.float32)
  assert biggest_array(jax.jit(graphs.squared_distance), full) == 8192**2


def test_neighbour_step_is_a_quantile_of_steps_and_never_zero():
  ramp = jnp.broadcast_to(jnp.arange(6.0)[None, :, None], (5, 6, 1))
  assert abs(float(affinity.neighbour_step(ramp, quantile=0.9)) - 1.0) < 1e-6
  assert float(affinity.neighbour_step(jnp.ones((3, 3, 2)), quantile=0.9)) > 0
