"""Random inputs and random parameters for tests of modules."""

import jax
import jax.numpy as jnp
import numpy as np


def random(seed, *shape):
  return jnp.float32(np.random.default_rng(seed).normal(size=shape))


def init(module, *args):
  """Random parameters: initial values are where special cases would hide."""
  shapes = jax.eval_shape(module.init, jax.random.key(0), *args)
  rng = np.random.default_rng(7)

  def draw(path, leaf):
    centre = 1.0 if path[-1].key in ("scale", "skip") else 0.0
    return jnp.float32(centre + 0.3 * rng.normal(size=leaf.shape))

  return jax.tree_util.tree_map_with_path(draw, shapes)
