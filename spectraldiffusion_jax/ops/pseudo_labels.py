"""A teacher's segments made fit for training: solid pieces, the rest unknown.

Label maps of the training-free step, or of the model itself one round ago,
are split into connected pieces. Pieces that are too small, too large or not
solid (shadows, halos, two objects in one) become `IGNORE`: neither object nor
background, so their pixels teach nothing.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8

from spectraldiffusion_jax.ops.composite import IGNORE, solidity
from spectraldiffusion_jax.ops.segments import connected_components


def pseudo_labels(
  labels: Int[Array, "H W"],
  *,
  num: int,
  chance: Float[Array, "H W"] | None = None,
  doubt: float = 0.2,
  min_area: float = 0.0025,
  max_area: float = 0.27,
  min_solidity: float = 0.8,
) -> Int[Array, "H W"]:
  """Cleans one label map; the `num` largest pieces keep an id.

  Args:
    labels: Segments, 0 for the background.
    num: Most pieces kept; static.
    chance: Foreground probability of the model that made the labels.
    doubt: Pixels whose chance is within this of 1/2 become `IGNORE`.
    min_area: Smallest share of the image a piece covers.
    max_area: Largest.
    min_solidity: Least share of its convex hull that a piece fills.

  Returns:
    0 background, 1 ... num pieces by falling area, `IGNORE` unknown.
  """
  height, width = labels.shape
  root = connected_components(labels).reshape(-1)
  area = jnp.zeros(labels.size).at[root].add(1.0)
  object_ = labels.reshape(-1) > 0
  fits = (area >= min_area * labels.size) & (area <= max_area * labels.size)
  size, name = jax.lax.top_k(jnp.where(object_ & fits, area, 0.0), num)
  member = (root[:, None] == name[None]) & (size > 0)[None]
  piece = jnp.where(
    jnp.any(member, axis=1), jnp.argmax(member, axis=1) + 1, 0
  ).reshape(height, width)
  solid = solidity(piece[None], num)[0] >= min_solidity
  kept = jnp.concatenate([jnp.zeros(1, bool), solid])[piece]
  unknown = object_.reshape(height, width) & ~kept
  if chance is not None:
    unknown = unknown | (jnp.abs(chance - 0.5) < doubt)
  return jnp.where(unknown, IGNORE, jnp.where(kept, piece, 0))


UNKNOWN = 255
"""`IGNORE` in label maps stored as bytes."""


def encode(labels: Int[Array, "*B H W"]) -> UInt8[Array, "*B H W"]:
  """Label maps as bytes; at most 254 pieces."""
  return jnp.where(labels == IGNORE, UNKNOWN, labels).astype(jnp.uint8)


def decode(stored: UInt8[Array, "*B H W"]) -> Int[Array, "*B H W"]:
  """Inverts `encode`."""
  labels = stored.astype(jnp.int32)
  return jnp.where(labels == UNKNOWN, IGNORE, labels)
