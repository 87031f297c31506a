"""Landmark graphs: every token joined to all others through a few anchors."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from spectraldiffusion_jax.ops import color
from spectraldiffusion_jax.ops.graph import (
  MAX_DENSE,
  LandmarkGraph,
  kth_largest,
  unit_rows,
)

_EXACT = "highest"


def landmark_factor(
  tokens: Float[Array, "N E"],
  anchors: Float[Array, "M E"],
  *,
  nearest: int = 5,
  temperature: float = 0.1,
) -> Float[Array, "N M"]:
  """Z of W = Z Z^T: each token's shares in its nearest landmarks.

  exp((f_n^T l_j - 1)/temperature) on the `nearest` largest j, rows normalised
  to 1, columns then divided by the root of their sum, which gives W row sums
  of exactly 1. Anchors that are the tokens themselves do not see themselves.

  Args:
    tokens: Unit rows.
    anchors: Unit rows; the same array as `tokens` to leave out the diagonal.
    nearest: Landmarks per token.
    temperature: Of the heat kernel on cosines.

  Returns:
    The factor.

  Source: Chen, Cai, Large Scale Spectral Clustering with Landmark-Based
  Representation (2011).
  """
  count = anchors.shape[0]
  cosine = jnp.einsum("NE,ME->NM", tokens, anchors, precision=_EXACT)
  if anchors is tokens and count > 1:
    cosine = jnp.where(jnp.eye(count, dtype=bool), -jnp.inf, cosine)
  threshold = kth_largest(cosine, k=min(nearest, count))
  best = jnp.max(cosine, axis=1, keepdims=True)
  # Taking the row's best off the exponent cancels in the normalisation.
  share = jnp.exp((cosine - best) / temperature)
  share = jnp.where(cosine >= threshold[:, None], share, 0.0)
  share = share / jnp.sum(share, axis=1, keepdims=True)
  mass = jnp.sum(share, axis=0, keepdims=True)
  return share * jnp.where(mass > 0, jax.lax.rsqrt(mass + (mass <= 0)), 0.0)


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


def fused_graph(
  features: Float[Array, "h w E"],
  *,
  scales: tuple[int, ...] = (8, 16, 32),
  knn_k: int = 20,
  nearest: int = 5,
  temperature: float = 0.1,
  centre: bool = True,
  max_anchors: int = MAX_DENSE,
) -> LandmarkGraph:
  """Average of landmark graphs, one per scale: W = sum_s Z_s Z_s^T / S.

  Landmarks are average-pooled tokens of each scale. Row sums are 1 and W is
  positive semi-definite, so no shift and no degree normalisation is needed.

  Args:
    features: Token features; compared by direction only.
    scales: Rows of each pooled grid.
    knn_k: Neighbours per token at a scale that is the token grid itself.
    nearest: Landmarks per token at every other scale.
    temperature: Of the heat kernel on cosines.
    centre: Subtract the mean token first.
    max_anchors: Scales with more landmarks are left out, unless none is left.

  Returns:
    A graph whose factor has one column per landmark of any scale.
  """
  grid = features.shape[:2]
  size = grid[0] * grid[1]
  mean = jnp.mean(features, axis=(0, 1), keepdims=True)
  features = features - mean * float(centre)
  tokens = unit_rows(features.reshape(size, -1))
  normal = tokens.reshape(*grid, -1)
  grids = scale_grids(grid, scales=scales)
  kept = [g for g in grids if g[0] * g[1] <= max_anchors] or grids[:1]
  factors = []
  for pooled in kept:
    anchors, count = tokens, knn_k
    if pooled != grid:
      anchors = unit_rows(
        color.pool_to_grid(normal, grid=pooled).reshape(
          pooled[0] * pooled[1], -1
        )
      )
      count = nearest
    factors.append(
      landmark_factor(tokens, anchors, nearest=count, temperature=temperature)
    )
  return LandmarkGraph(jnp.concatenate(factors, axis=1) * len(kept) ** -0.5)
