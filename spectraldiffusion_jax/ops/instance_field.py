"""Instance field: what each pixel says about the object that it lies on.

A field [B H W 3+E] has a foreground logit, the offset from the pixel to the
centroid of its object (row, column; in units of an eighth of the image
height) and E embedding channels. Pixel position plus offset is the pixel's
*vote*; votes and embedding together are the *keys* in which slots compete.
Label maps have 0 for the background, `IGNORE` for pixels without a label.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from spectraldiffusion_jax.ops.composite import IGNORE

UNITS = 8
"""Offsets and votes are in units of the image height over this."""
VOTE_SCALE = 0.1
"""Standard deviation, in those units, with which votes count in the keys."""
MIDDLE, SPREAD = UNITS / VOTE_SCALE / 2, UNITS / VOTE_SCALE / 12**0.5
"""Mean and standard deviation of a vote's keys all over a square image."""


class Targets(NamedTuple):
  """What a label map asks of the field."""

  members: Float[Array, "B H W K"]  # one-hot objects, 0 for the background
  weight: Float[Array, "B H W"]  # 0 where the label is to be ignored
  vote: Float[Array, "B H W 2"]  # centroid of the pixel's object
  area: Float[Array, "B H W"]  # its pixels; 1 on the background


def positions(height: int, width: int) -> Float[Array, "H W 2"]:
  """Pixel centres (row, column) in field units, 0 at the upper left corner."""
  rows, columns = jnp.meshgrid(
    jnp.arange(height) + 0.5, jnp.arange(width) + 0.5, indexing="ij"
  )
  return jnp.stack([rows, columns], axis=-1) * (UNITS / height)


def targets(
  labels: Int[Array, "B H W"], *, num_objects: int, min_area: float = 0.0005
) -> Targets:
  """Memberships, centroids and areas of a batch of label maps.

  Args:
    labels: 0 background, 1 ... num_objects objects, `IGNORE` unlabelled.
    num_objects: Largest id; static.
    min_area: Smaller objects, as a share of the pixels, get weight 0.
  """
  height, width = labels.shape[1:]
  ids = jnp.arange(1, num_objects + 1, dtype=labels.dtype)
  members = (labels[..., None] == ids[None, None, None]).astype(jnp.float32)
  area = jnp.sum(members, axis=(1, 2))
  total = jnp.einsum("BHWK,HWD->BKD", members, positions(height, width))
  centroid = total / jnp.maximum(area, 1.0)[..., None]
  small = (area > 0) & (area < min_area * height * width)
  ignored = jnp.einsum("BHWK,BK->BHW", members, small.astype(jnp.float32))
  known = (labels != IGNORE).astype(jnp.float32)
  own = jnp.einsum("BHWK,BK->BHW", members, area)
  return Targets(
    members,
    known * (1.0 - ignored),
    jnp.einsum("BHWK,BKD->BHWD", members, centroid),
    jnp.maximum(own, 1.0),
  )


def votes(field: Float[Array, "B H W D"]) -> Float[Array, "B H W 2"]:
  """Where each pixel believes its object's centroid to be, in field units."""
  return positions(*field.shape[1:3])[None] + field[..., 1:3]


def keys(field: Float[Array, "B H W D"]) -> Float[Array, "B H W E"]:
  """Votes over `VOTE_SCALE`, then the embedding."""
  return jnp.concatenate([votes(field) / VOTE_SCALE, field[..., 3:]], axis=-1)


def contradicted(
  logit: Float[Array, "B H W"],
  target: Targets,
  exact: Float[Array, "B H W"],
  *,
  threshold: float = 0.8,
) -> Float[Array, "B H W"]:
  """1 where a teacher's label, not an exact one, is strongly contradicted.

  Args:
    logit: Foreground logits of the field.
    target: Targets of the same batch.
    exact: 1 where the label is exact by construction.
    threshold: Probability of the opposite label that counts as strong.
  """
  chance = jax.nn.sigmoid(jax.lax.stop_gradient(logit))
  object_ = jnp.sum(target.members, axis=-1)
  wrong = jnp.abs(object_ - chance) > threshold
  return wrong * (1.0 - exact)


def slot_posterior_loss(
  key: Float[Array, "B N E"],
  members: Float[Array, "B N K"],
  weight: Float[Array, " B N"],
) -> Float[Array, ""]:
  """-log posterior of each pixel's own slot, slots being its objects' means.

  Slots are one M-step from the labels (unit variance, equal mixing weights),
  the posterior is one E-step: the loss that makes keys fit the EM slots.

  Args:
    key: Keys of the pixels.
    members: One-hot objects, all zero on the background.
    weight: Weight of each pixel, 0 on the background.
  """
  count = jnp.einsum("BNK->BK", members)
  mean = jnp.einsum("BNK,BNE->BKE", members, key)
  mean = mean / jnp.maximum(count, 1.0)[..., None]
  cross = jnp.einsum("BNE,BKE->BNK", key, mean)
  logit = cross - 0.5 * jnp.sum(mean**2, axis=-1)[:, None]
  logit = jnp.where(count[:, None] > 0, logit, -1e9)
  own = jnp.sum(members * logit, axis=-1)
  loss = weight * (jax.nn.logsumexp(logit, axis=-1) - own)
  return jnp.sum(loss) / jnp.maximum(jnp.sum(weight), 1.0)


