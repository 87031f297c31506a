"""Letter legend and the structs that cross module boundaries.

Every shape in this package is written in these capitals, in types, einsums
and comments alike:

  B  batch                    H W  image height and width in pixels
  C  colour channels (3)      h w  token grid, N = h * w tokens
  F  encoder feature width    K    slots        D  slot width
  E  key width (the space in which slots compete for tokens)
  R  spectral rank            L    scan length  S  SSM state width
  M  heads                    P    width of a head
  T  refinement iterations    J    components of a learned mixture
  Q  graph neighbours, or tokens of a chunk
  O  objects and P points, in the renderer
  t  diffusion time in [0, 1]
"""

from typing import TypeAlias

import numpy as np
from flax import struct
from jaxtyping import Array

Batch: TypeAlias = dict[str, np.ndarray | Array]
"""One batch of the input pipeline.

image          [B H W 3] float32 in [0, 1]
segmentation   [B H W] int32, ground-truth instance id, 0 = background
                 (evaluation only: no training loss ever reads it)
mask           [B] bool, False for rows that only pad the last batch
index          [B] int32, position of the example in its split
"""


class Features(struct.PyTreeNode):
  """What an encoder hands on."""

  tokens: Array  # [B h w F] features of the token grid
  field: Array | None = None  # [B H W E] per-pixel keys, if the encoder has any
  backbone: Array | None = None  # [B h w F] pretrained features behind tokens


class Slots(struct.PyTreeNode):
  """Slots and the assignment of tokens to them."""

  slots: Array  # [B K D] content
  attention: Array  # [B K N] responsibilities, sum to 1 over K
  active: Array  # [B K] bool, False for slots that exist only as padding


class Mixtures(struct.PyTreeNode):
  """A diagonal Gaussian mixture in key space for each image."""

  mean: Array  # [B K E]
  variance: Array  # [B K E]
  weight: Array  # [B K]


class Decoded(struct.PyTreeNode):
  """A decoder's masks, and its prediction beside what it should have been."""

  masks: Array  # [B K H W] or [B K h w], sum to 1 over K
  prediction: Array  # [B ... C] reconstruction or denoised latents
  target: Array  # like prediction
  weight: Array  # [B] loss weight of each example (1 for pixels)
  swapped: Array | None = None  # some tokens, from another image's slots


class ModelOutput(struct.PyTreeNode):
  """Everything losses, metrics and pictures may want to see."""

  slots: Slots
  masks: Array  # [B K H W] the segmentation, sums to 1 over K
  decoded: Decoded | None = None
  field: Array | None = None  # [B H W 3+E] instance field
  mixture: Mixtures | None = None  # slots as Gaussians over keys
  prior: Mixtures | None = None  # [1 C E] the learned mixture of all slots
  affinity: Array | None = None  # [B N E] features the graph is built on
