"""Stores of a token graph, and the row operations that fill them.

Three stores with one interface, `degree()` and `matvec(x)`: a dense matrix
for at most 1,024 tokens, a fixed number of neighbours per token, and
factors W = Z Z^T with a few landmarks per token. The last two never hold
N x N numbers, and their products are gathers and scatters: ten times as fast
on a CPU as the same factor held densely.
"""

from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

MAX_DENSE = 1024
"""Largest number of tokens for which an N x N matrix is ever built."""
MAX_DENSE_CPU = 256
"""That for graphs of few edges on a CPU: lists multiply faster beyond it."""
_EXACT = "highest"


class DenseGraph(NamedTuple):
  """Symmetric weights [N N]."""

  weight: Float[Array, "N N"]

  def degree(self) -> Float[Array, " N"]:
    """Row sums W 1."""
    return jnp.sum(self.weight, axis=1)

  def matvec(self, x: Float[Array, "N R"]) -> Float[Array, "N R"]:
    """W x for a block of columns."""
    return jnp.matmul(self.weight, x, precision=_EXACT)


class NeighbourGraph(NamedTuple):
  """Weights to Q listed partners of each token; the lists are mutual."""

  index: Int[Array, "N Q"]
  weight: Float[Array, "N Q"]

  def degree(self) -> Float[Array, " N"]:
    """Row sums W 1."""
    return jnp.sum(self.weight, axis=1)

  def matvec(self, x: Float[Array, "N R"]) -> Float[Array, "N R"]:
    """W x for a block of columns."""
    return jnp.einsum("NQ,NQR->NR", self.weight, x[self.index])


class Landmarks(NamedTuple):
  """One factor Z of W = Z Z^T: the r landmarks, of M, of each token."""

  index: Int[Array, "N Q"]
  weight: Float[Array, "N Q"]
  total: Float[Array, " M"]  # Z^T 1

  def expand(self, y: Float[Array, "M R"]) -> Float[Array, "N R"]:
    """Z y."""
    return jnp.einsum("NQ,NQR->NR", self.weight, y[self.index])

  def collect(self, x: Float[Array, "N R"]) -> Float[Array, "M R"]:
    """Z^T x."""
    start = jnp.zeros((self.total.shape[0], x.shape[1]), x.dtype)
    return start.at[self.index].add(self.weight[..., None] * x[:, None])


class LandmarkGraph(NamedTuple):
  """W = sum_s Z_s Z_s^T, one factor a scale: positive semi-definite."""

  parts: tuple[Landmarks, ...]

  def degree(self) -> Float[Array, " N"]:
    """Row sums W 1."""
    return sum(
      jnp.sum(part.weight * part.total[part.index], axis=1)
      for part in self.parts
    )

  def matvec(self, x: Float[Array, "N R"]) -> Float[Array, "N R"]:
    """W x for a block of columns."""
    return sum(part.expand(part.collect(x)) for part in self.parts)


Graph: TypeAlias = DenseGraph | NeighbourGraph | LandmarkGraph


def top_k(
  values: Float[Array, "N M"], *, k: int
) -> tuple[Float[Array, "N k"], Int[Array, "N k"]]:
  """The k largest of each row, largest first, and their columns.

  XLA's fast kernel stands in for `lax.top_k` only where nothing slices its
  result; else all M are sorted, in 10 times the time. Hence the barrier.
  """
  return jax.lax.optimization_barrier(jax.lax.top_k(values, k))


def unit_rows(x: Float[Array, "N E"]) -> Float[Array, "N E"]:
  """Rows of length 1; rows of length 0 stay 0."""
  square = jnp.sum(x**2, axis=1, keepdims=True)
  return x * jax.lax.rsqrt(jnp.maximum(square, 1e-12))


def squared_distance(x: Float[Array, "N E"]) -> Float[Array, "N N"]:
  """All pairwise squared Euclidean distances."""
  # Centring first keeps the cancellation in |a|^2 + |b|^2 - 2ab harmless.
  x = x - jnp.mean(x, axis=0, keepdims=True)
  square = jnp.sum(x**2, axis=1)
  product = jnp.einsum("NE,ME->NM", x, x, precision=_EXACT)
  return jnp.maximum(square[:, None] + square[None, :] - 2 * product, 0.0)
