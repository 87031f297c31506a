"""From a config to the parts of a run: model, training-free step, loss."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jaxtyping import Array
from ml_collections import ConfigDict

from spectraldiffusion_jax import (
  backbone,
  build_spectral,
  objective,
  optim,
  train_state,
)
from spectraldiffusion_jax.build_encoder import (
  DTYPES,
  has_field,
  make_backbone,
  make_encoder,
  make_trainable,
)
from spectraldiffusion_jax.errors import choose
from spectraldiffusion_jax.models import (
  decoder,
  denoiser,
  diffusion_decoder,
  em_attention,
  layers,
  slot_attention,
  slot_init,
  slot_update,
)
from spectraldiffusion_jax.models import (
  model as model_lib,
)
from spectraldiffusion_jax.ops import (
  pseudo_labels,
)
from spectraldiffusion_jax.train_state import TrainState, stream_keys
from spectraldiffusion_jax.train_step import LossFn


def make_decoder(config: ConfigDict) -> nn.Module | None:
  """The diffusion decoder, or the mixture decoder named by model.decoder."""
  model, dtype = config.model, DTYPES[config.model.compute_dtype]
  remat = functools.partial(layers.remat, policy=config.training.remat)
  if model.use_diffusion_decoder:
    kind = choose(
      "diffusion.denoiser", config.diffusion.denoiser, denoiser.DENOISERS
    )
    return diffusion_decoder.DiffusionDecoder(
      denoiser=remat(kind)(width=config.diffusion.width, dtype=dtype),
      source="backbone" if model.dinov2_model else "pixels",
      latent_dim=config.diffusion.latent_dim,
      num_timesteps=config.diffusion.num_timesteps,
      num_tokens=config.diffusion.num_tokens,
    )
  if model.decoder == "none":
    return None
  if model.decoder == "patch_mlp":
    return remat(decoder.PatchMLPDecoder)(
      patch=model.token_stride, width=model.decoder_width, dtype=dtype
    )
  return remat(decoder.SpatialBroadcastDecoder)(
    width=model.decoder_width, dtype=dtype
  )


def make_model(config: ConfigDict) -> model_lib.SpectralDiffusion:
  """The complete model of a validated config."""
  model, mamba = config.model, config.mamba_slot
  dtype = DTYPES[model.compute_dtype]
  cell = slot_update.CELLS[model.slot_update]
  options = {"d_state": mamba.d_state} if model.slot_update == "ssm" else {}
  cell = cell(gate_dim=mamba.key_dim, dtype=dtype, **options)
  shared = dict(
    num_iterations=model.num_iterations,
    slot_dim=model.slot_dim,
    cell=cell,
    dtype=dtype,
  )
  probabilistic = mamba.use_gmm_prior
  random_slots = None
  if not (model.use_spectral_init or probabilistic):
    inits = {
      "gaussian": slot_init.GaussianInit,
      "learned": slot_init.LearnedInit,
    }
    random_slots = inits[model.slot_init](
      num_slots=model.num_slots, slot_dim=model.slot_dim
    )
  return model_lib.SpectralDiffusion(
    encoder=make_encoder(config),
    attention=(
      em_attention.EMSlotAttention(
        spread=4.0 if has_field(config) else 0.0, **shared
      )
      if probabilistic
      else slot_attention.SlotAttention(**shared)
    ),
    slot_dim=model.slot_dim,
    key_dim=mamba.key_dim,
    decoder=make_decoder(config),
    prior=(
      model_lib.LearnedPrior(key_dim=mamba.key_dim, places=has_field(config))
      if probabilistic
      else None
    ),
    random_slots=random_slots,
    partition=None if random_slots else build_spectral.make_partition(config),
    stickiness=model.stickiness,
    mirror=model.mirror and has_field(config),
    weight_threshold=mamba.weight_threshold,
    source=build_spectral.graph_source(config),
  )


def make_cleaner(config: ConfigDict) -> Callable[..., Array]:
  """A teacher's segments made fit to train on: (labels, field) -> uint8.

  `field` is the instance field of the model that made the labels, if it has
  one; both are of a batch. See ops/pseudo_labels.py.
  """
  clean = functools.partial(
    pseudo_labels.pseudo_labels, num=config.model.num_slots - 1
  )

  def cleaned(labels, field=None):
    chance = None if field is None else jax.nn.sigmoid(field[..., 0])
    each = jax.vmap(lambda label, chance: clean(label, chance=chance))
    return pseudo_labels.encode(each(labels.astype(jnp.int32), chance))

  return cleaned


def make_reconstruct(
  config: ConfigDict, model: nn.Module
) -> Callable[..., Array] | None:
  """Images from slots: (params, image, slots) -> [B H W 3] in [0, 1].

  None unless the decoder is a diffusion of pixels.
  """
  if not config.model.use_diffusion_decoder or config.model.dinov2_model:
    return None

  def reconstruct(params, image, slots):
    return model.apply(
      {"params": params},
      image,
      slots,
      num_steps=config.diffusion.num_inference_steps,
      method="reconstruct",
      rngs=stream_keys(0, 0),
    )

  return reconstruct


def make_loss_fn(config: ConfigDict, model: nn.Module) -> LossFn:
  """The objective with the config's weights and composite options."""
  segments, options = config.model.num_slots - 1, config.composite
  composites = objective.make_composites(
    num_segments=segments,
    pastes=options.pastes,
    paste_rate=options.rate,
    grey_object=options.grey_object,
  )
  return objective.make_loss_fn(
    model,
    composites,
    weights=config.loss_weights.to_dict(),
    graph_fn=build_spectral.make_graph(config),
    largest=segments + options.pastes,
  )


def first_state(
  config: ConfigDict, init: Callable[[], TrainState]
) -> TrainState:
  """A run's first state: `init`'s, with a backbone's weights from its file.

  Raises:
    UserError: model.backbone_weights is empty, damaged or of another model.
  """
  model, weights = config.model, None
  if model.dinov2_model:
    weights = backbone.read_params(
      model.dinov2_model,
      make_backbone(config),
      model.backbone_weights,
      field="model.backbone_weights",
    )
  state = init()
  if weights is None:
    return state
  encoder = state.params["encoder"]
  encoder = encoder | {"vit": backbone.put_params(weights, encoder["vit"])}
  return state.replace(params=state.params | {"encoder": encoder})


def abstract_state(config: ConfigDict) -> TrainState:
  """Shapes of a run's state, on one device: what a reader restores into."""
  side = config.model.image_size
  optimizer = optim.make_optimizer(
    optax.constant_schedule(0.0),
    weight_decay=0.0,
    grad_clip=1.0,
    trainable=make_trainable(config),
  )
  create = functools.partial(
    train_state.create, make_model(config), optimizer, seed=0
  )
  image = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
  here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  return jax.tree.map(
    lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=here),
    jax.eval_shape(create, image),
  )
