"""The bypass monitor: what the diffusion decoder makes of its slots."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from spectraldiffusion_jax import diagnostics, losses
from spectraldiffusion_jax.models import diffusion_decoder
from spectraldiffusion_jax.models.denoiser import CompositionalDenoiser
from spectraldiffusion_jax.models.diffusion_decoder import DiffusionDecoder
from spectraldiffusion_jax.types import Features, Slots

BATCH, STEPS = 8, 600


class Deaf(nn.Module):
  """A denoiser that never looks at its slots."""

  @nn.compact
  def __call__(self, noised, t, slots, position):
    return nn.Dense(noised.shape[-1])(noised), slots.attention


def scene(seed=0):
  """Images of one colour each, and a slot that names the colour."""
  colour = np.random.default_rng(seed).uniform(size=(BATCH, 3))
  colour = colour.astype(np.float32)
  image = np.broadcast_to(colour[:, None, None], (BATCH, 8, 8, 3))
  slots = Slots(
    slots=jnp.asarray(colour[:, None]),
    attention=jnp.ones((BATCH, 1, 16)),
    active=jnp.ones((BATCH, 1), bool),
  )
  return slots, jnp.asarray(image), Features(tokens=jnp.zeros((BATCH, 4, 4, 1)))


def make(denoiser, seed=0):
  decoder = DiffusionDecoder(denoiser=denoiser)
  keys = {"params": jax.random.key(seed), "noise": jax.random.key(1)}
  params = jax.jit(lambda: decoder.init(keys, *scene(), train=True))()

  def decode(params, key, scene):
    return decoder.apply(params, *scene, train=True, rngs={"noise": key})

  return params, decode


def test_a_decoder_that_ignores_slots_is_found_out():
  params, decode = make(Deaf())
  decoded = decode(params, jax.random.key(2), scene())
  assert diagnostics.bypass(decoded)["bypass"] == 0
  assert np.isfinite(decoded.swapped).all()


@pytest.fixture(scope="module")
def trained():
  """Parameters after STEPS on one scene; losses and monitor on the way."""
  params, decode = make(CompositionalDenoiser(width=32, depth=2))

  def loss(params, key):
    decoded = decode(params, key, scene())
    value = losses.diffusion(decoded.prediction, decoded.target, decoded.weight)
    return value, diagnostics.bypass(decoded)["bypass"]

  tx = optax.adam(optax.cosine_decay_schedule(1e-2, STEPS))

  @jax.jit
  def train(params):
    def body(carry, key):
      params, state = carry
      (value, bypass), grads = jax.value_and_grad(loss, has_aux=True)(
        params, key
      )
      updates, state = tx.update(grads, state, params)
      return (optax.apply_updates(params, updates), state), (value, bypass)

    keys = jax.random.split(jax.random.key(3), STEPS)
    (params, _), curves = jax.lax.scan(body, (params, tx.init(params)), keys)
    return params, curves

  return train(params)


def test_a_decoder_that_uses_slots_does_worse_with_those_of_another_image(
  trained,
):
  value, bypass = trained[1]
  assert value[-20:].mean() < 0.5 * value[0]
  assert bypass[-20:].mean() > 0.5 * value[-20:].mean() > 0
  assert bypass[-20:].mean() > 3 * abs(bypass[0])


@pytest.mark.parametrize("sampler", ["ddim", "dpm2m"])
def test_images_are_drawn_from_their_slots(trained, sampler):
  decoder = DiffusionDecoder(denoiser=CompositionalDenoiser(width=32, depth=2))
  slots, image, features = scene()

  @jax.jit
  def draw(params, slots):
    return decoder.apply(
      params,
      slots,
      image,
      features,
      num_steps=10,
      sampler=sampler,
      method=decoder.reconstruct,
      rngs={"noise": jax.random.key(5)},
    )

  own = draw(trained[0], slots)
  others = draw(trained[0], jax.tree.map(lambda x: jnp.roll(x, 1, 0), slots))
  assert own.shape == image.shape and own.min() >= 0 and own.max() <= 1
  error = float(jnp.abs(own - image).mean())
  assert error < 0.1
  assert jnp.abs(others - jnp.roll(image, 1, 0)).mean() < 0.1
  assert jnp.abs(others - image).mean() > 2 * error


@pytest.mark.parametrize(("latent_dim", "exact"), [(48, True), (47, False)])
def test_pixels_undo_their_latents(latent_dim, exact):
  _, _, features = scene()
  image = np.random.default_rng(0).uniform(size=(BATCH, 16, 16, 3))
  image = jnp.asarray(image, jnp.float32)
  goal = diffusion_decoder.latents(
    image, features, source="pixels", latent_dim=latent_dim
  )
  assert goal.values.shape == (BATCH, 16, latent_dim)
  back = diffusion_decoder.pixels(goal.values, goal, image, features)
  assert np.allclose(back, image, atol=1e-5) == exact
  assert jnp.abs(back - image).mean() < 0.1


def test_the_monitor_takes_no_part_in_training():
  params, decode = make(CompositionalDenoiser(width=8, depth=2))

  def monitor(params, slots):
    own, image, features = scene()
    decoded = decode(
      params, jax.random.key(2), (own.replace(slots=slots), image, features)
    )
    return decoded.swapped.sum()

  grads = jax.grad(monitor, argnums=(0, 1))(params, scene()[0].slots)
  assert all((np.asarray(g) == 0).all() for g in jax.tree.leaves(grads))


def test_one_image_has_no_other_to_swap_with():
  params, decode = make(Deaf())
  one = jax.tree.map(lambda x: x[:1], scene())
  decoded = decode(params, jax.random.key(2), one)
  assert decoded.swapped is None and diagnostics.bypass(decoded) == {}


@pytest.mark.parametrize(
  ("bypass", "loss", "said"),
  [(0.0, 0.5, True), (0.3, 0.5, False), (0.0, 2.5, False)],
  ids=["ignored", "used", "not learned yet"],
)
def test_advice_where_slots_are_ignored(bypass, loss, said):
  lines = diagnostics.advice({"bypass": bypass, "diffusion_loss": loss})
  assert any("decoder ignores slots" in line for line in lines) == said
