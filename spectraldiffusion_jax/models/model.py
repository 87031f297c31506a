"""SpectralDiffusion: the parts, wired.

image -> encoder -> tokens (and an instance field)
      -> spectral partition, or random slots
      -> slot attention (probabilistic or dot-product)
      -> decoder (diffusion of latents, or a mixture of pixels)
      -> masks at image resolution
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from spectraldiffusion_jax.models import em_attention
from spectraldiffusion_jax.ops import color, em, instance_field, refine
from spectraldiffusion_jax.types import (
  Features,
  Mixtures,
  ModelOutput,
  Slots,
)

Partitioner = Callable[
  [Float[Array, "B h w E"]], tuple[Float[Array, "B K N"], Bool[Array, "B K"]]
]
"""Features of a token grid -> soft assignment and active slots."""


def pool_grid(
  x: Float[Array, "B H W C"], grid: tuple[int, int]
) -> Float[Array, "B h w C"]:
  """Mean over the pixels of each token; cells may cut pixels."""
  b, height, width, c = x.shape
  h, w = grid
  if height % h or width % w:
    return jax.vmap(functools.partial(color.pool_to_grid, grid=grid))(x)
  return x.reshape(b, h, height // h, w, width // w, c).mean((2, 4))


def assign_labels(
  labels: Int[Array, "B H W"], grid: tuple[int, int], num_slots: int
) -> tuple[Float[Array, "B K N"], Bool[Array, "B K"]]:
  """Label maps -> share of each slot in each token; unlabelled = background."""
  member = jax.nn.one_hot(jnp.maximum(labels, 0), num_slots)
  share = pool_grid(member, grid)
  share = share.reshape(share.shape[0], -1, num_slots).swapaxes(1, 2)
  return share, share.sum(-1) > 0


class LearnedPrior(nn.Module):
  """One mixture of C Gaussians for the slots of all images (Kori et al.).

  Its parameters are in units of the keys' own mean and spread: a component
  born at the origin of keys that are places in the image, tens of standard
  deviations away, would need thousands of steps to come near a slot.
  """

  components: int = 64
  key_dim: int = 64
  places: bool = False  # whether the first two keys are votes

  @nn.compact
  def __call__(self) -> Mixtures:
    """Means, log-variances and logits of the components."""
    shape = (self.components, self.key_dim)
    votes = jnp.arange(self.key_dim) < (2 if self.places else 0)
    middle = jnp.where(votes, instance_field.MIDDLE, 0.0)[None]
    spread = jnp.where(votes, instance_field.SPREAD, 1.0)[None]
    mean = self.param("mean", nn.initializers.normal(1.0), shape)
    variance = self.param("log_variance", nn.initializers.zeros, shape)
    return Mixtures(
      mean=middle + spread * mean,
      variance=2 * jnp.log(spread) + variance,
      weight=self.param("logits", nn.initializers.zeros, shape[:1]),
    )


def graph_features(
  image: Float[Array, "B H W 3"],
  features: Features,
  grid: tuple[int, int],
  *,
  source: str,
) -> Float[Array, "B h w E"]:
  """What the token graph compares: colour, a backbone or the instance field.

  `colour` is CIELAB / 100; `backbone` features are centred on the image's
  mean, which all of its tokens share, and scaled to unit length;
  `field` is the chance of being foreground, the mean vote and the chroma.
  """
  if source == "backbone":
    x = features.backbone.astype(jnp.float32)
    x = x - x.mean((1, 2), keepdims=True)
    return x / jnp.sqrt((x**2).sum(-1, keepdims=True) + 1e-6)
  lab = jax.vmap(color.srgb_to_lab)(image)
  if source == "colour":
    return pool_grid(lab * jnp.array([0.7, 1.0, 1.0])[None, None, None], grid)
  chance = jax.nn.sigmoid(features.field[..., :1])
  vote = instance_field.votes(features.field)
  pooled = pool_grid(chance, grid)
  mean_vote = pool_grid(chance * vote, grid) / (pooled + 1e-6)
  chroma = pool_grid(lab[..., 1:], grid)
  return jnp.concatenate([pooled, mean_vote, chroma], -1)


def upsample(
  masks: Float[Array, "B K N"], grid: tuple[int, int], size: tuple[int, int]
) -> Float[Array, "B K H W"]:
  """Bilinear upsampling of token masks to pixels; still sums to 1 over K."""
  b, k, _ = masks.shape
  return jax.image.resize(masks.reshape(b, k, *grid), (b, k, *size), "linear")


def sharpen(
  image: Float[Array, "B H W 3"],
  masks: Float[Array, "B K H W"],
  stickiness: float,
) -> Float[Array, "B K H W"]:
  """Moves outlines to where the colour changes; see `refine.refine_pixels`."""
  height, width = image.shape[1:3]
  grid = (height // 2, width // 2)

  def one(image, masks):
    label = jax.nn.one_hot(jnp.argmax(masks, 0), masks.shape[0])
    share = pool_grid(label[None], grid)[0].reshape(-1, masks.shape[0])
    return refine.refine_pixels(
      color.srgb_to_lab(image), share, grid=grid, stickiness=stickiness
    )

  return jax.vmap(one)(image, masks)


def mirrored(
  encoder: Callable[[Float[Array, "B H W 3"]], Features],
  image: Float[Array, "B H W 3"],
) -> Features:
  """Features of images, their field averaged with that of the mirror image.

  Flipped back, a mirrored field differs in the sign of its column offsets.
  """
  both = encoder(jnp.concatenate([image, image[:, :, ::-1]]))
  field, other = jnp.split(both.field, 2)
  sign = jnp.ones(field.shape[-1]).at[2].set(-1.0)
  other = other[:, :, ::-1] * sign[None, None, None]
  return Features(tokens=both.tokens[: len(image)], field=0.5 * (field + other))


class SpectralDiffusion(nn.Module):
  """The complete model; every part is a field, chosen in build.py."""

  encoder: nn.Module  # image -> Features
  attention: nn.Module  # EMSlotAttention with a prior, else SlotAttention
  slot_dim: int  # D
  key_dim: int  # E, of keys projected from tokens where there is no field
  decoder: nn.Module | None = None  # mixture or diffusion decoder
  prior: nn.Module | None = None  # LearnedPrior: slots are Gaussians over keys
  random_slots: nn.Module | None = (
    None  # random slots; None = the spectral partition
  )
  partition: Partitioner | None = None
  source: str = "field"  # see graph_features
  tau: float = 2.0  # temperature of the pixels' E-step
  stickiness: float = 0.0  # of masks sharpened by colour; 0 = not sharpened
  mirror: bool = False  # average the field over the mirror, unless training
  weight_threshold: float = 0.0  # of light slots dropped unless training

  @nn.compact
  def __call__(
    self,
    image: Float[Array, "B H W 3"],
    labels: Int[Array, "B H W"] | None = None,
    *,
    label_slots: int = 0,
    train: bool = False,
  ) -> ModelOutput:
    """Segments images.

    Args:
      image: RGB in [0, 1].
      labels: id of the slot that each pixel starts in, in place of the
        spectral partition (training on composites); negative is unknown.
      label_slots: number of slots where labels are given.
      train: whether the decoder draws noise and predicts a target.
    """
    if self.mirror and not train:
      features = mirrored(self.encoder, image)
    else:
      features = self.encoder(image)
    grid = features.tokens.shape[1:3]
    tokens = features.tokens.reshape(len(image), -1, features.tokens.shape[-1])
    affinity = graph_features(image, features, grid, source=self.source)
    if self.random_slots is not None:
      slots, mixture = self.attention(tokens, *self.random_slots(tokens)), None
    else:
      if labels is not None:
        start = assign_labels(labels, grid, label_slots)
      else:
        start = self.partition(jax.lax.stop_gradient(affinity))
      slots, mixture = self._bind(features, tokens, grid, *start)
    if self.weight_threshold and mixture is not None and not train:
      slots = em_attention.without_light_slots(
        slots,
        mixture,
        threshold=self.weight_threshold,
        background=features.field is not None,
      )
    decoded = None
    if self.decoder is not None and (train or features.field is None):
      decoded = self.decoder(slots, image, features, train=train)
    # While training, a decoder may have painted some of the tokens only.
    shown = None if train else decoded
    return ModelOutput(
      slots=slots,
      masks=self._masks(image, features, slots, mixture, shown),
      decoded=decoded,
      field=features.field,
      mixture=mixture,
      prior=None if self.prior is None else self.prior(),
      affinity=affinity,
    )

  def reconstruct(
    self, image: Float[Array, "B H W 3"], slots: Slots, *, num_steps: int
  ) -> Float[Array, "B H W 3"]:
    """What a diffusion decoder of pixels draws from slots; see there."""
    features = self.encoder(image)
    return self.decoder.reconstruct(slots, image, features, num_steps=num_steps)

  def _bind(self, features, tokens, grid, assignment, active):
    """Slots, and their mixture where they are Gaussians."""
    if self.prior is None:
      pooled = jax.vmap(em.pool)(assignment, tokens)
      slots = nn.Dense(self.slot_dim, name="to_slots")(
        nn.LayerNorm(name="pool_norm")(pooled)
      )
      return self.attention(tokens, slots, active), None
    if features.field is None:
      keys = nn.Dense(self.key_dim, name="to_keys")(tokens)
      keys, chance = nn.LayerNorm(name="key_norm")(keys), None
    else:
      # The field answers to exact masks alone: pulled by the slots' prior and
      # decoder as well, votes of different objects drift together.
      field = jax.lax.stop_gradient(features.field)
      chance = jax.nn.sigmoid(field[..., :1])
      pixels = chance * instance_field.keys(field)
      chance = pool_grid(chance, grid)
      keys = pool_grid(pixels, grid) / (chance + 1e-6)
      keys = keys.reshape(*tokens.shape[:2], -1)
      chance = chance.reshape(tokens.shape[:2])
    return self.attention(tokens, keys, assignment, active, foreground=chance)

  def _masks(self, image, features, slots, mixture, decoded):
    """Pixel masks: of the field's E-step, else the decoder's, else of slots."""
    size, grid = image.shape[1:3], features.tokens.shape[1:3]
    if mixture is not None and features.field is not None:
      keys = instance_field.keys(features.field)
      masks = em_attention.responsibilities(
        keys.reshape(len(image), -1, keys.shape[-1]),
        mixture,
        slots.active,
        jax.nn.sigmoid(features.field[..., 0]).reshape(len(image), -1),
        tau=self.tau,
      )
      masks = masks.reshape(*masks.shape[:2], *size)
    else:
      masks = slots.attention
      # A diffusion decoder in training sees no more than some of the tokens.
      whole = decoded is not None and (
        decoded.masks.ndim == 4 or decoded.masks.shape == masks.shape
      )
      if whole and features.field is None:
        masks = decoded.masks
      masks = masks if masks.ndim == 4 else upsample(masks, grid, size)
    return sharpen(image, masks, self.stickiness) if self.stickiness else masks
