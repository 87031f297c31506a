"""Diffusion decoder: slots learn to denoise the latents of their image.

Latents are patches of pixels or backbone tokens, turned by a fixed
orthonormal map and whitened; the denoiser sees noised latents and slots.
Masks need one evaluation and never the sampler.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float

from spectraldiffusion_jax.models import layers
from spectraldiffusion_jax.ops import draws, noise
from spectraldiffusion_jax.types import Decoded, Features, Slots

SWAP = 4
"""One in so many denoised tokens is denoised again with other slots."""


class Whitened(NamedTuple):
  """Latents of zero mean and unit variance, and what undoes that."""

  values: Float[Array, "B N C"]
  mean: Float[Array, "1 1 C"]
  std: Float[Array, "1 1 C"]


def whiten(x: Float[Array, "B N C"]) -> Whitened:
  """Zero mean and unit variance of each channel over the batch's tokens."""
  x = jax.lax.stop_gradient(x)
  mean = x.mean((0, 1), keepdims=True)
  std = jnp.sqrt(((x - mean) ** 2).mean((0, 1), keepdims=True) + 1e-4)
  return Whitened((x - mean) / std, mean, std)


@functools.lru_cache(maxsize=4)
def _basis(width: int, dim: int) -> np.ndarray:
  """Columns [width dim] of one random orthonormal map, always the same."""
  # On the host, once: under jit it would be decomposed anew at every step.
  draw = np.random.RandomState(0).standard_normal((width, width))
  return np.linalg.qr(draw)[0][:, :dim].astype(np.float32)


def latents(
  image: Float[Array, "B H W 3"],
  features: Features,
  *,
  source: str,
  latent_dim: int,
) -> Whitened:
  """What is denoised, unit variance a channel and no gradient.

  `pixels` are the patch of each token, `backbone` its pretrained features; what
  is wider than `latent_dim` is projected to a fixed orthonormal basis of it.
  """
  if source == "pixels":
    x = layers.space_to_depth(image, _stride(image, features))
  else:
    x = features.backbone.astype(jnp.float32)
  x = x.reshape(len(image), -1, x.shape[-1])
  width = x.shape[-1]
  if width > latent_dim:
    x = x @ _basis(width, latent_dim)
  return whiten(x)


def pixels(
  x: Float[Array, "B N C"],
  goal: Whitened,
  image: Float[Array, "B H W 3"],
  features: Features,
) -> Float[Array, "B H W 3"]:
  """Undoes `latents` of pixels: the image in [0, 1] nearest to latents x."""
  stride = _stride(image, features)
  x = x * goal.std + goal.mean
  width = 3 * stride**2
  if x.shape[-1] < width:
    x = x @ _basis(width, x.shape[-1]).T
  grid = features.tokens.shape[1:3]
  x = layers.depth_to_space(x.reshape(len(x), *grid, -1), stride)
  return jnp.clip(x, 0.0, 1.0)


def _stride(image, features) -> int:
  """Pixels a side of a token."""
  return image.shape[1] // features.tokens.shape[1]


class DiffusionDecoder(nn.Module):
  """Predicts v at a random one of T_d noise levels (Salimans & Ho 2022)."""

  denoiser: nn.Module
  source: str = "pixels"  # pixels | backbone
  latent_dim: int = 256
  num_timesteps: int = 50
  num_tokens: int = 256  # tokens a step that are denoised; 0 = all of them

  @nn.compact
  def __call__(
    self,
    slots: Slots,
    image: Float[Array, "B H W 3"],
    features: Features,
    *,
    train: bool = False,
  ) -> Decoded:
    """Training: a noised prediction. Else: masks and x_0 from pure noise.

    In training a second prediction, of every SWAP-th token and without a
    gradient, sees another image's slots: it says what slots are good for.
    """
    x0 = self._latents(image, features).values
    b, n, _ = x0.shape
    place = self._place(features)
    if not train:
      v, masks = self.denoiser(jnp.zeros_like(x0), jnp.ones(b), slots, place)
      return Decoded(masks=masks, prediction=-v, target=x0, weight=jnp.ones(b))
    pick, level, draw = jax.random.split(self.make_rng("noise"), 3)
    if self.num_tokens and self.num_tokens < n:
      some = jax.random.choice(pick, n, (self.num_tokens,), replace=False)
      x0, place = x0[:, some], place[:, some]
      slots = slots.replace(attention=slots.attention[:, :, some])
    t = jax.random.randint(level, (b,), 1, self.num_timesteps + 1)
    t = t / self.num_timesteps
    alpha, sigma = noise.cosine(t)
    eps = draws.normal(draw, x0.shape)
    noised = noise.add_noise(x0, eps, alpha, sigma)
    v, masks = self.denoiser(noised, t, slots, place)
    swapped = None
    if b > 1:
      other = jax.tree.map(
        lambda x: jax.lax.stop_gradient(jnp.roll(x, 1, axis=0)), slots
      )
      other = other.replace(attention=other.attention[:, :, ::SWAP])
      some, where = noised[:, ::SWAP], place[:, ::SWAP]
      swapped, _ = self.denoiser(some, t, other, where)
      swapped = noise.to_x0(swapped, some, alpha, sigma)
    return Decoded(
      masks=masks,
      prediction=noise.to_x0(v, noised, alpha, sigma),
      target=x0,
      weight=noise.loss_weight(alpha, sigma),
      swapped=jax.lax.stop_gradient(swapped),
    )

  def reconstruct(
    self,
    slots: Slots,
    image: Float[Array, "B H W 3"],
    features: Features,
    *,
    num_steps: int,
    sampler: str = "dpm2m",
  ) -> Float[Array, "B H W 3"]:
    """Images drawn from noise and slots alone, `source` being pixels.

    Of the images the mean and spread of each channel over the batch are used,
    which undo the whitening, and nothing else: what slots do not hold is not
    there. Samplers are the methods of `noise.integrate`; the result is in
    [0, 1].
    """
    goal = self._latents(image, features)
    place = self._place(features)
    # The sampler is a scan, in which a bound module cannot be called.
    denoiser, variables = self.denoiser.unbind()

    def denoise(x, t):
      v, _ = denoiser.apply(variables, x, t, slots, place)
      return noise.to_x0(v, x, *noise.cosine(t))

    drawn = noise.sample(
      denoise,
      self.make_rng("noise"),
      goal.values.shape,
      num_steps=num_steps,
      method=sampler,
      num_timesteps=self.num_timesteps,
    )
    return pixels(drawn, goal, image, features)

  def _latents(self, image, features) -> Whitened:
    return latents(
      image, features, source=self.source, latent_dim=self.latent_dim
    )

  def _place(self, features) -> Float[Array, "B N 4"]:
    """The position code of every token."""
    b, *grid, _ = features.tokens.shape
    place = jnp.asarray(layers.position_grid(*grid)).reshape(1, -1, 4)
    return jnp.broadcast_to(place, (b, *place.shape[1:]))
