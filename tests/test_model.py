"""The wired model: shapes, equivariance, masks, and labels as a start."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import default, procedural
from spectraldiffusion_jax import build, build_spectral, evaluate
from spectraldiffusion_jax.models import model as model_lib
from spectraldiffusion_jax.ops import instance_field
from spectraldiffusion_jax.train_state import stream_keys

SIZE, BATCH = 32, 2


def small(variant="easy", **fields):
  """The procedural config at 32 px with the narrowest parts."""
  config = procedural.get_config(variant).copy_and_resolve_references()
  with config.unlocked():
    config.model.update(
      image_size=SIZE, width=8, slot_dim=16, num_slots=5, decoder_width=8
    )
    config.mamba_slot.d_state = 4
    config.diffusion.width = 16
    for name, value in fields.items():
      section, field = name.split("__")
      config[section][field] = value
  return config


def images(seed=0):
  shape = (BATCH, SIZE, SIZE, 3)
  return np.random.default_rng(seed).uniform(size=shape).astype(np.float32)


@functools.lru_cache(maxsize=8)
def built(variant="easy", **fields):
  config = small(variant, **fields)
  model = build.make_model(config)
  labels = jnp.zeros((BATCH, SIZE, SIZE), jnp.int32)
  init = jax.jit(
    lambda: model.init(
      stream_keys(0, 0), images(), labels, label_slots=2, train=True
    )
  )
  return model, init()["params"]


def segment(model, params, image):
  run = jax.jit(
    lambda p, x: model.apply({"params": p}, x, rngs=stream_keys(0, 0))
  )
  return jax.device_get(run(params, image))


ARCHITECTURES = {
  "full": ("easy", {}),
  "baseline": ("baseline", {}),
  "random starts of Gaussian slots": (
    "easy",
    dict(model__use_spectral_init=False),
  ),
  "colour graph and GMM, mixture decoder": (
    "easy",
    dict(
      model__encoder="cnn",
      model__use_diffusion_decoder=False,
      model__decoder="broadcast",
      model__token_stride=4,
      model__slot_update="gru",
    ),
  ),
  "vit, learned slots, cross-attention denoiser": (
    "baseline",
    dict(
      model__encoder="vit_tiny",
      model__use_diffusion_decoder=True,
      model__slot_init="learned",
      diffusion__denoiser="cross_attention",
    ),
  ),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_masks_are_a_partition_of_every_pixel(name):
  variant, fields = ARCHITECTURES[name]
  model, params = built(variant, **fields)
  output = segment(model, params, images())
  assert output.masks.shape == (BATCH, 5, SIZE, SIZE)
  np.testing.assert_allclose(output.masks.sum(1), 1, atol=1e-4)
  assert (output.masks >= 0).all()
  np.testing.assert_allclose(output.slots.attention.sum(1), 1, atol=1e-4)
  labels = np.asarray(evaluate.labels_of(output))
  assert labels.dtype == np.uint8 and labels.max() < 5


@pytest.mark.parametrize(
  "image",
  [np.zeros((BATCH, SIZE, SIZE, 3)), np.full((BATCH, SIZE, SIZE, 3), np.nan)],
  ids=["constant", "nan"],
)
def test_degenerate_images_give_masks_without_raising(image):
  model, params = built()
  output = segment(model, params, image.astype(np.float32))
  assert output.masks.shape == (BATCH, 5, SIZE, SIZE)
  if np.isfinite(image).all():
    assert np.isfinite(output.masks).all()


def test_slots_follow_the_labels_they_start_from():
  model, params = built()
  labels = np.zeros((BATCH, SIZE, SIZE), np.int32)
  labels[:, 2:10, 2:10], labels[:, 15:30, 10:30] = 1, 2
  order = np.array([0, 2, 1])

  @jax.jit
  def run(labels):
    return model.apply(
      {"params": params},
      images(),
      labels,
      label_slots=3,
      train=True,
      rngs=stream_keys(0, 0),
    )

  one, two = run(labels), run(order[labels])
  np.testing.assert_allclose(
    one.slots.slots, two.slots.slots[:, order], atol=1e-4
  )
  np.testing.assert_allclose(
    one.slots.attention, two.slots.attention[:, order], atol=1e-4
  )


def test_labels_become_token_shares():
  labels = np.full((1, 4, 4), -1)
  labels[0, :2, :2], labels[0, :2, 2:] = 1, [[1, 2], [2, 2]]
  share, active = model_lib.assign_labels(jnp.asarray(labels), (2, 2), 4)
  np.testing.assert_allclose(share[0, 1], [1, 0.25, 0, 0])
  np.testing.assert_allclose(share[0, 2], [0, 0.75, 0, 0])
  np.testing.assert_array_equal(active[0], [True, True, True, False])


def test_sharpened_masks_move_to_the_colour_edge():
  image = np.full((1, 16, 16, 3), 0.2, np.float32)
  image[0, 4:12, 4:12] = [0.9, 0.1, 0.1]
  truth = image[0, ..., 0] > 0.5
  rough = np.zeros((16, 16), bool)
  rough[3:13, 4:12] = True  # two rows too high
  masks = np.stack([~rough, rough])[None].astype(np.float32)
  out = model_lib.sharpen(jnp.asarray(image), jnp.asarray(masks), 0.05)
  np.testing.assert_array_equal(np.asarray(out)[0, 1] > 0.5, truth)


def test_no_gradient_reaches_the_field_but_from_exact_masks():
  model, params = built()
  labels = np.zeros((BATCH, SIZE, SIZE), np.int32)
  labels[:, 4:20, 4:20] = 1

  def slots_only(params):
    output = model.apply(
      {"params": params},
      images(),
      labels,
      label_slots=3,
      train=True,
      rngs=stream_keys(0, 0),
    )
    return output.mixture.mean.sum() + output.decoded.prediction.sum()

  grads = jax.jit(jax.grad(slots_only))(params)
  assert not np.any(grads["encoder"]["field"]["kernel"])
  assert np.any(grads["attention"]["value"]["kernel"])


def test_bfloat16_compute_keeps_float32_parameters_and_finite_masks():
  model, params = built(model__compute_dtype="bfloat16")
  assert all(p.dtype == jnp.float32 for p in jax.tree.leaves(params))
  output = segment(model, params, images())
  assert output.masks.dtype == np.float32 and np.isfinite(output.masks).all()


def test_the_default_model_has_shapes_at_full_size():
  state = build.abstract_state(default.get_config())
  sizes = [np.prod(p.shape) for p in jax.tree.leaves(state.params)]
  assert 5e5 < sum(sizes) < 1.25e6  # within 5 MB of float32


@pytest.mark.parametrize("mirror", [True, False])
def test_field_of_a_mirror_image_is_the_mirrored_field(mirror):
  model, params = built(model__mirror=mirror)
  field = segment(model, params, images()).field
  other = segment(model, params, images()[:, :, ::-1]).field[:, :, ::-1]
  other = other * np.float32([1, 1, -1])
  assert np.allclose(field, other, atol=1e-5) == mirror


def test_the_config_says_how_slots_are_counted():
  features = np.zeros((1, 8, 8, 3), np.float32)
  features[0, 1:4, 1:4] = features[0, 5:8, 5:8] = [1.0, 2.0, 2.0]
  features[0, 5:8, 5:8, 1:] = 5.0

  def slots(count):
    run = build_spectral.make_partition(small(spectral__count=count))
    return int(jax.jit(run)(features)[1].sum())

  assert slots("auto") == slots("threshold") == 3 and slots("fixed") == 5


def test_light_slots_are_dropped_at_inference_alone():
  model, params = built(mamba_slot__weight_threshold=100.0)
  active = segment(model, params, images()).slots.active
  assert (active.sum(1) <= 2).all() and active[:, 0].all()


def test_the_prior_is_born_where_the_keys_are():
  """Else its loss drowns the others: 500 nats a key instead of 1."""
  prior = model_lib.LearnedPrior(key_dim=3, places=True)
  mixture = prior.apply(prior.init(jax.random.key(0)))
  field = jnp.zeros((1, 8, 8, 4))
  keys = instance_field.keys(field)[..., :2].reshape(-1, 2)
  mean, std = mixture.mean.mean(0), jnp.exp(mixture.variance[0] / 2)
  np.testing.assert_allclose(mean[:2], keys.mean(0), atol=8)
  np.testing.assert_allclose(std[:2], keys.std(0), rtol=0.05)
  np.testing.assert_allclose([mean[2], std[2]], [0.0, 1.0], atol=0.4)
