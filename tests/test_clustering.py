"""Clusters against LAPACK and scikit-learn, and the choice between scales."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from sklearn.cluster import spectral_clustering
from sklearn.metrics import adjusted_rand_score

from spectraldiffusion_jax.errors import UserError
from spectraldiffusion_jax.ops import affinity, clustering, scales
from spectraldiffusion_jax.ops.graph import DenseGraph, unit_rows

RANDOM = np.random.default_rng(0)
cpqr = jax.jit(clustering.cpqr, static_argnames="hard")


def rows(size, width, seed=0):
  """Orthonormal columns, as eigenvectors are."""
  random = np.random.default_rng(seed)
  block = np.linalg.qr(random.standard_normal((size, width)))[0]
  return jnp.asarray(block, jnp.float32)


def blobs(seed, clusters=6, noise=0.25):
  """A 12 x 15 grid whose tokens scatter around `clusters` directions."""
  random = np.random.default_rng(seed)
  centre = random.standard_normal((clusters, 24))
  label = random.integers(0, clusters, 180)
  tokens = centre[label] + noise * random.standard_normal((180, 24))
  return jnp.asarray(tokens.reshape(12, 15, 24), jnp.float32), label


@jax.jit
def cluster(features):
  """One-hot clusters of the 10-NN graph, and its weights."""
  graph = affinity.knn_graph(features, k=10)
  return clustering.graph_clusters(graph, count=6), graph.weight


@pytest.mark.parametrize("seed", range(5))
def test_pivots_equal_lapack(seed):
  block = rows(60, 7, seed)
  pivot = scipy.linalg.qr(np.asarray(block).T, pivoting=True)[2][:7]
  got = jax.jit(clustering.greedy_pivots)(block)
  np.testing.assert_array_equal(got, pivot)


def test_polar_factor_equals_scipy():
  matrix = RANDOM.standard_normal((6, 6)).astype(np.float32)
  want = scipy.linalg.polar(matrix.astype(np.float64))[0]
  got = jax.jit(clustering.polar_factor)(matrix)
  np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize("seed", range(4))
def test_labels_equal_scikit_learn_on_separable_graphs(seed):
  features, truth = blobs(seed)
  share, weight = cluster(features)
  label = np.argmax(share, axis=1)
  theirs = spectral_clustering(
    np.asarray(weight, np.float64),
    n_clusters=6,
    assign_labels="cluster_qr",
    random_state=0,
  )
  assert adjusted_rand_score(theirs, label) >= 0.99
  assert adjusted_rand_score(truth, label) >= 0.99
  # Negative control: the score does see a wrong labelling.
  assert adjusted_rand_score(truth, RANDOM.permutation(label)) < 0.1


def test_cpqr_ignores_rotations_and_signs_and_follows_permutations():
  features, _ = blobs(1)
  label = np.argmax(cluster(features)[0], axis=1)
  order = RANDOM.permutation(180)
  flat = features.reshape(180, -1)[order].reshape(features.shape)
  shuffled = np.argmax(cluster(flat)[0], axis=1)
  assert adjusted_rand_score(shuffled, label[order]) == 1.0
  block = rows(50, 5)
  turn = rows(5, 5, seed=3)
  for other in (block @ turn, block * jnp.array([[1, -1, 1, -1, -1.0]])):
    np.testing.assert_array_equal(cpqr(other), cpqr(block))


def test_cpqr_soft_rows_sum_to_one_and_agree_with_hard():
  block = rows(50, 5)
  soft, hard = cpqr(block, hard=False), cpqr(block)
  np.testing.assert_allclose(soft.sum(1), 1.0, atol=1e-5)
  np.testing.assert_array_equal(np.argmax(soft, 1), np.argmax(hard, 1))
  assert float(jnp.max(soft)) < 1.0


@pytest.mark.parametrize("count", [1, 3, 5])
@pytest.mark.parametrize("hard", [True, False])
def test_traced_count_equals_fewer_columns(count, hard):
  block = rows(50, 5)
  got = cpqr(block, count=jnp.asarray(count), hard=hard)
  np.testing.assert_array_equal(got[:, count:], 0)
  want = cpqr(block[:, :count], hard=hard)
  np.testing.assert_allclose(got[:, :count], want, atol=1e-5)


def test_cpqr_of_fewer_distinct_rows_than_clusters_is_finite():
  block = jnp.repeat(rows(2, 2), 10, axis=0)
  share = cpqr(jnp.pad(block, ((0, 0), (0, 3))), hard=False)
  np.testing.assert_allclose(share.sum(1), 1.0, atol=1e-5)
  label = np.argmax(share, axis=1).tolist()
  assert len(set(label[:10])) == len(set(label[10:])) == 1
  assert label[0] != label[10]


def test_count_rules_choose_the_planted_number():
  # Five groups of eleven: a complete graph each, weakly joined.
  group = np.repeat(np.arange(5), 11)
  weight = np.where(group[:, None] == group, 1.0, 1e-3) * (1 - np.eye(55))
  graph = DenseGraph(jnp.asarray(weight, jnp.float32))
  for rule, want in (("eigengap", 5), ("threshold", 5), ("fixed", 9)):
    find = jax.jit(
      lambda g, rule=rule: clustering.graph_clusters(
        g, count=9, count_rule=rule, hard=False
      )
    )
    assert int((find(graph).sum(0) > 1e-6).sum()) == want
  with pytest.raises(UserError, match="count_rule='gap'"):
    clustering.graph_clusters(graph, count=3, count_rule="gap")


def modularity_by_loops(table, resolution):
  """Greedy merge of a contracted table; groups of original columns."""
  groups = [[i] for i in range(len(table))]
  table = table.copy()
  total = table.sum()
  while len(groups) > 1:
    volume = table.sum(1)
    gain = table - resolution * np.outer(volume, volume) / total
    np.fill_diagonal(gain, -np.inf)
    a, b = np.unravel_index(np.argmax(gain), gain.shape)
    if gain[a, b] <= 0:
      break
    a, b = min(a, b), max(a, b)
    table[a] += table[b]
    table[:, a] += table[:, b]
    table = np.delete(np.delete(table, b, 0), b, 1)
    groups[a] += groups.pop(b)
  return {frozenset(g) for g in groups}


@pytest.mark.parametrize("resolution", [0.1, 1.0, 30.0])
def test_modularity_merge_equals_a_greedy_loop(resolution):
  group = np.repeat(np.arange(4), 12)
  weight = np.where(group[:, None] == group, 1.0, 0.05)
  weight = weight * RANDOM.uniform(0.5, 1.0, weight.shape)
  weight = (weight + weight.T) / 2 * (1 - np.eye(48))
  share = np.eye(9)[np.minimum(np.arange(48) // 6, 7)]  # column 8 stays empty
  merged = jax.jit(
    lambda w, s: clustering.modularity_merge(
      DenseGraph(w), s, resolution=resolution
    )
  )(jnp.asarray(weight, jnp.float32), jnp.asarray(share, jnp.float32))
  want = modularity_by_loops((share.T @ weight @ share)[:8, :8], resolution)
  got = {
    frozenset(np.flatnonzero(share[merged[:, k] > 0.5].sum(0)).tolist())
    for k in range(9)
    if merged[:, k].sum() > 0
  }
  assert got == want
  assert len(want) == {0.1: 1, 1.0: 4, 30.0: 8}[resolution]


def test_conductance_is_cut_over_volume():
  weight = np.zeros((4, 4))
  weight[0, 1] = weight[1, 0] = 3.0
  weight[1, 2] = weight[2, 1] = 1.0
  weight[2, 3] = weight[3, 2] = 3.0
  share = np.array([[1, 1], [1, 0], [0, 0], [0, 0]])
  got = scales.conductance(
    DenseGraph(jnp.asarray(weight)), jnp.asarray(share, jnp.float32)
  )
  # {0, 1}: cut 1, volume 3 + 4.  {0}: cut 3, volume 3.
  np.testing.assert_allclose(got, [1 / 7, 1.0], rtol=1e-6)


def test_overlaps_are_suppressed_dearest_first_and_empties_go():
  share = np.zeros((10, 4), np.float32)
  share[:5, 0] = share[:5, 1] = share[5:, 2] = 1  # 0 and 1 equal, 3 empty
  cost = jnp.array([0.5, 0.2, 0.4, 0.1])
  order, kept = jax.jit(scales.suppress_overlaps)(jnp.asarray(share), cost)
  assert order.tolist() == [3, 1, 2, 0]
  assert kept.tolist() == [False, True, True, False]
  loose = scales.suppress_overlaps(jnp.asarray(share), cost, max_iou=1.0)[1]
  assert loose.tolist() == [False, True, True, True]


def test_missing_prototypes_are_the_least_covered_tokens():
  tokens = unit_rows(jnp.array([[1.0, 0], [1, 0.1], [0, 1], [-1, 0]]))
  candidates = unit_rows(jnp.array([[0.0, -1.0], [1.0, 0.0]]))
  usable = jnp.array([False, True])
  got = scales.farthest_prototypes(tokens, candidates, usable, count=3)
  np.testing.assert_allclose(got[0], [1, 0], atol=1e-6)
  np.testing.assert_allclose(got[1], [-1, 0], atol=1e-6)
  np.testing.assert_allclose(got[2], [0, 1], atol=1e-6)
