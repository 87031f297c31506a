"""Copy-paste composites: training scenes whose masks are exact.

Segments of a batch's own (pseudo-)label maps are cut out, moved and pasted
into other images of the batch, in front of or behind what is there. Whatever
the quality of the labels, the outline and identity of a pasted piece are
known. Half of the pastes touch an existing segment, half of those in its
colour: the cases that labels from colour never show. Everything is pure
jax.numpy with static shapes and runs inside the training step.

Source: Dwibedi et al., Cut, paste and learn (ICCV 2017); Ghiasi et al.,
Simple copy-paste (CVPR 2021); here with labels that nobody drew.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

IGNORE = -1
"""Label of pixels about which nothing is known."""


class Composite(NamedTuple):
  """A batch of composites; pasted pieces have ids after the originals'."""

  images: Float[Array, "B H W 3"]
  labels: Int[Array, "B H W"]
  exact: Float[Array, "B H W"]  # 1 on pasted pixels


class Segments(NamedTuple):
  """Segments 1 ... S of each image of a batch."""

  area: Float[Array, "B S"]  # pixels
  centre: Float[Array, "B S 2"]  # row, column
  bottom: Float[Array, "B S"]  # lowest row
  colour: Float[Array, "B S 3"]  # mean RGB
  solid: Float[Array, "B S"]  # area over area of the convex hull
  inside: Float[Array, "B S"]  # 1 if away from the frame


def _members(labels: Int[Array, "B H W"], num: int) -> Array:
  """One-hot segments 1 ... num: float32 [B H W S]."""
  ids = jnp.arange(1, num + 1, dtype=labels.dtype)
  return (labels[..., None] == ids[None, None, None]).astype(jnp.float32)


def solidity(
  labels: Int[Array, "B H W"], num: int, *, directions: int = 8
) -> Float[Array, "B S"]:
  """Area over the area of the hull in 2 x `directions` half-planes."""
  height, width = labels.shape[1:]
  angle = np.arange(directions) * np.pi / directions
  rows, columns = np.mgrid[:height, :width].reshape(2, -1)
  line = np.outer(np.sin(angle), rows) + np.outer(np.cos(angle), columns)
  line = jnp.asarray(line, jnp.float32)[None, None]
  own = jnp.moveaxis(_members(labels, num).reshape(len(labels), -1, num), 2, 1)
  inside = own[:, :, None] > 0
  high = jnp.max(jnp.where(inside, line, -jnp.inf), axis=-1, keepdims=True)
  low = jnp.min(jnp.where(inside, line, jnp.inf), axis=-1, keepdims=True)
  hull = jnp.all((line <= high) & (line >= low), axis=2)
  area = jnp.sum(hull.astype(jnp.float32), axis=-1)
  return jnp.sum(own, axis=-1) / jnp.maximum(area, 1.0)


def describe(
  images: Float[Array, "B H W 3"], labels: Int[Array, "B H W"], *, num: int
) -> Segments:
  """Area, place, colour and shape of every segment; absent ones have area 0."""
  height, width = labels.shape[1:]
  own = _members(labels, num)
  area = jnp.sum(own, axis=(1, 2))
  share = 1.0 / jnp.maximum(area, 1.0)
  row = jnp.arange(height, dtype=jnp.float32)
  column = jnp.arange(width, dtype=jnp.float32)
  centre = jnp.stack(
    [
      jnp.einsum("BHWS,H->BS", own, row) * share,
      jnp.einsum("BHWS,W->BS", own, column) * share,
    ],
    axis=-1,
  )
  in_row = jnp.max(own, axis=2)
  bottom = jnp.max(in_row * row[None, :, None], axis=1)
  edge = jnp.maximum(
    jnp.max(own[:, :, 0], axis=1), jnp.max(own[:, :, -1], axis=1)
  )
  edge = jnp.maximum(edge, jnp.maximum(in_row[:, 0], in_row[:, -1]))
  colour = jnp.einsum("BHWS,BHWC->BSC", own, images) * share[..., None]
  # Every second pixel: a quarter of the work, and solidity hardly changes.
  solid = solidity(labels[:, ::2, ::2], num)
  return Segments(area, centre, bottom, colour, solid, 1.0 - edge)


