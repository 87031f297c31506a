"""What a step reads and writes, and the random streams it draws from."""

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax import struct
from jaxtyping import Array, Float

STREAMS = ("params", "slots", "noise", "composite", "dropout")
"""Random streams; a stream's key depends on its name, the seed and the step
alone, so adding a stream never changes another one's numbers."""


WINDOW = 32
"""Steps over whose losses and gradient norms an explosion is judged."""


class TrainState(struct.PyTreeNode):
  """The whole state of a run but its place in the data."""

  step: Array  # [] int32, batches seen
  params: dict
  opt_state: optax.OptState
  recent: Float[Array, "2 window"]
  """|loss| and gradient norm of the last accepted steps, oldest first, NaN
  where there were none yet."""


def layer_names(params) -> list[str]:
  """A path such as `encoder/stem/kernel` for each leaf, in tree order."""
  return [
    jax.tree_util.keystr(path, simple=True, separator="/")
    for path, _ in jax.tree_util.tree_leaves_with_path(params)
  ]


def no_history() -> Float[Array, "2 window"]:
  """`TrainState.recent` of a run that has not begun."""
  return jnp.full((2, WINDOW), jnp.nan, jnp.float32)


def stream_keys(seed: Array | int, step: Array | int) -> dict[str, Array]:
  """One typed key for each name in STREAMS, folded with seed and step."""
  key = jax.random.fold_in(jax.random.key(seed), step)
  return {name: jax.random.fold_in(key, i) for i, name in enumerate(STREAMS)}


def create(
  model: nn.Module,
  optimizer: optax.GradientTransformation,
  image: Float[Array, "B H W 3"],
  seed: Array | int,
) -> TrainState:
  """A new state; `image` gives shapes only. Call under jit or eval_shape."""
  # Given labels stand in for the spectral step, which has no parameters.
  labels = jnp.zeros(image.shape[:3], jnp.int32)
  variables = model.init(
    stream_keys(seed, 0), image, labels, label_slots=2, train=True
  )
  params = variables["params"]
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    opt_state=optimizer.init(params),
    recent=no_history(),
  )
