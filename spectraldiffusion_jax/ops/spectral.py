"""Leading eigenvectors of a normalised graph by block iteration.

A_s = D^-1/2 W D^-1/2 has its spectrum in [-1, 1] and the known leading
eigenvector sqrt(d), which is deflated exactly. The wanted end is the top of
A_s (the bottom of the Laplacian I - A_s).
"""

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from spectraldiffusion_jax.ops.graph import Graph, LandmarkGraph

Matvec: TypeAlias = Callable[[Array], Array]
_EXACT = "highest"
MAX_COARSE = 256
"""Landmarks of the coarsest scale up to which a dense eigh finds a start."""


class Eigenpairs(NamedTuple):
  """Approximate leading eigenpairs, largest eigenvalue first."""

  value: Float[Array, " R"]
  vector: Float[Array, "N R"]


def normalised_operator(
  graph: Graph, *, uniform: float = 0.03
) -> tuple[Matvec, Float[Array, " N"]]:
  """Builds x -> D^-1/2 (W + uniform 11^T/N) D^-1/2 x and its first vector.

  The faint edges from every token to all others give each a degree of at
  least `uniform`. Without them a few stray tokens, such as the blended
  colours on an outline, are a near-component of their own, with an eigenvalue
  near 1, and take the place of a cluster among the leading eigenvectors.

  Args:
    graph: Any of the stores in `ops.graph`.
    uniform: Degree added to every token, spread evenly over all tokens.

  Returns:
    The operator on blocks [N R], and sqrt(d)/|sqrt(d)|, whose eigenvalue is 1.

  Source: Joseph, Yu, Impact of Regularization on Spectral Clustering (2016).
  """
  degree = graph.degree() + uniform
  scale = jax.lax.rsqrt(degree)[:, None]

  def matvec(x: Array) -> Array:
    x = x * scale
    faint = uniform * jnp.mean(x, axis=0, keepdims=True)
    return (graph.matvec(x) + faint) * scale

  lead = jnp.sqrt(degree)
  return matvec, lead / jnp.linalg.norm(lead)


def deflate(
  x: Float[Array, "N R"], lead: Float[Array, " N"]
) -> Float[Array, "N R"]:
  """Projects out a known unit eigenvector: (I - u u^T) x."""
  inner = jnp.einsum("N,NR->R", lead, x, precision=_EXACT)
  return x - lead[:, None] * inner[None, :]


def gaussian_block(size: int, columns: int, *, seed: int = 0) -> np.ndarray:
  """Fixed Gaussian start block [N columns]: slots stay deterministic."""
  random = np.random.RandomState(seed)
  return random.standard_normal((size, columns)).astype(np.float32)


def orthonormalise(block: Float[Array, "N R"]) -> Float[Array, "N R"]:
  """Orthonormal basis of the columns (Householder QR)."""
  return jnp.linalg.qr(block)[0]


def block_power(
  matvec: Matvec,
  block: Float[Array, "N R"],
  *,
  steps: int,
  shift: float = 0.0,
) -> Float[Array, "N R"]:
  """Block power iteration Q <- qr(M Q), M = (A + shift I) / (1 + shift).

  sin angle(u_i, span Q_t) <= tan(theta_0) (m_{p+1}/m_i)^t. Use shift 1 where
  A may have eigenvalues near -1, and 0 where A is positive semi-definite:
  the shift halves the gap.
  """

  def step(_, q):
    return orthonormalise((matvec(q) + shift * q) / (1 + shift))

  return jax.lax.fori_loop(0, steps, step, orthonormalise(block))


def chebyshev_filter(
  matvec: Matvec,
  block: Float[Array, "N R"],
  *,
  degree: int,
  low: float | Float[Array, ""],
  high: float | Float[Array, ""],
) -> Float[Array, "N R"]:
  """Applies T_degree((A - c)/r): at most 1 on [low, high], large above.

  c = (low + high)/2 and r = (high - low)/2; a wanted eigenvalue x = (l - c)/r
  gains cosh(degree arccosh x). Keep degree <= 16 between two QRs in float32.

  Source: Saad, Numerical Methods for Large Eigenvalue Problems, section 7.4.
  """
  centre, radius = (low + high) / 2, (high - low) / 2

  def scaled(x):
    return (matvec(x) - centre * x) / radius

  def step(_, pair):
    before, now = pair
    return now, 2 * scaled(now) - before

  pair = (block, scaled(block))
  return jax.lax.fori_loop(1, degree, step, pair)[1]


def rayleigh_ritz(matvec: Matvec, basis: Float[Array, "N R"]) -> Eigenpairs:
  """Best eigenpairs of A inside the span of an orthonormal basis."""
  return _ritz_and_residuals(matvec, basis)[0]


def _ritz_and_residuals(matvec, basis):
  """Ritz pairs and their residual norms, from one product with A."""
  image = matvec(basis)
  small = jnp.einsum("NP,NQ->PQ", basis, image, precision=_EXACT)
  value, rotation = jnp.linalg.eigh((small + small.T) / 2)
  value, rotation = value[::-1], rotation[:, ::-1]
  vector = jnp.matmul(basis, rotation, precision=_EXACT)
  gap = jnp.matmul(image, rotation, precision=_EXACT)
  gap = gap - vector * value[None, :]
  return Eigenpairs(value, vector), jnp.linalg.norm(gap, axis=0)


def residuals(matvec: Matvec, pairs: Eigenpairs) -> Float[Array, " R"]:
  """Norms |A u_i - l_i u_i|: each bounds the error of its eigenvalue."""
  gap = matvec(pairs.vector) - pairs.vector * pairs.value[None, :]
  return jnp.linalg.norm(gap, axis=0)