def _move(
  values: Float[Array, "H W C"], shift: Int[Array, " 2"], mirror: Array
) -> Float[Array, "H W C"]:
  """Shifts by whole pixels, mirrored in columns or not; zeros move in."""
  height, width = values.shape[:2]
  row = jnp.arange(height) - shift[0]
  column = jnp.arange(width) - shift[1]
  valid = ((row >= 0) & (row < height))[:, None, None] & (
    (column >= 0) & (column < width)
  )[None, :, None]
  column = jnp.where(mirror, width - 1 - column, column)
  row, column = jnp.clip(row, 0, height - 1), jnp.clip(column, 0, width - 1)
  return values[row][:, column] * valid


def _soften(mask: Float[Array, "H W 1"]) -> Float[Array, "H W 1"]:
  """Alpha of a cut-out: lower towards its rim."""
  box = jax.lax.reduce_window(
    mask, 0.0, jax.lax.add, (3, 3, 1), (1, 1, 1), "SAME"
  )
  return mask * (0.4 + 0.6 * box / 9.0)


def _place(key, target, donor, size):
  """Where a donor goes and its colour gain: contact or free placement."""
  height, width = size
  ways = jax.random.split(key, 7)
  there = target.area > 0
  touch = jax.random.bernoulli(ways[0]) & jnp.any(there)
  near = jax.random.categorical(ways[1], jnp.where(there, 0.0, -1e9))
  area, centre, colour = donor
  reach = jnp.sqrt(area / jnp.pi) + jnp.sqrt(target.area[near] / jnp.pi)
  reach = reach * jax.random.uniform(ways[2], minval=0.6, maxval=1.05)
  angle = jax.random.uniform(ways[3], maxval=2 * jnp.pi)
  way = jnp.stack([0.7 * jnp.sin(angle), jnp.cos(angle)])
  beside = target.centre[near] + reach * way
  jitter = 0.1 * height
  free = jnp.stack(
    [
      centre[0] + jax.random.uniform(ways[4], minval=-jitter, maxval=jitter),
      jax.random.uniform(ways[5], maxval=width),
    ]
  )
  same = touch & jax.random.bernoulli(ways[6])
  gain = target.colour[near] / jnp.maximum(colour, 0.05)
  gain = jnp.where(same, jnp.clip(gain, 0.2, 4.0), jnp.ones(3))
  return jnp.where(touch, beside, free), gain


class _Scene(NamedTuple):
  """An image, its labels, and which of its segments may be cut out."""

  image: Float[Array, "H W 3"]
  label: Int[Array, "H W"]
  segments: Segments
  usable: Float[Array, " S"]


class _Canvas(NamedTuple):
  """What is being pasted into."""

  image: Float[Array, "H W 3"]
  label: Int[Array, "H W"]
  exact: Float[Array, "H W"]
  bottoms: Float[Array, " L"]  # lowest row of every label


def _paste(
  key, canvas: _Canvas, wanted, target: _Scene, other: _Scene, order, *, num
) -> _Canvas:
  """One piece, of the target itself or of another scene, onto the canvas.

  Nothing is pasted if `order` has reached `wanted` or no segment is usable.
  """
  height, width = canvas.label.shape
  ways = jax.random.split(key, 7)
  own = jax.random.bernoulli(ways[0], 0.3)
  giver = jax.tree.map(lambda a, b: jnp.where(own, a, b), target, other)
  which = jax.random.categorical(
    ways[1], jnp.where(giver.usable > 0, 0.0, -1e9)
  )
  mirror = jax.random.bernoulli(ways[2])
  area, centre, bottom, colour = (
    value[which]
    for value in (
      giver.segments.area,
      giver.segments.centre,
      giver.segments.bottom,
      giver.segments.colour,
    )
  )
  column = jnp.where(mirror, width - 1 - centre[1], centre[1])
  centre = jnp.stack([centre[0], column])
  goal, gain = _place(
    ways[3], target.segments, (area, centre, colour), (height, width)
  )
  shift = jnp.round(goal - centre).astype(jnp.int32)
  piece = (giver.label == which + 1).astype(jnp.float32)[..., None]
  moved = _move(jnp.concatenate([giver.image, piece], -1), shift, mirror)
  mask = moved[..., 3:] * (giver.usable[which] * (order < wanted))
  bottom = bottom + shift[0]
  front = bottom >= canvas.bottoms[jnp.maximum(canvas.label, 0)]
  front = front ^ jax.random.bernoulli(ways[4], 0.1)
  front = front | (canvas.label <= 0)
  mask = mask * front[..., None]
  channels = jax.random.permutation(ways[5], 3)
  swap = jax.random.bernoulli(ways[6], 0.2)
  paint = moved[..., :3]
  paint = jnp.where(swap, paint[..., channels], paint)
  paint = jnp.clip(paint * gain[None, None], 0.0, 1.0)
  alpha = _soften(mask)
  return _Canvas(
    image=canvas.image * (1.0 - alpha) + paint * alpha,
    label=jnp.where(mask[..., 0] > 0, num + 1 + order, canvas.label),
    exact=jnp.maximum(canvas.exact, mask[..., 0]),
    bottoms=canvas.bottoms.at[num + 1 + order].set(bottom),
  )


