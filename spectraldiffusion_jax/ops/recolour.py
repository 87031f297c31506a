"""Photometric jitter of labelled scenes: whole images and single objects.

Colour is the first cue of the training-free step and the first to mislead it:
objects turned grey against their labels teach the model to use others. Pure
jax.numpy with static shapes, inside the training step.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from spectraldiffusion_jax.ops import draws

_GREY = np.array([0.299, 0.587, 0.114], np.float32)


def recolour(
  key: PRNGKeyArray,
  images: Float[Array, "B H W 3"],
  labels: Int[Array, "B H W"],
  *,
  num: int,
  grey_object: float = 0.2,
) -> Float[Array, "B H W 3"]:
  """Photometric jitter of whole images and greying of single segments.

  Of the images 10% turn grey, 20% swap channels, 15% change saturation; all
  change gamma, gain and noise. Each segment turns grey on its own with
  probability `grey_object`, so that colour is never the only cue.
  """
  batch = len(images)
  ways = jax.random.split(key, 10)
  each = (batch, 1, 1, 1)
  grey = jnp.einsum("BHWC,C->BHW", images, jnp.asarray(_GREY))[..., None]
  alone = jax.random.bernoulli(ways[0], grey_object, (batch, num + 1))
  gain = jax.random.uniform(ways[1], (batch, num + 1), minval=0.8, maxval=1.2)
  alone = alone.at[:, 0].set(False)
  index = jnp.maximum(labels, 0).reshape(batch, -1)
  turn = jnp.take_along_axis(alone, index, axis=1).reshape(grey.shape)
  tone = jnp.take_along_axis(gain, index, axis=1).reshape(grey.shape)
  images = jnp.where(turn, grey * tone, images)
  order = jax.vmap(lambda k: jax.random.permutation(k, 3))(
    jax.random.split(ways[2], batch)
  )
  swapped = jnp.take_along_axis(images, order[:, None, None], axis=-1)
  images = jnp.where(jax.random.bernoulli(ways[3], 0.2, each), swapped, images)
  amount = jax.random.uniform(ways[4], each, minval=0.2, maxval=1.5)
  chance = jax.random.uniform(ways[5], each)
  amount = jnp.where(chance < 0.1, 0.0, jnp.where(chance < 0.25, amount, 1.0))
  grey = jnp.einsum("BHWC,C->BHW", images, jnp.asarray(_GREY))[..., None]
  images = jnp.clip(grey + amount * (images - grey), 1e-3, 1.0)
  gamma = jnp.exp(0.15 * jax.random.normal(ways[6], each))
  images = images**gamma * jnp.exp(0.1 * jax.random.normal(ways[7], each))
  noise = 0.008 * draws.normal(ways[8], images.shape)
  return jnp.clip(images + noise, 0.0, 1.0)
