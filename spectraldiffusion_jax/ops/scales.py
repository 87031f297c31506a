"""One partition from the clusters of several scales."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from spectraldiffusion_jax.ops import affinity, color
from spectraldiffusion_jax.ops.clustering import graph_clusters
from spectraldiffusion_jax.ops.graph import MAX_DENSE, Graph, unit_rows
from spectraldiffusion_jax.ops.landmarks import scale_grids

_EXACT = "highest"


def conductance(graph: Graph, share: Float[Array, "N M"]) -> Float[Array, " M"]:
  """Cut over volume of each soft cluster: 1 - m^T W m / m^T d, in [0, 1]."""
  inside = jnp.sum(share * graph.matvec(share), axis=0)
  volume = jnp.einsum("NM,N->M", share, graph.degree(), precision=_EXACT)
  return 1.0 - inside / jnp.maximum(volume, 1e-12)


def suppress_overlaps(
  share: Float[Array, "N M"],
  cost: Float[Array, " M"],
  *,
  max_iou: float = 0.7,
) -> tuple[Int[Array, " M"], Bool[Array, " M"]]:
  """Greedy non-maximum suppression of soft clusters, cheapest first.

  Args:
    share: Memberships in [0, 1]; a cluster without tokens is suppressed.
    cost: Rank of the clusters, lowest first.
    max_iou: Soft intersection over union from which the dearer one goes.

  Returns:
    Clusters in order of cost, and for each of these whether it survives.
  """
  order = jnp.argsort(cost)
  share = share[:, order]
  area = jnp.sum(share, axis=0)
  # min(a, b) is the soft intersection; M is a dozen, so one column at a time.
  both = jax.lax.map(
    lambda column: jnp.sum(jnp.minimum(column[:, None], share), axis=0),
    share.T,
  )
  union = jnp.maximum(area[:, None] + area[None, :] - both, 1e-12)
  clash = both / union > max_iou

  def step(kept, i):
    earlier = (jnp.arange(area.shape[0]) < i) & kept
    alive = ~jnp.any(clash[i] & earlier) & (area[i] > 0)
    return kept.at[i].set(alive), None

  kept = jnp.zeros(area.shape[0], bool)
  return order, jax.lax.scan(step, kept, jnp.arange(area.shape[0]))[0]


def farthest_prototypes(
  tokens: Float[Array, "N E"],
  candidates: Float[Array, "M E"],
  usable: Bool[Array, " M"],
  *,
  count: int,
) -> Float[Array, "K E"]:
  """Takes the usable candidates in order, then the least covered tokens.

  Args:
    tokens: Unit rows.
    candidates: Unit rows, best first.
    usable: Which candidates may be taken.
    count: Number of prototypes.

  Returns:
    Unit prototypes; those past the usable candidates are the tokens with the
    smallest largest cosine to all chosen before.
  """
  first = jnp.argsort(~usable, stable=True)
  total = jnp.sum(usable)

  def step(nearest, i):
    seed = tokens[jnp.argmin(nearest)]
    listed = candidates[first[jnp.minimum(i, candidates.shape[0] - 1)]]
    chosen = jnp.where(i < total, listed, seed)
    cosine = jnp.einsum("NE,E->N", tokens, chosen, precision=_EXACT)
    return jnp.maximum(nearest, cosine), chosen

  start = jnp.full(tokens.shape[0], -jnp.inf)
  return jax.lax.scan(step, start, jnp.arange(count))[1]


def per_scale_clusters(
  features: Float[Array, "h w E"],
  graph: Graph,
  *,
  num_slots: int,
  scales: tuple[int, ...] = (8, 16, 32),
  k_per_scale: int = 4,
  knn_k: int = 20,
) -> Float[Array, "N K"]:
  """Clusters each scale on its own and makes one partition of them all.

  Each scale's kNN graph is cut into k_per_scale clusters; these are ranked by
  conductance on `graph`, near-duplicates dropped, and what is missing to
  num_slots filled with the least covered tokens. One E-step of their
  prototypes, a softmax of cosines at temperature 0.1, shares the tokens out.

  Returns:
    Soft responsibilities at token resolution.
  """
  grid = features.shape[:2]
  found = []
  for pooled in scale_grids(grid, scales=scales):
    if pooled[0] * pooled[1] > MAX_DENSE:
      continue
    tokens = color.pool_to_grid(features, grid=pooled)
    label = graph_clusters(
      affinity.knn_graph(tokens, k=knn_k), count=k_per_scale
    )
    row = np.arange(grid[0]) * pooled[0] // grid[0]
    column = np.arange(grid[1]) * pooled[1] // grid[1]
    label = label.reshape(*pooled, k_per_scale)[row][:, column]
    found.append(label.reshape(-1, k_per_scale))
  share = jnp.concatenate(found, axis=1)
  order, usable = suppress_overlaps(share, conductance(graph, share))
  tokens = features.reshape(grid[0] * grid[1], -1)
  tokens = unit_rows(tokens - jnp.mean(tokens, axis=0, keepdims=True))
  mean = jnp.einsum("NM,NE->ME", share, tokens, precision=_EXACT)
  prototype = farthest_prototypes(
    tokens, unit_rows(mean)[order], usable, count=num_slots
  )
  cosine = jnp.einsum("NE,KE->NK", tokens, prototype, precision=_EXACT)
  return jax.nn.softmax(cosine / 0.1, axis=1)
