"""What a configuration must satisfy, and how two of them differ.

Config files live in configs/ and know nothing of JAX; this module knows
which values make sense, and says so in one line that names the field.
"""

import json
import logging
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from spectraldiffusion_jax.errors import UserError, choose

UNET_TILE = 16
"""Image sides are multiples of this many pixels for the U-Net."""

FREE = (
  "logging.",
  "data.data_root",
  "data.num_workers",
  "data.num_threads",
  "data.cache",
  "mesh.",
  "model.backbone_weights",
)
"""Fields that may change between a run and its continuation: they say where
and how fast it runs, never what it computes."""

ADDED = {
  "spectral.count": "auto",
  "mamba_slot.weight_threshold": 0.0,
}
"""Fields that older runs do not have yet, with the value they are given."""

CHOICES = {
  "model.encoder": ("unet", "cnn", "vit_tiny"),
  "model.slot_init": ("gaussian", "learned"),
  "model.slot_update": ("ssm", "gru"),
  "model.decoder": ("broadcast", "patch_mlp", "none"),
  "model.compute_dtype": ("float32", "bfloat16"),
  "spectral.mode": ("graph", "fused", "per_scale"),
  "spectral.count": ("auto", "threshold", "eigengap", "fixed"),
  "diffusion.denoiser": ("compositional", "cross_attention"),
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
  "diffusion.num_tokens",
  "spectral.merge",
  "mamba_slot.weight_threshold",
  "training.num_epochs",
  "training.num_steps",
  "training.warmup_epochs",
  "training.weight_decay",
  "training.grad_clip",
  "training.max_skips",
  "data.num_workers",
  "data.num_threads",
  "data.max_objects",
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
  if config.model.num_slots == 1:
    raise UserError(
      "model.num_slots=1 is the background alone: use 2 or more, one of them"
      " for it"
    )
  if not (config.training.num_steps or config.training.num_epochs):
    raise UserError("training.num_steps and training.num_epochs are both 0")
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
    raise UserError(
      f"model.dinov2_model={model.dinov2_model!r}: slots on a frozen backbone "
      "are not built yet; leave it empty (model.encoder is trained instead), "
      "or use the features themselves through load_backbone"
    )
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
  """Reads what `save` wrote; fields of ADDED that it lacks are filled in.

  Raises:
    UserError: there is no such file, or it is not JSON.
  """
  try:
    values = json.loads(path.read_text())
  except FileNotFoundError:
    raise UserError(
      f"workdir: {path} does not exist; give the folder of a training run"
    ) from None
  except json.JSONDecodeError as error:
    raise UserError(f"workdir: {path} is not valid JSON ({error})") from None
  present = dict(flatten(values))
  for name in sorted(ADDED.keys() - present.keys()):
    section, field = name.split(".")
    logging.info("%s: %s is new, set to %r", path, name, ADDED[name])
    values.setdefault(section, {})[field] = ADDED[name]
  return from_dict(values)


def override(config: ConfigDict, settings: Sequence[str]) -> ConfigDict:
  """A copy of a config with fields set from `section.field=value` texts.

  Raises:
    UserError: a field does not exist, or its value makes no sense.
  """
  values = config.to_dict()
  for text in settings:
    name, equals, value = text.partition("=")
    section, _, field = name.partition(".")
    old = values[section].get(field) if section in values else None
    if not equals or old is None or isinstance(old, (tuple, list, Mapping)):
      raise UserError(f"--set={text}: write section.field=value, one that is")
    try:
      values[section][field] = (
        {"true": True, "false": False}[value.lower()]
        if isinstance(old, bool)
        else type(old)(value)
      )
    except (KeyError, ValueError):
      raise UserError(
        f"--set={text}: {name} is a {type(old).__name__} such as {old}"
      ) from None
  changed = from_dict(values)
  validate(changed)
  return changed
