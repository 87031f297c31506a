"""Landmark graphs: every token joined to all others through a few anchors."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from spectraldiffusion_jax.ops import color
from spectraldiffusion_jax.ops.graph import (
  LandmarkGraph,
  Landmarks,
  top_k,
  unit_rows,
)

_EXACT = "highest"
MAX_DIRECT = 512
"""Landmarks up to which all of a scale's are compared with every token."""
BASIS_ROWS = 8
"""Rows of the pooled grid whose tokens span the compressed features."""


def landmark_shares(
  cosine: Float[Array, "N Q"],
  index: Int[Array, "N Q"],
  *,
  count: int,
  temperature: float = 0.1,
) -> Landmarks:
  """Z of W = Z Z^T: each token's shares in the landmarks found for it.

  exp((f_n^T l_j - 1)/temperature), rows normalised to 1, columns then divided
  by the root of their sum, which gives W row sums of exactly 1.

  Args:
    cosine: Of the token with each landmark found; -inf leaves one out.
    index: Of these landmarks, 0..count-1.
    count: Landmarks M there are.
    temperature: Of the heat kernel on cosines.

  Returns:
    The factor.

  Source: Chen, Cai, Large Scale Spectral Clustering with Landmark-Based
  Representation (2011).
  """
  share = jax.nn.softmax(cosine / temperature, axis=1)
  mass = jnp.zeros(count, share.dtype).at[index].add(share)
  return Landmarks(
    index, share * jax.lax.rsqrt(mass + (mass <= 0))[index], jnp.sqrt(mass)
  )


def compressed(
  features: Float[Array, "h w E"], mean: Float[Array, " E"]
) -> Float[Array, "N A"]:
  """Coordinates of the unit tokens in the span of the coarsely pooled ones.

  Inner products with the span are kept, the rest is dropped: x^T A^T (A
  A^T)^-1 A y for the A = 64 tokens pooled to 8 rows, of a square grid. A
  fixed random projection to as many dimensions would blur cosines by 1/8.
  The mean and the lengths are taken out of the products, so that centred or
  unit tokens of full width are never written.

  Args:
    features: Wide tokens.
    mean: Subtracted from each of them.

  Returns:
    N = h w short tokens.

  Source: Williams, Seeger, Using the Nystroem Method to Speed Up Kernel
  Machines (2001).
  """
  grid = features.shape[:2]
  coarse = scale_grids(grid, scales=(BASIS_ROWS,))[0]
  cells = color.pool_to_grid(features, grid=coarse) - mean[None, None]
  basis = unit_rows(cells.reshape(coarse[0] * coarse[1], -1))
  gram = jnp.matmul(basis, basis.T, precision=_EXACT)
  # Pooled tokens of one object are nearly equal: the ridge keeps rank.
  root = jnp.linalg.cholesky(gram + 1e-4 * jnp.eye(len(basis)))
  span = jax.scipy.linalg.solve_triangular(root, basis, lower=True)
  tokens = features.reshape(grid[0] * grid[1], -1)
  inner = jnp.matmul(tokens, span.T, precision=_EXACT)
  inner -= jnp.matmul(span, mean, precision=_EXACT)[None]
  square = jnp.sum((tokens - mean[None]) ** 2, axis=1, keepdims=True)
  return inner * jax.lax.rsqrt(jnp.maximum(square, 1e-12))


def _pooled(tokens, grid, pooled):
  """Unit rows of the tokens averaged over the cells of a coarser grid."""
  mean = color.pool_to_grid(tokens.reshape(*grid, -1), grid=pooled)
  return unit_rows(mean.reshape(pooled[0] * pooled[1], -1))


def scale_grids(
  grid: tuple[int, int], *, scales: tuple[int, ...]
) -> list[tuple[int, int]]:
  """Pooled grids (rows, columns) of the scales, finest last, no duplicates.

  A scale is a number of rows; the columns keep the aspect ratio and neither
  exceeds the token grid, beyond which there is nothing to resolve.
  """
  height, width = grid
  grids = {
    (min(s, height), max(1, min(round(s * width / height), width)))
    for s in scales
  }
  return sorted(grids)


