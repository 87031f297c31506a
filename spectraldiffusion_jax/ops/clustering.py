"""From a graph to clusters: eigenvectors, pivoted QR, modularity merge."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from spectraldiffusion_jax.errors import UserError
from spectraldiffusion_jax.ops import spectral
from spectraldiffusion_jax.ops.graph import Graph

_EXACT = "highest"


def eigengap_count(
  value: Float[Array, " R"], *, low: int = 2
) -> Int[Array, ""]:
  """Number of clusters k in low..R-1 with the largest gap l_k - l_{k+1}.

  The last value only closes the last gap, so pass one more than the largest
  count wanted.

  Source: von Luxburg, A Tutorial on Spectral Clustering (2007), section 8.3.
  """
  gap = value[:-1] - value[1:]
  allowed = jnp.arange(1, gap.shape[0] + 1) >= low
  return jnp.argmax(jnp.where(allowed, gap, -jnp.inf)) + 1


def count_above(
  value: Float[Array, " R"], *, threshold: float
) -> Int[Array, ""]:
  """Number of eigenvalues above a threshold, at least 2 if there are 2."""
  return jnp.maximum(jnp.sum(value > threshold), min(2, value.shape[0]))


# From the wanted eigenvalues and one more to the number of clusters.
COUNT_RULES = {
  "fixed": lambda value: value.shape[0] - 1,
  "eigengap": eigengap_count,
  "threshold": lambda value: count_above(value[:-1], threshold=0.95),
}


def greedy_pivots(
  rows: Float[Array, "N K"], *, steps: int | None = None
) -> Int[Array, " K"]:
  """Rows a column-pivoted QR of the transpose would choose, in order.

  Takes the row with the largest residual norm and projects it out of all
  others, K times: the first K pivots of LAPACK's geqp3 without its full QR.

  Source: Damle, Minden, Ying, Simple, direct and efficient multi-way
  spectral clustering (2019), algorithm 1.
  """

  def step(residual, _):
    norm = jnp.sum(residual**2, axis=1)
    pivot = jnp.argmax(norm)
    direction = residual[pivot] * jax.lax.rsqrt(norm[pivot] + 1e-30)
    along = jnp.einsum("NK,K->N", residual, direction, precision=_EXACT)
    return residual - along[:, None] * direction[None, :], pivot

  return jax.lax.scan(step, rows, length=steps or rows.shape[1])[1]


def polar_factor(matrix: Float[Array, "K K"]) -> Float[Array, "K K"]:
  """Nearest orthogonal matrix, from the singular value decomposition."""
  left, _, right = jnp.linalg.svd(matrix)
  return jnp.matmul(left, right, precision=_EXACT)


def cpqr(
  vectors: Float[Array, "N K"],
  *,
  count: int | Int[Array, ""] | None = None,
  hard: bool = True,
) -> Float[Array, "N K"]:
  """Clusters tokens by pivoted QR of their eigenvector rows.

  K greedy pivot rows span the clusters; the orthogonal matrix R nearest to
  them rotates the eigenvectors onto the axes, and token n belongs to
  argmax_j |(U R)_nj|. No restarts; any rotation or change of sign of the
  eigenvectors leaves the clusters alone.

  Args:
    vectors: Orthonormal eigenvectors in columns, leading first.
    count: Clusters to make, 1..K; may be traced. The rest stay empty.
    hard: One-hot rows; otherwise (U R)^2 normalised over clusters.

  Returns:
    Responsibilities [N K], each row summing to 1.

  Source: Damle, Minden, Ying (2019), algorithm 1.
  """
  width = vectors.shape[1]
  active = jnp.arange(width) < (width if count is None else count)
  vectors = vectors * active[None, :]
  pivot = greedy_pivots(vectors)
  frame = vectors[pivot] * active[:, None]
  # The identity on unused axes keeps the factorisation away from them.
  rotation = polar_factor(frame.T + jnp.diag(1.0 - active))
  score = jnp.einsum("NJ,JK->NK", vectors, rotation, precision=_EXACT) ** 2
  score = jnp.where(active[None, :], score, -1.0)
  if hard:
    return jax.nn.one_hot(jnp.argmax(score, axis=1), width)
  score = jnp.maximum(score, 0.0) + 1e-20 * active[None, :]
  return score / jnp.sum(score, axis=1, keepdims=True)


def modularity_merge(
  graph: Graph,
  share: Float[Array, "N K"],
  *,
  resolution: float = 1.0,
) -> Float[Array, "N K"]:
  """Joins clusters while that raises modularity, best pair first.

  Contracts W to A^T W A and joins the pair with the largest
  W_ab - resolution vol_a vol_b / vol while it is positive.

  Args:
    graph: Of the tokens.
    share: Responsibilities; columns without tokens take no part.
    resolution: Above 1 leaves more clusters, below 1 fewer.

  Returns:
    Responsibilities with the columns of joined clusters added up.
  """
  table = jnp.einsum("NA,NB->AB", share, graph.matvec(share), precision=_EXACT)
  width = share.shape[1]
  off = ~jnp.eye(width, dtype=bool)

  def best(table):
    volume = jnp.sum(table, axis=1)
    expected = volume[:, None] * volume[None, :] / jnp.sum(volume)
    # Strictly above 0: two empty columns have a gain of exactly 0.
    gain = jnp.where(off, table - resolution * expected, 0.0)
    pair = jnp.argmax(gain)
    return gain.reshape(-1)[pair], pair

  def join(state):
    table, move, _, pair = state
    keep, gone = pair // width, pair % width
    fold = jnp.eye(width) + (
      jax.nn.one_hot(gone, width)[:, None]
      * (jax.nn.one_hot(keep, width) - jax.nn.one_hot(gone, width))[None, :]
    )
    table = jnp.einsum("AK,AB,BL->KL", fold, table, fold, precision=_EXACT)
    return table, jnp.matmul(move, fold, precision=_EXACT), *best(table)

  state = (table, jnp.eye(width), *best(table))
  threshold = 1e-6 * jnp.sum(table)
  move = jax.lax.while_loop(lambda s: s[2] > threshold, join, state)[1]
  return jnp.matmul(share, move, precision=_EXACT)


def graph_clusters(
  graph: Graph,
  *,
  count: int,
  count_rule: str = "fixed",
  rounds: int = 4,
  tolerance: float = 0.01,
  hard: bool = True,
) -> Float[Array, "N R"]:
  """Clusters the tokens of a graph by its leading eigenvectors.

  Args:
    graph: Any store.
    count: Clusters, or the most of them if `count_rule` chooses.
    count_rule: "fixed", "eigengap" or "threshold" (eigenvalues above 0.95).
    rounds: Most Chebyshev filters of the eigen-solver.
    tolerance: Residual of the eigenvectors at which it stops earlier.
    hard: One-hot rows; otherwise soft ones.

  Returns:
    Responsibilities, rows summing to 1.

  Raises:
    UserError: If count_rule is unknown.
  """
  if count_rule not in COUNT_RULES:
    raise UserError(
      f"count_rule={count_rule!r}: choose one of {', '.join(COUNT_RULES)}"
    )
  pairs = spectral.graph_eigenpairs(
    graph, count=count + 1, rounds=rounds, tolerance=tolerance
  )
  used = COUNT_RULES[count_rule](pairs.value)
  return cpqr(pairs.vector[:, :count], count=used, hard=hard)
