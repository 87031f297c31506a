"""What kind of value every config field holds.

Overrides on the command line have the kind of the default already; a
config.json, and the inside of a tuple, can hold anything.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from spectraldiffusion_jax.errors import UserError

LARGEST = 2**31 - 1
"""Of numbers, many of which end up in 32 bits; the seed has one bit more."""

BOOLEANS = (
  "data.augmentation",
  "data.cache",
  "logging.examples",
  "mamba_slot.use_gmm_prior",
  "mamba_slot.use_spatial_fusion",
  "model.backbone_scan",
  "model.mirror",
  "model.use_diffusion_decoder",
  "model.use_spectral_init",
  "spectral.use_power_iteration",
)

TEXTS = (
  "data.data_root",
  "data.dataset",
  "data.extra_dataset",
  "data.train_split",
  "data.val_split",
  "diffusion.denoiser",
  "logging.keep_best",
  "logging.log_dir",
  "model.backbone_features",
  "model.backbone_weights",
  "model.compute_dtype",
  "model.decoder",
  "model.dinov2_model",
  "model.encoder",
  "model.slot_init",
  "model.slot_update",
  "spectral.count",
  "spectral.mode",
  "training.remat",
)

INTEGERS = (
  "composite.pastes",
  "composite.rounds",
  "data.max_objects",
  "data.max_pixels",
  "data.num_threads",
  "data.num_workers",
  "diffusion.latent_dim",
  "diffusion.num_inference_steps",
  "diffusion.num_timesteps",
  "diffusion.num_tokens",
  "diffusion.width",
  "logging.image_interval",
  "logging.keep_every",
  "logging.keep_last",
  "logging.log_interval",
  "logging.save_interval",
  "logging.val_interval",
  "mamba_slot.d_state",
  "mamba_slot.key_dim",
  "mesh.data",
  "mesh.fsdp",
  "mesh.model",
  "model.backbone_size",
  "model.backbone_trainable",
  "model.decoder_width",
  "model.image_size",
  "model.num_iterations",
  "model.num_slots",
  "model.slot_dim",
  "model.token_stride",
  "model.width",
  "spectral.k_per_scale",
  "spectral.knn_k",
  "training.batch_size",
  "training.gradient_accumulation",
  "training.max_rollbacks",
  "training.max_skips",
  "training.num_epochs",
  "training.num_steps",
)

FLOATS = (
  "augment.brightness",
  "augment.contrast",
  "augment.flip",
  "augment.grayscale",
  "augment.saturation",
  "composite.grey_object",
  "composite.rate",
  "composite.trust",
  "data.extra_share",
  "loss_weights.diffusion",
  "loss_weights.diversity",
  "loss_weights.foreground",
  "loss_weights.gmm_prior",
  "loss_weights.reconstruction",
  "loss_weights.slot",
  "loss_weights.spectral_consistency",
  "loss_weights.vote",
  "mamba_slot.weight_threshold",
  "model.stickiness",
  "spectral.chroma_sigma",
  "spectral.count_threshold",
  "spectral.merge",
  "spectral.sigma",
  "spectral.vote_sigma",
  "training.grad_clip",
  "training.learning_rate",
  "training.max_loss_ratio",
  "training.warmup_epochs",
  "training.weight_decay",
)

SEEDS = ("seed",)
INTEGER_LISTS = ("data.crop", "spectral.scales")
FLOAT_LISTS = ("augment.crop_scale",)


def _is_boolean(value: Any) -> bool:
  return isinstance(value, bool)


def _is_text(value: Any) -> bool:
  return isinstance(value, str) and value.isprintable()


def _is_seed(value: Any) -> bool:
  whole = isinstance(value, int) and not isinstance(value, bool)
  return whole and -LARGEST <= value <= 2 * LARGEST + 1


def _is_integer(value: Any) -> bool:
  return _is_seed(value) and value <= LARGEST


def _is_float(value: Any) -> bool:
  return _is_integer(value) or (
    isinstance(value, float) and math.isfinite(value)
  )


def _is_list(value: Any) -> bool:
  return isinstance(value, (list, tuple))


KINDS = (
  (BOOLEANS, "true or false", _is_boolean),
  (TEXTS, "a printable text", _is_text),
  (SEEDS, "a whole number of 32 bits", _is_seed),
  (INTEGERS, f"a whole number up to {LARGEST}", _is_integer),
  (FLOATS, "a finite number", _is_float),
  (
    INTEGER_LISTS,
    "a list of whole numbers",
    lambda value: _is_list(value) and all(map(_is_integer, value)),
  ),
  (
    FLOAT_LISTS,
    "a list of finite numbers",
    lambda value: _is_list(value) and all(map(_is_float, value)),
  ),
)


def check_kinds(values: Mapping[str, Any]) -> None:
  """Raises a UserError for the first field whose value is of another kind.

  Args:
    values: by name, such as "model.width"; fields may be absent.
  """
  for names, kind, fits in KINDS:
    for name in names:
      if name in values and not fits(values[name]):
        raise UserError(f"{name}={values[name]!r:.100} has to be {kind}")


def check_present(values: Mapping[str, Any], sections: Iterable[str]) -> None:
  """Raises a UserError for the first known field of `sections` not there."""
  for names, _, _ in KINDS:
    for name in names:
      if name.startswith(tuple(sections)) and name not in values:
        raise UserError(f"the config has no {name}; see configs/default.py")
