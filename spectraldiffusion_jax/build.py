"""From a config to the parts of a run: model, training-free step, loss."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from spectraldiffusion_jax import objective, optim, train_state
from spectraldiffusion_jax.errors import choose
from spectraldiffusion_jax.models import (
  decoder,
  denoiser,
  diffusion_decoder,
  em_attention,
  encoder,
  slot_attention,
  slot_init,
  slot_update,
  ssm,
  unet,
  vit_variants,
)
from spectraldiffusion_jax.models import (
  model as model_lib,
)
from spectraldiffusion_jax.ops import (
  affinity,
  partition,
  pseudo_labels,
  vote_partition,
)
from spectraldiffusion_jax.train_state import TrainState
from spectraldiffusion_jax.train_step import LossFn

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def grid_of(config: ConfigDict) -> tuple[int, int]:
  """Height and width of the token grid."""
  side = config.model.image_size // config.model.token_stride
  return side, side


def make_encoder(config: ConfigDict) -> nn.Module:
  """The encoder named by model.encoder."""
  model, dtype = config.model, DTYPES[config.model.compute_dtype]
  if model.encoder == "cnn":
    return encoder.CNNEncoder(
      width=model.width, stride=model.token_stride, dtype=dtype
    )
  if model.encoder == "vit_tiny":
    side = model.image_size // model.token_stride
    return encoder.ViTEncoder(
      vit=vit_variants.make_vit(
        "vit_tiny",
        patch=model.token_stride,
        grid=side,
        depth=4,
        width=4 * model.width,
        heads=max(1, model.width // 16),
        hidden=16 * model.width,
        dtype=dtype,
      )
    )
  fusion = None
  if config.mamba_slot.use_spatial_fusion:
    fusion = ssm.SelectiveScan2D(d_state=config.mamba_slot.d_state, dtype=dtype)
  return unet.UNetEncoder(
    widths=tuple(round(model.width * share) for share in (1, 2, 4, 5.34)),
    stride=model.token_stride,
    embedding=config.mamba_slot.key_dim - 2,
    fusion=fusion,
    dtype=dtype,
  )


def make_decoder(config: ConfigDict) -> nn.Module | None:
  """The diffusion decoder, or the mixture decoder named by model.decoder."""
  model, dtype = config.model, DTYPES[config.model.compute_dtype]
  if model.use_diffusion_decoder:
    kind = choose(
      "diffusion.denoiser", config.diffusion.denoiser, denoiser.DENOISERS
    )
    return diffusion_decoder.DiffusionDecoder(
      denoiser=kind(width=config.diffusion.width, dtype=dtype),
      latent_dim=config.diffusion.latent_dim,
      num_timesteps=config.diffusion.num_timesteps,
      num_tokens=config.diffusion.num_tokens,
    )
  if model.decoder == "none":
    return None
  if model.decoder == "patch_mlp":
    return decoder.PatchMLPDecoder(
      patch=model.token_stride, width=model.decoder_width, dtype=dtype
    )
  return decoder.SpatialBroadcastDecoder(width=model.decoder_width, dtype=dtype)


def has_field(config: ConfigDict) -> bool:
  """Whether the encoder gives every pixel a vote and a foreground logit."""
  return config.model.encoder == "unet"


def make_partition(config: ConfigDict) -> model_lib.Partitioner:
  """The batched spectral step: features -> assignment [B K N], active."""
  spectral, slots = config.spectral, config.model.num_slots
  if has_field(config):
    one = functools.partial(
      vote_partition.vote_partition,
      num_slots=slots,
      sigma=spectral.vote_sigma,
      threshold=spectral.count_threshold,
    )
  else:
    options = {
      "graph": dict(sigma=spectral.sigma, tau=spectral.merge),
      "fused": dict(scales=spectral.scales, knn_k=spectral.knn_k),
      "per_scale": dict(
        scales=spectral.scales,
        knn_k=spectral.knn_k,
        k_per_scale=spectral.k_per_scale,
      ),
    }
    one = functools.partial(
      partition.spectral_partition,
      num_slots=slots,
      mode=spectral.mode,
      **options[spectral.mode],
    )

  def run(features: Float[Array, "B h w E"]):
    found = partition.over_images(one)(features)
    return found.assignment.swapaxes(1, 2), found.active

  return run


def make_graph(config: ConfigDict) -> objective.GraphFn:
  """The graph in which the consistency loss counts modularity."""
  if has_field(config):
    return functools.partial(
      vote_partition.vote_graph, sigma=config.spectral.vote_sigma
    )
  return functools.partial(affinity.stencil_graph, sigma=config.spectral.sigma)


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
  probabilistic = mamba.use_gmm_prior and model.use_spectral_init
  random_slots = None
  if not model.use_spectral_init:
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
      model_lib.LearnedPrior(key_dim=mamba.key_dim) if probabilistic else None
    ),
    random_slots=random_slots,
    partition=make_partition(config) if model.use_spectral_init else None,
    stickiness=model.stickiness,
    source="field" if has_field(config) else "colour",
  )


def make_teacher(
  config: ConfigDict, segment: Callable | None
) -> Callable[..., Array]:
  """Label maps to train on: (params, image) -> [B H W] uint8.

  Args:
    config: of the run.
    segment: (params, image) -> ModelOutput of the model as it stands, or None
      for the training-free step.
  """
  clean = functools.partial(
    pseudo_labels.pseudo_labels, num=config.model.num_slots - 1
  )
  free = make_training_free(config)

  def labels(params, image):
    if segment is None:
      found, chance = free(image).astype(jnp.int32), None
      kept = jax.vmap(clean)(found)
    else:
      output = segment(params, image)
      found = jnp.argmax(output.masks, axis=1).astype(jnp.int32)
      chance = None
      if output.field is not None:
        chance = jax.nn.sigmoid(output.field[..., 0])
      kept = jax.vmap(lambda y, c: clean(y, chance=c))(found, chance)
    return pseudo_labels.encode(kept)

  return labels


def make_training_free(
  config: ConfigDict,
) -> Callable[[Float[Array, "B H W 3"]], Array]:
  """The untrained, colour-only segmentation: images -> labels [B H W] uint8."""

  def labels(image):
    masks, _ = partition.training_free(
      image,
      num_slots=config.model.num_slots,
      grid=grid_of(config),
      sigma=config.spectral.sigma,
      tau=config.spectral.merge,
    )
    return jnp.argmax(masks, axis=0).astype(jnp.uint8)

  return partition.over_images(labels)


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
    graph_fn=make_graph(config),
    largest=segments + options.pastes,
  )


def abstract_state(config: ConfigDict) -> TrainState:
  """Shapes of a run's state, on one device: what a reader restores into."""
  side = config.model.image_size
  optimizer = optim.make_optimizer(
    optax.constant_schedule(0.0), weight_decay=0.0, grad_clip=1.0
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
