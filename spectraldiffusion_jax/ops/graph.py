"""Stores of a token graph, and the row operations that fill them.

Three stores with one interface, `degree()` and `matvec(x)`: a dense matrix
for at most 1,024 tokens, a fixed number of neighbours per token, and a
factor W = Z Z^T over landmarks. The last two never hold N x N numbers.
"""

from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

MAX_DENSE = 1024
"""Largest number of tokens for which an N x N matrix is ever built."""
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


class LandmarkGraph(NamedTuple):
  """W = Z Z^T through M landmarks: positive semi-definite, row sums 1."""

  factor: Float[Array, "N M"]

  def degree(self) -> Float[Array, " N"]:
    """Row sums W 1."""
    total = jnp.sum(self.factor, axis=0)
    return jnp.matmul(self.factor, total, precision=_EXACT)

  def matvec(self, x: Float[Array, "N R"]) -> Float[Array, "N R"]:
    """W x for a block of columns."""
    inner = jnp.einsum("NM,NR->MR", self.factor, x, precision=_EXACT)
    return jnp.matmul(self.factor, inner, precision=_EXACT)


Graph: TypeAlias = DenseGraph | NeighbourGraph | LandmarkGraph


def kth_largest(values: Float[Array, "N M"], *, k: int) -> Float[Array, " N"]:
  """Value of the k-th largest entry of each row, ties counted.

  k masked maxima: on wide rows this is tens of times faster on a CPU than
  `lax.top_k`, and unlike a list of indices it treats equal values alike.
  """

  def step(_, threshold):
    below = values < threshold[:, None]
    further = jnp.max(jnp.where(below, values, -jnp.inf), axis=1)
    reached = values.shape[1] - jnp.sum(below, axis=1) >= k
    return jnp.where(reached, threshold, further)

  start = jnp.full(values.shape[0], jnp.inf, values.dtype)
  return jax.lax.fori_loop(0, k, step, start)


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
