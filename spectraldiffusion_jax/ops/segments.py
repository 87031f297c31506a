"""Connected segments of a label grid, and merging them by border contrast."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

_EXACT = "highest"


def connected_components(label: Int[Array, "h w"]) -> Int[Array, "h w"]:
  """Names each 4-connected region of equal labels by its smallest index.

  Min-propagation to the neighbours with pointer jumping: a few rounds for
  compact regions, never more than their diameter.
  """
  height, width = label.shape
  large = height * width
  right = label[:, :-1] == label[:, 1:]
  down = label[:-1] == label[1:]

  def spread(root):
    pad_right = jnp.where(right, root[:, 1:], large)
    pad_left = jnp.where(right, root[:, :-1], large)
    pad_down = jnp.where(down, root[1:], large)
    pad_up = jnp.where(down, root[:-1], large)
    best = root
    best = best.at[:, :-1].min(pad_right).at[:, 1:].min(pad_left)
    best = best.at[:-1].min(pad_down).at[1:].min(pad_up).reshape(-1)
    # A root is itself a token of the region, so its own root is as good.
    return best[best].reshape(height, width)

  def step(state):
    root, _ = state
    new = spread(root)
    return new, jnp.any(new != root)

  root = jnp.arange(large).reshape(height, width)
  return jax.lax.while_loop(lambda s: s[1], step, (root, jnp.bool_(True)))[0]


def largest_fragments(
  root: Int[Array, "h w"], features: Float[Array, "h w E"], *, limit: int
) -> Int[Array, "h w"]:
  """Numbers the `limit` largest regions by falling area and drops the rest.

  Tokens of dropped regions join, ring by ring, the kept neighbour whose
  features are nearest across the border.

  Args:
    root: Region names, as `connected_components` gives them.
    features: What nearness is measured in.
    limit: Number of regions kept.

  Returns:
    Ids in 0..limit-1, 0 for the largest.
  """
  size = root.size
  limit = min(limit, size)
  area = jnp.zeros(size, jnp.int32).at[root.reshape(-1)].add(1)
  kept = jax.lax.top_k(area, limit)[1]
  rank = jnp.full(size, -1).at[kept].set(jnp.arange(limit))
  # An empty name has area 0 and no token, so its rank is never read.
  fragment = rank[root]

  def nearest(fragment):
    best = jnp.full(fragment.shape, jnp.inf)
    chosen = fragment
    for axis in (0, 1):
      for shift in (1, -1):
        other = jnp.roll(fragment, shift, axis)
        edge = (
          jnp.arange(fragment.shape[axis])
          == (0 if shift == 1 else -1) % (fragment.shape[axis])
        )
        outside = edge[:, None] if axis == 0 else edge[None, :]
        step = jnp.sum((jnp.roll(features, shift, axis) - features) ** 2, -1)
        step = jnp.where(outside | (other < 0), jnp.inf, step)
        chosen = jnp.where(step < best, other, chosen)
        best = jnp.minimum(best, step)
    return jnp.where(fragment < 0, chosen, fragment)

  return jax.lax.while_loop(lambda f: jnp.any(f < 0), nearest, fragment)


def boundary_tables(
  fragment: Int[Array, "h w"], features: Float[Array, "h w E"], *, limit: int
) -> tuple[Float[Array, "M M"], Float[Array, "M M"]]:
  """Sums feature steps and counts token pairs along every shared border.

  Returns:
    Two symmetric tables [limit limit] with zero diagonals.
  """
  member = jax.nn.one_hot(fragment, limit)

  def along(first, second, near, far):
    step = jnp.sqrt(jnp.sum((far - near) ** 2, axis=-1))
    # One-hot matmuls: unlike a scatter-add, the same sum on every run.
    pair = jnp.stack([step, jnp.ones_like(step)])
    return jnp.einsum("hwM,khw,hwS->kMS", first, pair, second, precision=_EXACT)

  table = along(
    member[:, :-1], member[:, 1:], features[:, :-1], features[:, 1:]
  )
  table += along(member[:-1], member[1:], features[:-1], features[1:])
  table = table + jnp.swapaxes(table, 1, 2)
  table = table * (1.0 - jnp.eye(limit))[None]
  return table[0], table[1]


def merge_by_contrast(
  step: Float[Array, "M M"],
  length: Float[Array, "M M"],
  area: Float[Array, " M"],
  *,
  tau: float | Float[Array, ""],
  most: int,
  min_area: float = 2.0,
) -> Int[Array, " M"]:
  """Joins adjacent regions, lowest mean step across the border first.

  Regions under `min_area` go first whatever their contrast. Stops when the
  smallest mean step reaches `tau` and at most `most` regions remain.

  Args:
    step: Summed feature step over each shared border.
    length: Number of token pairs on each shared border.
    area: Tokens per region; 0 marks an unused row.
    tau: Contrast from which two regions count as different things.
    most: Largest number of regions left.
    min_area: Regions smaller than this always join a neighbour.

  Returns:
    For each region the index of the region it ended in.
  """
  large = 1e6
  index = jnp.arange(area.shape[0])

  def cheapest(step, length, area):
    small = jnp.minimum(area[:, None], area[None, :]) < min_area
    cost = step / jnp.maximum(length, 1.0) - large * small
    cost = jnp.where(length > 0, cost, jnp.inf)
    pair = jnp.argmin(cost)
    return cost.reshape(-1)[pair], pair

  def go_on(state):
    _, _, area, _, cost, _ = state
    wanted = (cost < tau) | (jnp.sum(area > 0) > most)
    return wanted & jnp.isfinite(cost)

  def join(state):
    step, length, area, label, _, pair = state
    keep, gone = pair // area.shape[0], pair % area.shape[0]
    lift = (index == keep).astype(step.dtype)
    left = (index != gone).astype(step.dtype)

    def fold(table):
      table = table + lift[:, None] * table[gone][None, :]
      table = table + lift[None, :] * table[:, gone][:, None]
      table = table * left[:, None] * left[None, :]
      return table.at[keep, keep].set(0.0)

    step, length = fold(step), fold(length)
    area = (area + lift * area[gone]) * left
    label = jnp.where(label == gone, keep, label)
    return step, length, area, label, *cheapest(step, length, area)

  state = (step, length, area, index, *cheapest(step, length, area))
  return jax.lax.while_loop(go_on, join, state)[3]


def merged_segments(
  label: Int[Array, "h w"],
  features: Float[Array, "h w E"],
  *,
  tau: float | Float[Array, ""],
  most: int,
  min_area: float = 2.0,
  max_fragments: int = 64,
) -> Int[Array, "h w"]:
  """Splits labels into connected regions and joins those of low contrast.

  Args:
    label: Cluster of each token; clusters need not be connected.
    features: What contrast is measured in.
    tau: Mean step across a border from which two regions stay apart.
    most: Largest number of regions left.
    min_area: Regions smaller than this always join a neighbour.
    max_fragments: Size of the merge table; smaller regions beyond it join
      their nearest neighbour first.

  Returns:
    Region ids below max_fragments, with gaps.
  """
  limit = min(max_fragments, label.size)
  root = connected_components(label)
  fragment = largest_fragments(root, features, limit=limit)
  step, length = boundary_tables(fragment, features, limit=limit)
  area = jnp.sum(jax.nn.one_hot(fragment, limit), axis=(0, 1))
  target = merge_by_contrast(
    step, length, area, tau=tau, most=most, min_area=min_area
  )
  return target[fragment]


def slot_order(share: Float[Array, "h w K"]) -> Int[Array, " K"]:
  """Order of segments: most border contact first, then by falling area.

  The segment that touches the image's rim most is taken as background. Equal
  segments go by their first token, so that the order depends on the masks
  alone and not on the order the columns came in.
  """
  slots = share.shape[-1]
  area = jnp.sum(share, axis=(0, 1))
  rim = jnp.sum(share[0] + share[-1], axis=0)
  rim += jnp.sum(share[:, 0] + share[:, -1], axis=0)
  owner = jnp.argmax(share, axis=-1).reshape(-1, 1)
  # Of an empty column argmax is 0; its area of 0 puts it last all the same.
  first = jnp.argmax(owner == jnp.arange(slots)[None, :], axis=0)
  background = jnp.lexsort((first, -rim))[0]
  # An area never exceeds the grid, so twice the grid comes first.
  lift = 2.0 * owner.shape[0] * jax.nn.one_hot(background, slots)
  return jnp.lexsort((first, -(area + lift)))
