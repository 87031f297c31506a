"""Token graphs: which tokens are joined, and how strongly.

`stencil_graph` joins near tokens and a few fixed far ones by Euclidean
distance, `knn_graph` the nearest anywhere by cosine.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from spectraldiffusion_jax.errors import UserError
from spectraldiffusion_jax.ops.graph import (
  MAX_DENSE,
  DenseGraph,
  Graph,
  NeighbourGraph,
  squared_distance,
  top_k,
  unit_rows,
)

_EXACT = "highest"


@functools.lru_cache(maxsize=16)
def _far_partners(size: int, rounds: int, seed: int) -> np.ndarray:
  """Partners [N 2*rounds]: each random permutation and its inverse."""
  # RandomState, unlike default_rng, promises the same stream for ever: the
  # graph is part of the definition of the slots.
  random = np.random.RandomState(seed)
  columns = []
  for _ in range(rounds):
    forward = random.permutation(size)
    columns += [forward, np.argsort(forward)]
  return np.stack(columns, axis=1) if columns else np.zeros((size, 0), int)


def _stencil_offsets(radius: int) -> np.ndarray:
  """The (2 radius + 1)^2 - 1 steps within a Chebyshev radius."""
  span = np.arange(-radius, radius + 1)
  steps = np.stack(np.meshgrid(span, span, indexing="ij"), -1).reshape(-1, 2)
  return steps[np.any(steps != 0, axis=1)]


@functools.lru_cache(maxsize=16)
def _stencil_partners(
  grid: tuple[int, int], radius: int
) -> tuple[np.ndarray, np.ndarray]:
  """Stencil neighbours [N Q] and whether each lies inside the grid."""
  place = np.stack(np.indices(grid), -1).reshape(-1, 1, 2)
  target = place + _stencil_offsets(radius)
  inside = np.all((target >= 0) & (target < np.array(grid)), axis=-1)
  target = np.clip(target, 0, np.array(grid) - 1)
  return target[..., 0] * grid[1] + target[..., 1], inside


def _mutual_neighbours(similarity: Array, k: int) -> Array:
  """Whether m is among the k nearest of n, or n of m; never n itself."""
  size = similarity.shape[0]
  off = ~jnp.eye(size, dtype=bool)
  similarity = jnp.where(off, similarity, -jnp.inf)
  index = top_k(similarity, k=min(k, max(size - 1, 1)))[1]
  near = jnp.zeros((size, size), bool)
  near = near.at[jnp.arange(size)[:, None], index].set(True)
  return (near | near.T) & off


def knn_graph(
  features: Float[Array, "h w E"],
  *,
  k: int = 20,
  epsilon: float = 1e-5,
  centre: bool = True,
  colour: Float[Array, "h w C"] | None = None,
  colour_weight: float = 10.0,
) -> DenseGraph:
  """Joins each token to its k nearest by cosine; optionally by colour too.

  W_nm = max(c_nm, 0) [m in kNN(n) or n in kNN(m)] + epsilon off the diagonal,
  plus colour_weight times the number of mutual kNN graphs on (colour,
  omega x, omega y), x and y in [0, 1], for (k, omega) = (20, 2) and (10, 0.1).

  Args:
    features: Token features; compared by direction only.
    k: Neighbours per token.
    epsilon: Weight between all other pairs; keeps the graph connected.
    centre: Subtract the mean token first: it is common to all ViT tokens.
    colour: Colours per token for the second term, or None.
    colour_weight: Weight of that term.

  Returns:
    A dense graph.

  Raises:
    UserError: If there are more than MAX_DENSE tokens.

  Source: Melas-Kyriazi et al., Deep Spectral Methods (2022), section 3.
  """
  grid = features.shape[:2]
  size = grid[0] * grid[1]
  if size > MAX_DENSE:
    raise UserError(
      f"knn_graph: {size} tokens exceed {MAX_DENSE}; use fused_graph or "
      "stencil_graph, which never hold all pairs"
    )
  tokens = features.reshape(size, -1)
  tokens = tokens - jnp.mean(tokens, axis=0, keepdims=True) * float(centre)
  tokens = unit_rows(tokens)
  cosine = jnp.einsum("NE,ME->NM", tokens, tokens, precision=_EXACT)
  near = _mutual_neighbours(cosine, k)
  weight = jnp.maximum(cosine, 0.0) * near
  if colour is not None:
    weight = weight + colour_weight * _colour_counts(colour)
  return DenseGraph(weight + epsilon * (1.0 - jnp.eye(size)))


def _colour_counts(colour: Float[Array, "h w C"]) -> Float[Array, "N N"]:
  """Number of the two colour-and-position kNN graphs that join each pair."""
  height, width, channels = colour.shape
  place = np.stack(
    np.meshgrid(
      np.linspace(0, 1, height), np.linspace(0, 1, width), indexing="ij"
    ),
    axis=-1,
  ).reshape(-1, 2)
  flat = colour.reshape(-1, channels)
  count = jnp.zeros((height * width,) * 2)
  for k, omega in ((20, 2.0), (10, 0.1)):
    joint = jnp.concatenate([flat, jnp.asarray(omega * place, flat.dtype)], 1)
    count += _mutual_neighbours(-squared_distance(joint), k)
  return count


def stencil_graph(
  features: Float[Array, "h w E"],
  *,
  sigma: float | Float[Array, ""],
  radius: int = 2,
  far_rounds: int = 10,
  far_weight: float = 0.5,
  seed: int = 0,
  max_dense: int = MAX_DENSE,
) -> Graph:
  """Joins near tokens, and a few fixed far ones, by likeness of features.

  W_nm = exp(-d^2/sigma^2) within a Chebyshev radius, plus
  far_weight exp(-4 d^2/sigma^2) for fixed random partners all over the
  image. The far edges stop a large smooth ground from being the cheapest
  thing to cut; positions do not enter otherwise.

  Args:
    features: Anything whose Euclidean distance means unlikeness.
    sigma: Distance at which a near weight falls to 1/e, in feature units.
    radius: Reach of the stencil in tokens; 2 gives 24 neighbours.
    far_rounds: Random permutations; each gives two far partners a token.
    far_weight: Weight of a far edge between equal tokens.
    seed: Of the far edges; they are the same for every image.
    max_dense: Most tokens for which the graph is a matrix.

  Returns:
    A dense graph for at most `max_dense` tokens, neighbour lists above.
  """
  grid = features.shape[:2]
  size = grid[0] * grid[1]
  tokens = features.reshape(size, -1)
  near, inside = _stencil_partners(grid, radius)
  far = _far_partners(size, far_rounds, seed)
  off_self = far != np.arange(size)[:, None]
  if size <= max_dense:
    row = np.arange(size)[:, None]
    near_mask = np.zeros((size, size), np.uint8)
    np.add.at(near_mask, (row, near), inside)
    far_mask = np.zeros((size, size), np.uint8)
    np.add.at(far_mask, (row, far), off_self)
    kernel = jnp.exp(-squared_distance(tokens) / sigma**2)
    return DenseGraph(kernel * near_mask + far_weight * kernel**4 * far_mask)
  index = jnp.asarray(np.concatenate([near, far], axis=1), jnp.int32)
  # One partner at a time: [N Q E] at once would dwarf the features.
  distance = jax.lax.map(
    lambda partner: jnp.sum((tokens - tokens[partner]) ** 2, axis=1), index.T
  ).T
  kernel = jnp.exp(-distance / sigma**2)
  split = near.shape[1]
  weight = jnp.concatenate(
    [
      kernel[:, :split] * inside,
      far_weight * kernel[:, split:] ** 4 * off_self,
    ],
    axis=1,
  )
  return NeighbourGraph(index, weight)


def neighbour_step(
  features: Float[Array, "h w E"], *, quantile: float
) -> Float[Array, ""]:
  """Quantile of the feature distance between 4-neighbours, above 0.

  A scale for `sigma` when the features have no natural unit.
  """
  steps = [
    jnp.sqrt(jnp.sum(jnp.diff(features, axis=axis) ** 2, axis=-1)).reshape(-1)
    for axis in (0, 1)
  ]
  steps = jnp.append(jnp.concatenate(steps), 0.0)
  return jnp.maximum(jnp.quantile(steps, quantile), 1e-6)
