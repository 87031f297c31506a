"""From a config to its encoder: what sees the image, and what of it trains."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn
from ml_collections import ConfigDict

from spectraldiffusion_jax.models import (
  encoder,
  layers,
  ssm,
  unet,
  vit,
  vit_input,
  vit_variants,
)

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def grid_of(config: ConfigDict) -> tuple[int, int]:
  """Height and width of the token grid."""
  model = config.model
  side = model.image_size
  if not model.dinov2_model:
    return side // model.token_stride, side // model.token_stride
  patch = make_backbone(config).patch
  size = vit_input.input_size(
    side, side, patch=patch, longest=model.backbone_size
  )
  return size[0] // patch, size[1] // patch


def has_field(config: ConfigDict) -> bool:
  """Whether the encoder gives every pixel a vote and a foreground logit.

  The ViT's is trained by composites alone, so without them it has none.
  """
  model = config.model
  if model.dinov2_model:
    return False
  trained = config.composite.rounds > 0
  return model.encoder == "unet" or (model.encoder == "vit_tiny" and trained)


def make_backbone(config: ConfigDict) -> vit.Vit:
  """The pretrained vision transformer named by model.dinov2_model."""
  model = config.model
  return vit_variants.make_vit(
    model.dinov2_model,
    dtype=DTYPES[model.compute_dtype],
    tuned=model.backbone_trainable,
    scan=model.backbone_scan,
    remat=config.training.remat,
  )


def make_trainable(config: ConfigDict) -> Callable[[dict], dict] | None:
  """Which parameters train, for `optim.make_optimizer`; None = all."""
  if not config.model.dinov2_model:
    return None

  def trainable(params: dict) -> dict:
    mask = jax.tree.map(lambda _: True, params)
    mask["encoder"]["vit"] = vit_variants.tunable_mask(
      params["encoder"]["vit"], last_blocks=config.model.backbone_trainable
    )
    return mask

  return trainable


def make_encoder(config: ConfigDict) -> nn.Module:
  """The backbone of model.dinov2_model, else what model.encoder names."""
  model, dtype = config.model, DTYPES[config.model.compute_dtype]
  fusion = None
  if config.mamba_slot.use_spatial_fusion:
    fusion = layers.remat(ssm.SelectiveScan2D, config.training.remat)(
      d_state=config.mamba_slot.d_state, dtype=dtype
    )
  if model.dinov2_model:
    return encoder.BackboneEncoder(
      vit=make_backbone(config),
      features=model.backbone_features,
      size=model.backbone_size,
      fusion=fusion,
    )
  if model.encoder == "cnn":
    return encoder.CNNEncoder(
      width=model.width, stride=model.token_stride, dtype=dtype
    )
  if model.encoder == "vit_tiny":
    return _trained_vit(config)
  return unet.UNetEncoder(
    widths=tuple(round(model.width * share) for share in (1, 2, 4, 5.34)),
    stride=model.token_stride,
    embedding=config.mamba_slot.key_dim - 2,
    fusion=fusion,
    dtype=dtype,
    remat=config.training.remat,
  )


def _trained_vit(config: ConfigDict) -> encoder.ViTEncoder:
  model = config.model
  return encoder.ViTEncoder(
    vit=vit_variants.make_vit(
      "vit_tiny",
      patch=model.token_stride,
      grid=model.image_size // model.token_stride,
      depth=4,
      width=4 * model.width,
      heads=max(1, model.width // 8),
      hidden=16 * model.width,
      dtype=DTYPES[model.compute_dtype],
      remat=config.training.remat,
    ),
    field=1 + config.mamba_slot.key_dim if has_field(config) else 0,
  )
