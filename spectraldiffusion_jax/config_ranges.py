"""Which values every config field may have, one field at a time."""

from collections.abc import Mapping
from typing import Any

from spectraldiffusion_jax.errors import UserError, choose
from spectraldiffusion_jax.models.vit_variants import VARIANTS

CHOICES = {
  "model.encoder": ("unet", "cnn", "vit_tiny"),
  "model.dinov2_model": ("", *VARIANTS),
  "model.backbone_features": ("tokens", "keys"),
  "model.slot_init": ("gaussian", "learned"),
  "model.slot_update": ("ssm", "gru"),
  "model.decoder": ("broadcast", "patch_mlp", "none"),
  "model.compute_dtype": ("float32", "bfloat16"),
  "logging.keep_best": ("val/ari", "val/fg_ari", "val/mbo", "val/miou", ""),
  "spectral.mode": ("graph", "fused", "per_scale"),
  "spectral.count": ("auto", "threshold", "eigengap", "fixed"),
  "diffusion.denoiser": ("compositional", "cross_attention"),
  "training.remat": ("none", "dots", "full"),
}

POSITIVE = (
  "model.image_size",
  "model.num_slots",
  "model.slot_dim",
  "model.width",
  "model.num_iterations",
  "model.token_stride",
  "model.decoder_width",
  "spectral.k_per_scale",
  "spectral.knn_k",
  "spectral.sigma",
  "spectral.vote_sigma",
  "mamba_slot.d_state",
  "mamba_slot.key_dim",
  "diffusion.latent_dim",
  "diffusion.num_timesteps",
  "diffusion.num_inference_steps",
  "diffusion.width",
  "training.batch_size",
  "training.learning_rate",
  "training.gradient_accumulation",
  "data.max_pixels",
  "logging.log_interval",
  "logging.val_interval",
  "logging.save_interval",
  "logging.keep_last",
)

NOT_NEGATIVE = (
  "loss_weights.",
  "seed",
  "model.backbone_size",
  "model.backbone_trainable",
  "diffusion.num_tokens",
  "model.stickiness",
  "spectral.chroma_sigma",
  "spectral.merge",
  "mamba_slot.weight_threshold",
  "training.num_epochs",
  "training.num_steps",
  "training.warmup_epochs",
  "training.weight_decay",
  "training.grad_clip",
  "training.max_skips",
  "training.max_rollbacks",
  "training.max_loss_ratio",
  "data.num_workers",
  "data.num_threads",
  "data.max_objects",
  "logging.keep_every",
  "logging.image_interval",
  "composite.rounds",
  "composite.trust",
  "composite.pastes",
)

SHARES = (
  "augment.brightness",
  "augment.contrast",
  "augment.flip",
  "augment.grayscale",
  "augment.saturation",
  "composite.rate",
  "composite.grey_object",
  "data.extra_share",
  "spectral.count_threshold",
)
"""Probabilities and parts of a whole, 0 to 1."""


def check_ranges(values: Mapping[str, Any]) -> None:
  """Raises a UserError for the first value out of its range."""
  for name, value in values.items():
    if name in CHOICES:
      choose(name, value, dict.fromkeys(CHOICES[name]))
    elif name in POSITIVE and not value > 0:
      raise UserError(f"{name}={value} has to be greater than 0")
    elif name.startswith(NOT_NEGATIVE) and not value >= 0:
      raise UserError(f"{name}={value} must not be negative")
    elif name in SHARES and not 0 <= value <= 1:
      raise UserError(f"{name}={value} is not in 0..1")
  scales = values["spectral.scales"]
  if not scales or min(scales) < 1:
    raise UserError(
      f"spectral.scales={tuple(scales)} has to hold positive sizes"
    )