def _children(
  parents: Int[Array, "N Q"], coarse: tuple[int, int], fine: tuple[int, int]
) -> Int[Array, "N C"]:
  """Cells of the fine grid inside the given cells of a coarse one."""
  rows, columns = fine[0] // coarse[0], fine[1] // coarse[1]
  row, column = parents // coarse[1], parents % coarse[1]
  corner = row * rows * fine[1] + column * columns
  inside = np.arange(rows)[:, None] * fine[1] + np.arange(columns)
  inside = jnp.asarray(inside.reshape(1, 1, -1), corner.dtype)
  cells = corner[..., None] + inside
  return cells.reshape(parents.shape[0], -1)


def _search(tokens, anchors, candidates, *, k, own):
  """The k nearest anchors of each token, among its candidates or all."""
  size, count = tokens.shape[0], anchors.shape[0]
  if candidates is None:
    cosine = jnp.einsum("NE,ME->NM", tokens, anchors, precision=_EXACT)
    candidates = jnp.broadcast_to(jnp.arange(count), (size, count))
    listed = False
  else:
    cosine = jnp.einsum("NE,NQE->NQ", tokens, anchors[candidates])
    listed = True
  if own and count > 1:
    itself = candidates == jnp.arange(size)[:, None]
    cosine = jnp.where(itself, -jnp.inf, cosine)
  if listed and candidates.shape[1] <= k:
    return cosine, candidates
  cosine, place = top_k(cosine, k=min(k, cosine.shape[1]))
  if not listed:
    return cosine, place
  return cosine, jnp.take_along_axis(candidates, place, axis=1)


def fused_graph(
  features: Float[Array, "h w E"],
  *,
  scales: tuple[int, ...] = (8, 16, 32),
  knn_k: int = 20,
  nearest: int = 5,
  temperature: float = 0.1,
  centre: bool = True,
  compress: bool = True,
  beam: int | None = 5,
) -> LandmarkGraph:
  """Average of landmark graphs, one per scale: W = sum_s Z_s Z_s^T / S.

  Landmarks are average-pooled tokens of each scale. Row sums are 1 and W is
  positive semi-definite, so no shift and no degree normalisation is needed.
  A scale with more than MAX_DIRECT landmarks whose cells divide those of the
  scale before is searched among the parts of the best cells there, so that
  neither time nor memory grows with N times M.

  Args:
    features: Token features; compared by direction only.
    scales: Rows of each pooled grid.
    knn_k: Neighbours per token at a scale that is the token grid itself.
    nearest: Landmarks per token at every other scale.
    temperature: Of the heat kernel on cosines.
    centre: Subtract the mean token first.
    compress: Compare wide features by their `compressed` coordinates.
    beam: Cells of the scale before that are searched; None = compare all.

  Returns:
    A graph with one factor per scale, the coarsest first.
  """
  grid = features.shape[:2]
  tokens = _prepared(features, centre=centre, compress=compress)
  grids = scale_grids(grid, scales=scales)
  parts, before, parents = [], None, None
  for pooled in grids:
    own, count = pooled == grid, pooled[0] * pooled[1]
    k = knn_k if own else nearest
    anchors = tokens if own else _pooled(tokens, grid, pooled)
    candidates, width = None, k
    if beam is not None and count > MAX_DIRECT and _divides(before, pooled):
      candidates = _children(parents[:, :beam], before, pooled)
    elif beam is not None:
      width = max(k, beam)
    cosine, index = _search(tokens, anchors, candidates, k=width, own=own)
    before, parents = pooled, index
    parts.append(
      landmark_shares(
        cosine[:, :k], index[:, :k], count=count, temperature=temperature
      )
    )
  return _averaged(parts)


def _averaged(parts):
  """The mean of the graphs of single factors."""
  share = len(parts) ** -0.5
  return LandmarkGraph(
    tuple(
      part._replace(weight=share * part.weight, total=share * part.total)
      for part in parts
    )
  )


def _prepared(features, *, centre, compress):
  """Unit tokens, compressed if that makes them shorter."""
  grid = features.shape[:2]
  mean = jnp.mean(features, axis=(0, 1)) * float(centre)
  basis = scale_grids(grid, scales=(BASIS_ROWS,))[0]
  if compress and features.shape[-1] > basis[0] * basis[1]:
    return compressed(features, mean)
  return unit_rows(features.reshape(grid[0] * grid[1], -1) - mean[None])


def _divides(coarse: tuple[int, int] | None, fine: tuple[int, int]) -> bool:
  """Whether every cell of the coarse grid is a block of fine cells."""
  return coarse is not None and not (fine[0] % coarse[0] or fine[1] % coarse[1])
