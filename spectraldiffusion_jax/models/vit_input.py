"""How a vision transformer of the DINO family wants its images."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from spectraldiffusion_jax.ops.resample import resize_bicubic

# The statistics of ImageNet's colours with which all of these were trained.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


def input_size(
  height: int, width: int, *, patch: int, longest: int = 0
) -> tuple[int, int]:
  """Pixels at which a backbone sees an image: multiples of its patch.

  Each side goes to its nearest multiple (ties up), at least one patch: for a
  patch of 14, 128 -> 126, 512 -> 518, 336 x 672 as it is.

  Args:
    height: of the image.
    width: of the image.
    patch: pixels a side of one token.
    longest: first scale both sides so that the longer one has this many
      pixels; 0 keeps the image's scale.
  """
  scale = longest / max(height, width) if longest else 1.0
  return tuple(
    max(1, int(side * scale / patch + 0.5)) * patch for side in (height, width)
  )


def normalised(
  image: Float[Array, "B H W 3"], *, patch: int, longest: int = 0
) -> Float[Array, "B J I 3"]:
  """RGB in [0, 1], any size -> what the backbone was trained on, float32.

  Resized to `input_size` (bicubic, antialiased, cut to [0, 1], as PIL resizes
  8-bit images), then less ImageNet's mean, over its deviation.
  """
  size = input_size(*image.shape[1:3], patch=patch, longest=longest)
  if size != image.shape[1:3]:
    image = resize_bicubic(image, size, antialias=True).clip(0, 1)
  mean, std = (jnp.asarray(x).reshape(1, 1, 1, 3) for x in (MEAN, STD))
  return (image.astype(jnp.float32) - mean) / std