def leading_eigenpairs(
  matvec: Matvec,
  lead: Float[Array, " N"],
  *,
  count: int,
  oversample: int = 4,
  rounds: int = 4,
  degree: int = 8,
  low: float = -1.0,
  seed: int = 0,
  start: Float[Array, "N P"] | None = None,
  tolerance: float = 0.0,
) -> Eigenpairs:
  """Leading eigenpairs of a normalised operator, the first one exact.

  Chebyshev-filtered block iteration orthogonal to `lead`; each round damps
  [low, smallest Ritz value of the block].

  Args:
    matvec: Symmetric operator on blocks, spectrum in [-1, 1].
    lead: Its unit eigenvector of eigenvalue 1.
    count: Number of pairs wanted, `lead` among them.
    oversample: Extra columns of the block; without them convergence hangs on
      the gap right behind the last wanted pair.
    rounds: Most filters, each followed by QR and Rayleigh-Ritz.
    degree: Operator products per filter, at most 16.
    low: Lower end of the spectrum: -1, or 0 if positive semi-definite.
    seed: Of the start block.
    start: Guesses of the leading eigenvectors but the first, best first.
    tolerance: Stop when no wanted pair but the last has a larger residual.

  Returns:
    `count` pairs; beyond the number of tokens the vectors are zero and the
    last value repeats.
  """
  size = lead.shape[0]
  columns = min(count + oversample, size) - 1
  pairs = Eigenpairs(jnp.ones(1, lead.dtype), lead[:, None])
  if columns > 0:
    block = jnp.asarray(gaussian_block(size, columns, seed=seed))
    if start is not None:
      start = start[:, :columns]
      block = block.at[:, : start.shape[1]].set(start)
    options = dict(rounds=rounds, degree=degree, low=low, tolerance=tolerance)
    options["watched"] = max(min(count - 2, columns), 1)
    found = _filtered_iteration(matvec, lead, block, **options)
    pairs = jax.tree.map(
      lambda a, b: jnp.concatenate([a, b], axis=-1), pairs, found
    )
  spare = max(count - columns - 1, 0)
  return Eigenpairs(
    jnp.pad(pairs.value, (0, spare), mode="edge")[:count],
    jnp.pad(pairs.vector, ((0, 0), (0, spare)))[:, :count],
  )


def _filtered_iteration(
  matvec, lead, block, *, rounds, degree, low, tolerance, watched
):
  """Runs the rounds of `leading_eigenpairs` on the complement of lead."""

  def operator(x):
    # Not only at the start: the filter would blow round-off along lead up.
    return deflate(matvec(x), lead)

  def ritz(block):
    basis = orthonormalise(deflate(block, lead))
    return _ritz_and_residuals(operator, basis)

  def going(state):
    _, rest, done = state
    return (done < rounds) & (jnp.max(rest[:watched]) > tolerance)

  def step(state):
    pairs, _, done = state
    # A block that already holds every direction leaves nothing to damp.
    high = jnp.maximum(pairs.value[-1], low + 0.05)
    block = chebyshev_filter(
      operator, pairs.vector, degree=degree, low=low, high=high
    )
    return *ritz(block), done + 1

  return jax.lax.while_loop(going, step, (*ritz(block), 0))[0]


def graph_eigenpairs(
  graph: Graph,
  *,
  count: int,
  rounds: int = 4,
  uniform: float = 0.03,
  tolerance: float = 0.01,
) -> Eigenpairs:
  """Leading eigenpairs of a graph's normalised operator, the cheap way.

  A landmark graph is positive semi-definite, and the few landmarks of its
  coarsest scale give good guesses of its eigenvectors: one product with the
  whole graph often shows that they will do.

  Args:
    graph: Any of the stores in `ops.graph`.
    count: Number of pairs, the known first one among them.
    rounds: Most Chebyshev filters, see `leading_eigenpairs`.
    uniform: Degree of the faint edges, see `normalised_operator`.
    tolerance: Residual at which the iteration stops; the angle to the true
      eigenspace is at most this over the gap (Davis, Kahan 1970).
  """
  matvec, lead = normalised_operator(graph, uniform=uniform)
  landmarks = isinstance(graph, LandmarkGraph)
  return leading_eigenpairs(
    matvec,
    lead,
    count=count,
    rounds=rounds,
    low=0.0 if landmarks else -1.0,
    start=coarse_eigenvectors(graph) if landmarks else None,
    tolerance=tolerance,
  )


def coarse_eigenvectors(graph: LandmarkGraph) -> Float[Array, "N P"] | None:
  """Eigenvectors of the coarsest scale alone, but the first.

  Z Z^T shares its non-zero eigenvalues with the M x M matrix Z^T Z = G S G^T,
  and has the eigenvectors Z G S^-1/2. None with more than MAX_COARSE
  landmarks, where a dense eigh costs more than it saves.
  """
  part = graph.parts[0]
  size = part.total.shape[0]
  if size > MAX_COARSE:
    return None
  pair = part.weight[:, :, None] * part.weight[:, None, :]
  gram = jnp.zeros((size, size), pair.dtype)
  gram = gram.at[part.index[:, :, None], part.index[:, None, :]].add(pair)
  value, vector = jnp.linalg.eigh(gram)
  value, vector = value[::-1][1:], part.expand(vector[:, ::-1][:, 1:])
  # Past the rank there is nothing to guess from.
  noise = jnp.asarray(gaussian_block(vector.shape[0], size - 1, seed=1))
  return jnp.where(value[None, :] > 1e-6, vector, noise)