def _paste_all(key, scenes: _Scene, *, pastes: int, num: int) -> _Canvas:
  """Every image of the batch as a canvas with up to `pastes` pieces.

  At each paste the batch moves on by the same number of images, and every
  image may be given a piece of the one that comes to stand beside it. The
  batch is shuffled, so that this is as good as drawing; split over devices it
  is a permute, where drawing would send the whole batch to each.
  """
  batch, height, width = scenes.label.shape
  stride = max(1, round(0.382 * batch))  # no short cycle: golden section
  few, key = jax.random.split(key)
  wanted = jax.random.randint(few, (batch,), 0, pastes + 1)
  bottoms = jnp.full((batch, num + 1 + pastes), -1.0)
  bottoms = bottoms.at[:, 1 : num + 1].set(scenes.segments.bottom)
  exact = jnp.zeros((batch, height, width))
  canvas = _Canvas(scenes.image, scenes.label, exact, bottoms)
  paste = jax.vmap(
    functools.partial(_paste, num=num), in_axes=(0, 0, 0, 0, 0, None)
  )

  def body(state, step):
    canvas, others = state
    order, key = step
    others = jax.tree.map(lambda x: jnp.roll(x, stride, axis=0), others)
    keys = jax.random.split(key, batch)
    return (paste(keys, canvas, wanted, scenes, others, order), others), None

  steps = (jnp.arange(pastes), jax.random.split(key, pastes))
  (canvas, _), _ = jax.lax.scan(body, (canvas, scenes), steps)
  return canvas


def compose(
  key: PRNGKeyArray,
  images: Float[Array, "B H W 3"],
  labels: Int[Array, "B H W"],
  *,
  num: int,
  pastes: int = 5,
  rate: float = 0.85,
  min_area: float = 0.003,
  max_area: float = 0.2,
  min_solidity: float = 0.85,
) -> Composite:
  """Pastes 0 ... `pastes` segments of the batch into each of its images.

  Args:
    key: Random key.
    images: RGB in [0, 1].
    labels: 0 background, 1 ... num segments, `IGNORE` unlabelled.
    num: Largest id; static.
    pastes: Most pieces pasted into one image.
    rate: Share of images that are pasted into.
    min_area: Smallest share of the image that a donor covers.
    max_area: Largest.
    min_solidity: Donors are at least this solid, and away from the frame.

  Returns:
    Images, labels (pasted pieces have ids num + 1 ... num + pastes) and the
    map of pixels whose label is exact.
  """
  pixels = labels.shape[1] * labels.shape[2]
  segments = describe(images, labels, num=num)
  usable = (
    (segments.area >= min_area * pixels)
    & (segments.area <= max_area * pixels)
    & (segments.solid >= min_solidity)
    & (segments.inside > 0)
  ).astype(jnp.float32)
  which, key = jax.random.split(key)
  scenes = _Scene(images, labels, segments, usable)
  pasted = _paste_all(key, scenes, pastes=pastes, num=num)
  take = jax.random.bernoulli(which, rate, (len(labels),))[:, None, None]
  return Composite(
    jnp.where(take[..., None], pasted.image, images),
    jnp.where(take, pasted.label, labels),
    jnp.where(take, pasted.exact, 0.0),
  )
