"""What a configuration must satisfy, and how two of them differ.

Config files live in configs/ and know nothing of JAX; this module knows
which values make sense, and says so in one line that names the field.
"""

import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

from spectraldiffusion_jax.errors import UserError, choose
from spectraldiffusion_jax.models.vit_variants import VARIANTS

UNET_TILE = 16
"""Image sides are multiples of this many pixels for the U-Net."""

FREE = (
  "logging.",
  "training.max_skips",
  "training.max_rollbacks",
  "data.data_root",
  "data.num_workers",
  "data.num_threads",
  "data.cache",
  "mesh.",
  "model.backbone_weights",
  "training.remat",
)
"""Fields that may change between a run and its continuation: they say where
and how fast it runs and when it gives up, never what it computes."""

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
  "logging.log_interval",
  "logging.val_interval",
  "logging.save_interval",
  "logging.keep_last",
)

NOT_NEGATIVE = (
  "seed",
  "model.backbone_size",
  "model.backbone_trainable",
  "diffusion.num_tokens",
  "spectral.merge",
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
  "composite.pastes",
  "composite.rate",
  "composite.grey_object",
  "composite.trust",
)


def flatten(config: Mapping, prefix: str = "") -> Iterator[tuple[str, Any]]:
  """Yields ("section.field", value), tuples as lists."""
  for name in sorted(config):
    value = config[name]
    if isinstance(value, (Mapping, ConfigDict)):
      yield from flatten(value, f"{prefix}{name}.")
    else:
      plain = list(value) if isinstance(value, tuple) else value
      yield prefix + name, plain


def validate(config: ConfigDict) -> None:
  """Raises a UserError that names the first field that makes no sense."""
  values = dict(flatten(config))
  for name, choices in CHOICES.items():
    choose(name, values[name], dict.fromkeys(choices))
  for name in POSITIVE:
    if not values[name] > 0:
      raise UserError(f"{name}={values[name]} has to be greater than 0")
  for name in (*NOT_NEGATIVE, *(n for n in values if "loss_weights" in n)):
    if not values[name] >= 0:
      raise UserError(f"{name}={values[name]} must not be negative")
  if not (config.training.num_steps or config.training.num_epochs):
    raise UserError("training.num_steps and training.num_epochs are both 0")
  if config.model.backbone_scan and config.model.backbone_trainable:
    raise UserError(
      "model.backbone_scan=True freezes all blocks alike: it needs "
      "model.backbone_trainable=0"
    )
  _check_tiling(config)
  crop = values["data.crop"]
  if crop and (len(crop) != 4 or crop[0] >= crop[1] or crop[2] >= crop[3]):
    raise UserError(
      f"data.crop={tuple(crop)} is not (row, row, column, column), rising"
    )


def _check_tiling(config: ConfigDict) -> None:
  """Raises a UserError if the encoder cannot take the image size."""
  model = config.model
  if model.dinov2_model:
    return  # it resizes images to what it can tile
  size, stride = model.image_size, model.token_stride
  # The U-Net halves a 2-pixel grid three times.
  tile = max(stride, UNET_TILE) if model.encoder == "unet" else stride
  if size % tile:
    near = max(tile, round(size / tile) * tile)
    raise UserError(
      f"model.image_size={size} cannot be tiled by the {model.encoder} encoder"
      f" at model.token_stride={stride}: use a multiple of {tile}, for example"
      f" {near}"
    )
  if model.encoder == "unet" and stride not in (2, 4, 8):
    raise UserError(
      f"model.token_stride={stride}: the unet encoder has tokens of 2, 4 or 8"
      " pixels"
    )


def differences(old: Mapping, new: Mapping) -> list[str]:
  """A line for each field outside FREE that differs: `field: old -> new`."""
  a, b = dict(flatten(old)), dict(flatten(new))
  missing = "absent"
  return [
    f"{name}: {a.get(name, missing)} -> {b.get(name, missing)}"
    for name in sorted(a.keys() | b.keys())
    if a.get(name, missing) != b.get(name, missing)
    and not name.startswith(FREE)
  ]


def save(config: ConfigDict, path: pathlib.Path) -> None:
  """Writes the resolved config as JSON."""
  path.write_text(json.dumps(config.to_dict(), indent=2, sort_keys=True))


def from_dict(values: Mapping[str, Any]) -> ConfigDict:
  """The locked config that `save` or a checkpoint record holds."""

  def thaw(value):
    if isinstance(value, Mapping):
      return ConfigDict({k: thaw(v) for k, v in value.items()})
    return tuple(value) if isinstance(value, list) else value

  return thaw(values).lock()


def load(path: pathlib.Path) -> ConfigDict:
  """Reads what `save` wrote.

  Raises:
    UserError: there is no such file, or it is not JSON.
  """
  try:
    return from_dict(json.loads(path.read_text()))
  except FileNotFoundError:
    raise UserError(
      f"workdir: {path} does not exist; give the folder of a training run"
    ) from None
  except json.JSONDecodeError as error:
    raise UserError(f"workdir: {path} is not valid JSON ({error})") from None
