"""Full attention by each platform's fastest means, and rotary positions."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

ROWS = 128
"""Queries at a time on a TPU: for two images of 1,370 tokens and 16 heads their
weights take 22 MB of 128 MB on the chip of a v5e."""


def attend(
  query: Float[Array, "B N M P"],
  key: Float[Array, "B L M P"],
  value: Float[Array, "B L M P"],
) -> Float[Array, "B N M P"]:
  """softmax(query key^T / sqrt(P)) value, for each of M heads of P channels.

  On a GPU in 16 bit this is cuDNN's fused kernel; on a CPU one head at a time,
  so that its N x L weights stay in the cache (2 to 4 times faster than all at
  once from 256 tokens on); on a TPU ROWS queries of all heads at a time, whose
  weights stay on the chip; else XLA's.

  Args:
    query: one row for each token that asks.
    key: one row for each token that is asked.
    value: what those tokens answer.

  Returns:
    The answers, in the query's dtype.
  """
  half = query.dtype in (jnp.bfloat16, jnp.float16)
  if half and jax.default_backend() == "gpu":
    return jax.nn.dot_product_attention(
      query, key, value, implementation="cudnn"
    )
  # Chosen when a program is lowered, not here: a program for TPUs may be
  # traced on a machine that has none.
  return jax.lax.platform_dependent(
    query,
    key,
    value,
    cpu=_attend_by_head,
    tpu=_attend_by_rows,
    default=jax.nn.dot_product_attention,
  )


def _attend_by_head(query, key, value):
  def one_head(arguments):
    q, k, v = (x.astype(jnp.float32) for x in arguments)
    logits = jnp.einsum("BNP,BLP->BNL", q * q.shape[-1] ** -0.5, k)
    top = jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True))
    weights = jnp.exp(logits - top)
    # Dividing the N x P result is cheaper than dividing the N x L weights.
    total = weights.sum(axis=-1, keepdims=True)
    return jnp.einsum("BNL,BLP->BNP", weights, v) / total

  heads_first = [jnp.moveaxis(x, 2, 0) for x in (query, key, value)]
  result = jax.lax.map(one_head, heads_first)
  return jnp.moveaxis(result, 0, 2).astype(query.dtype)


def _attend_by_rows(query, key, value):
  """No axis is cut that a mesh may have split: neither batch nor heads."""
  length = query.shape[1]
  count = -(-length // ROWS)
  rest = (0, count * ROWS - length)
  padded = jnp.pad(query, ((0, 0), rest, (0, 0), (0, 0)))

  # Computed anew for the gradient, which would else keep all N x L weights.
  @jax.checkpoint
  def some_rows(q):
    logits = jnp.einsum(
      "BNMP,BLMP->BMNL", q, key, preferred_element_type=jnp.float32
    )
    logits = logits * q.shape[-1] ** -0.5
    top = jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True))
    weights = jnp.exp(logits - top)
    total = jnp.moveaxis(weights.sum(axis=-1), 1, 2)[..., None]
    result = jnp.einsum(
      "BMNL,BLMP->BNMP",
      weights.astype(value.dtype),
      value,
      preferred_element_type=jnp.float32,
    )
    return (result / total).astype(q.dtype)

  parts = padded.reshape(len(query), count, ROWS, *query.shape[2:])
  result = jax.lax.map(some_rows, jnp.moveaxis(parts, 1, 0))
  return jnp.moveaxis(result, 0, 1).reshape(padded.shape)[:, :length]


def rotary_angles(
  height: int, width: int, channels: int
) -> Float[np.ndarray, "N P"]:
  """Angles by which DINOv3 turns the channels of each token of a grid.

  2 pi (y, x) / 100^(4 i / P) for patch centres y, x in [-1, 1] and i < P / 4
  (Simeoni et al. 2025, arXiv 2508.10104, section 3.2).

  Args:
    height: h of the token grid.
    width: w of the token grid.
    channels: P of one head, a multiple of 4.

  Returns:
    P / 4 angles for y, as many for x, and both again for the second half of
    the channels, which turn together with the first.
  """
  y = (np.arange(height) + 0.5) / height * 2 - 1
  x = (np.arange(width) + 0.5) / width * 2 - 1
  centre = np.stack(np.meshgrid(y, x, indexing="ij"), -1).reshape(-1, 2, 1)
  frequency = 100.0 ** -(np.arange(0, channels, 4) / channels)
  angles = (2 * np.pi * centre * frequency).reshape(len(centre), -1)
  return np.tile(angles, 2).astype(np.float32)


def rotate(
  x: Float[Array, "B L M P"], angles: Float[Array, "N P"]
) -> Float[Array, "B L M P"]:
  """Turns the last N of L tokens; class and register tokens stay.

  Channel i and channel i + P / 2 are the two coordinates that turn, in
  float32.
  """
  prefix, patches = jnp.split(x, [x.shape[1] - len(angles)], axis=1)
  first, second = jnp.split(patches.astype(jnp.float32), 2, axis=-1)
  cos, sin = (f(angles)[None, :, None, :] for f in (jnp.cos, jnp.sin))
  quarter_turn = jnp.concatenate([-second, first], axis=-1)
  turned = patches.astype(jnp.float32) * cos + quarter_turn * sin
  return jnp.concatenate([prefix, turned.astype(x.dtype)], axis=1)