def losses(
  field: Float[Array, "B H W D"],
  target: Targets,
  weight: Float[Array, "B H W"],
) -> dict[str, Float[Array, ""]]:
  """The field's losses, unweighted: foreground, votes, slot posterior."""
  object_ = jnp.sum(target.members, axis=-1)
  logit = field[..., 0]
  bce = jax.nn.softplus(logit) - object_ * logit
  step = 0.25
  error = jnp.abs(votes(field) - target.vote)
  smooth = jnp.where(error < step, 0.5 * error**2 / step, error - 0.5 * step)
  pixels = field.shape[1] / UNITS
  balance = weight * object_ * pixels * jax.lax.rsqrt(target.area)
  batch, num_objects = field.shape[0], target.members.shape[-1]
  return {
    "foreground": jnp.mean(weight * bce),
    "vote": jnp.mean(balance * jnp.sum(smooth, axis=-1)),
    "slot": slot_posterior_loss(
      keys(field).reshape(batch, -1, field.shape[-1] - 1),
      target.members.reshape(batch, -1, num_objects),
      balance.reshape(batch, -1),
    ),
  }


def _window(x: Array, size: int, op, initial: float) -> Array:
  """Reduces size x size windows around each pixel of [H W]."""
  return jax.lax.reduce_window(x, initial, op, (size, size), (1, 1), "SAME")


def vote_peaks(
  vote: Float[Array, "H W 2"],
  weight: Float[Array, "H W"],
  *,
  num_peaks: int,
  blur: float = 1 / 64,
  radius: float = 0.04,
  min_votes: float = 0.002,
) -> tuple[Float[Array, "K 2"], Float[Array, " K"]]:
  """Local maxima of the histogram of votes.

  Args:
    vote: Votes in field units.
    weight: Weight of each vote, 0 on the background.
    num_peaks: K, at most this many; the highest are kept.
    blur: Standard deviation of the Gaussian over the histogram, as a share
      of the image height.
    radius: A peak is the largest value within this share of the height.
    min_votes: Votes a peak needs within half that radius, as a share of the
      pixels.

  Returns:
    Positions in field units, and 1 for peaks that exist else 0.
  """
  height, width = weight.shape
  cell = jnp.floor(vote * (height / UNITS)).astype(jnp.int32)
  row = jnp.clip(cell[..., 0], 0, height - 1)
  column = jnp.clip(cell[..., 1], 0, width - 1)
  count = jnp.zeros((height, width)).at[row, column].add(weight)
  blur, radius = blur * height, max(round(radius * height), 1)
  reach = math.ceil(3 * blur)
  tap = jnp.exp(-0.5 * (jnp.arange(-reach, reach + 1) / blur) ** 2)
  smooth = count
  for axis in (0, 1):
    smooth = jax.vmap(lambda v: jnp.convolve(v, tap, mode="same"), axis, axis)(
      smooth
    )
  # Breaks ties between equal neighbours, which would both be maxima.
  smooth = smooth + 1e-4 * jax.random.uniform(jax.random.key(0), smooth.shape)
  top = _window(smooth, 2 * radius + 1, jax.lax.max, -jnp.inf)
  near = _window(count, radius + 1, jax.lax.add, 0.0)
  score = jnp.where(
    (smooth == top) & (near >= min_votes * count.size), smooth, 0.0
  )
  value, index = jax.lax.top_k(score.reshape(-1), num_peaks)
  place = positions(height, width).reshape(-1, 2)[index]
  return place, (value > 0).astype(jnp.float32)


def decode(
  field: Float[Array, "H W D"],
  *,
  num_objects: int,
  min_area: float = 0.0012,
  threshold: float = 0.5,
) -> Int[Array, "H W"]:
  """Labels of one image: foreground pixels to the nearest peak of the votes.

  Args:
    field: The image's field.
    num_objects: Largest label given.
    min_area: Smaller segments, as a share of the pixels, become background.
    threshold: Foreground probability from which a pixel is an object's.
  """
  front = jax.nn.sigmoid(field[..., 0]) > threshold
  vote = votes(field[None])[0]
  place, found = vote_peaks(
    vote,
    front.astype(jnp.float32),
    num_peaks=num_objects,
  )
  gap = jnp.sum((vote[..., None, :] - place[None, None]) ** 2, axis=-1)
  gap = jnp.where(found[None, None] > 0, gap, jnp.inf)
  label = jnp.where(front, jnp.argmin(gap, axis=-1) + 1, 0)
  label = jnp.where(jnp.any(found > 0), label, 0)
  area = jnp.sum(
    jax.nn.one_hot(label, num_objects + 1, dtype=jnp.float32), axis=(0, 1)
  )
  return jnp.where(area[label] >= min_area * label.size, label, 0)
