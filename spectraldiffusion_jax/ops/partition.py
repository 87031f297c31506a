"""The training-free step: features to a partition, partition to masks."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from spectraldiffusion_jax.errors import UserError
from spectraldiffusion_jax.ops import affinity, color, landmarks, segments
from spectraldiffusion_jax.ops.clustering import (
  graph_clusters,
  modularity_merge,
)
from spectraldiffusion_jax.ops.graph import MAX_DENSE_CPU
from spectraldiffusion_jax.ops.refine import refine_pixels
from spectraldiffusion_jax.ops.scales import per_scale_clusters


class Partition(NamedTuple):
  """Tokens shared out among slots; slot 0 is the background."""

  assignment: Float[Array, "N K"]
  active: Bool[Array, " K"]
  count: Int[Array, ""]


def graph_partition(
  features: Float[Array, "h w E"],
  *,
  num_slots: int,
  contrast: Float[Array, "h w C"] | None = None,
  sigma: float | None = None,
  tau: float = 0.07,
  clusters: int | None = None,
  count_rule: str = "threshold",
  max_fragments: int = 64,
) -> Partition:
  """Cuts the stencil-and-far-edges graph, then merges by border contrast.

  The default for pixels. The cut over-segments on purpose; only the merge
  decides what is one thing.

  Args:
    features: Compared by Euclidean distance: colours or a learned field.
    num_slots: Slots K, the background included.
    contrast: Features in which the merge compares regions, or `features`.
    sigma: Distance at which a near edge falls to 1/e; 0.7 of the 90%
      quantile of neighbour steps if None.
    tau: Border contrast from which regions stay apart, in units of contrast.
    clusters: Eigenvectors clustered; 4/5 of num_slots if None, as unconnected
      parts of a cluster become regions of their own.
    count_rule: How many of them are used, see `graph_clusters`; the default
      takes fewer where a scene has fewer things, which then split less often.
    max_fragments: Size of the merge table, see `merged_segments`.

  Returns:
    A one-hot partition.

  Raises:
    UserError: If num_slots or clusters is below 1.
  """
  if clusters is None:
    clusters = -(-4 * num_slots // 5)
  _at_least_one(num_slots=num_slots, clusters=clusters)
  grid = features.shape[:2]
  features = _finite(features)
  contrast = features if contrast is None else _finite(contrast)
  if sigma is None:
    sigma = 0.7 * affinity.neighbour_step(features, quantile=0.9)
  share = _stencil_clusters(
    features, sigma, count=clusters, count_rule=count_rule
  )
  segment = segments.merged_segments(
    jnp.argmax(share, axis=1).reshape(grid),
    contrast,
    tau=tau,
    most=num_slots,
    max_fragments=max_fragments,
  )
  share = jax.nn.one_hot(segment, max_fragments).reshape(-1, max_fragments)
  return _as_partition(share, grid, num_slots=num_slots, hard=True)


def _stencil_clusters(features, sigma, **options):
  """Clusters of the stencil graph, stored as its platform multiplies best."""

  def cut(features, sigma, **limit):
    graph = affinity.stencil_graph(features, sigma=sigma, **limit)
    return graph_clusters(graph, **options)

  sigma = jnp.asarray(sigma, features.dtype)
  lists = functools.partial(cut, max_dense=MAX_DENSE_CPU)
  return jax.lax.platform_dependent(features, sigma, cpu=lists, default=cut)


def fused_partition(
  features: Float[Array, "h w E"],
  *,
  num_slots: int,
  scales: tuple[int, ...] = (8, 16, 32),
  knn_k: int = 20,
  count_rule: str = "fixed",
  merge: bool = False,
  hard: bool = True,
) -> Partition:
  """Cuts the landmark graph fused over scales into num_slots clusters.

  Args:
    features: Compared by cosine: frozen or learned tokens.
    num_slots: Slots K, the background included.
    scales: Rows of each pooled grid.
    knn_k: Neighbours per token at a scale that is the token grid itself.
    count_rule: How many clusters are used, see `graph_clusters`.
    merge: Join clusters while that raises modularity.
    hard: One-hot assignment instead of a soft one.

  Returns:
    A partition of the tokens.

  Raises:
    UserError: If num_slots is below 1 or count_rule unknown.
  """
  _at_least_one(num_slots=num_slots)
  features = _finite(features)
  graph = landmarks.fused_graph(features, scales=scales, knn_k=knn_k)
  share = graph_clusters(
    graph, count=num_slots, count_rule=count_rule, hard=hard
  )
  if merge:
    share = modularity_merge(graph, share)
  return _as_partition(
    share, features.shape[:2], num_slots=num_slots, hard=hard
  )


def per_scale_partition(
  features: Float[Array, "h w E"],
  *,
  num_slots: int,
  scales: tuple[int, ...] = (8, 16, 32),
  k_per_scale: int = 4,
  knn_k: int = 20,
  merge: bool = False,
  hard: bool = True,
) -> Partition:
  """Cuts every scale into k_per_scale clusters and fuses the clusters.

  Args:
    features: Compared by cosine: frozen or learned tokens.
    num_slots: Slots K, the background included.
    scales: Rows of each pooled grid.
    k_per_scale: Clusters per scale.
    knn_k: Neighbours per token of each scale's graph.
    merge: Join slots while that raises modularity.
    hard: One-hot assignment instead of a soft one.

  Returns:
    A partition of the tokens.

  Raises:
    UserError: If num_slots or k_per_scale is below 1.
  """
  _at_least_one(num_slots=num_slots, k_per_scale=k_per_scale)
  features = _finite(features)
  graph = landmarks.fused_graph(features, scales=scales, knn_k=knn_k)
  share = per_scale_clusters(
    features,
    graph,
    num_slots=num_slots,
    scales=scales,
    k_per_scale=k_per_scale,
    knn_k=knn_k,
  )
  if merge:
    share = modularity_merge(graph, share)
  return _as_partition(
    share, features.shape[:2], num_slots=num_slots, hard=hard
  )


MODES = {
  "graph": graph_partition,
  "fused": fused_partition,
  "per_scale": per_scale_partition,
}


def spectral_partition(
  features: Float[Array, "h w E"],
  *,
  num_slots: int,
  mode: str = "graph",
  **options,
) -> Partition:
  """Shares a feature grid out among at most `num_slots` slots.

  No gradient passes, and entries that are not finite count as 0. Slot 0 has
  the most contact with the border; the others follow by falling area.

  Args:
    features: Colours, or a learned feature map.
    num_slots: Slots K, the background included.
    mode: "graph", "fused" or "per_scale".
    **options: Of that mode's function in MODES.

  Returns:
    Assignment [N K] with rows summing to 1, which slots hold tokens, and
    their number.

  Raises:
    UserError: If the mode or an option is unknown or out of range.
  """
  if mode not in MODES:
    raise UserError(f"mode={mode!r}: choose one of {', '.join(MODES)}")
  return MODES[mode](features, num_slots=num_slots, **options)


def over_images(function: Callable[..., Any]) -> Callable[..., Any]:
  """Maps a function of one image over the leading axis of its arguments.

  A vmap, except on a CPU, where one image after the other is 1.7 times as
  fast: XLA's batched products of small matrices are slower there than the
  same products in turn.
  """

  def batched(*arrays):
    return jax.lax.platform_dependent(
      *arrays,
      cpu=lambda *rows: jax.lax.map(lambda row: function(*row), rows),
      default=jax.vmap(function),
    )

  return batched


def _at_least_one(**numbers):
  """Refuses counts below 1, naming them."""
  for name, value in numbers.items():
    if value < 1:
      raise UserError(f"{name}={value}: must be at least 1")


def _finite(features):
  """Cuts the gradient and replaces what is not a number by 0."""
  features = jnp.nan_to_num(features, nan=0.0, posinf=0.0, neginf=0.0)
  return jax.lax.stop_gradient(features)


def _as_partition(share, grid, *, num_slots, hard):
  """Orders the columns as slots and pads or cuts them to num_slots."""
  if hard:
    share = jax.nn.one_hot(jnp.argmax(share, axis=1), share.shape[1])
  share = jnp.pad(share, ((0, 0), (0, max(num_slots - share.shape[1], 0))))
  order = segments.slot_order(share.reshape(*grid, -1))
  assignment = share[:, order[:num_slots]]
  active = jnp.sum(assignment, axis=0) > 0
  return Partition(assignment, active, jnp.sum(active))


def training_free(
  image: Float[Array, "H W 3"],
  *,
  num_slots: int = 11,
  grid: tuple[int, int] = (32, 32),
  sigma: float = 0.06,
  tau: float = 0.07,
  clusters: int | None = None,
  blur: float = 0.25,
  lightness: float = 0.7,
) -> tuple[Float[Array, "K H W"], Bool[Array, " K"]]:
  """Segments an image by colour alone, without any training.

  Args:
    image: sRGB in [0, 1].
    num_slots: Largest number of segments, the background included.
    grid: Token rows and columns the graph is built on.
    sigma: Colour distance at which a near edge falls to 1/e, in Lab/100.
    tau: Border contrast from which two regions stay apart, in Lab/100.
    clusters: Eigenvectors clustered, see `graph_partition`.
    blur: Gaussian blur before pooling, in token widths.
    lightness: Weight of L against a and b: shading changes L most.

  Returns:
    One-hot masks, slot 0 the background, and which slots hold a pixel.
  """
  weight = jnp.array([lightness, 1.0, 1.0])[None, None]
  lab = color.srgb_to_lab(jnp.nan_to_num(image)) * weight
  smooth = color.gaussian_blur(lab, sigma=blur * image.shape[0] / grid[0])
  part = graph_partition(
    color.pool_to_grid(smooth, grid=grid),
    num_slots=num_slots,
    sigma=sigma,
    tau=tau,
    clusters=clusters,
  )
  masks = refine_pixels(lab, part.assignment, grid=grid)
  return masks, jnp.any(masks > 0, axis=(1, 2))
