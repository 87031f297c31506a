"""What a configuration must satisfy, and how two of them differ.

Config files live in configs/ and know nothing of JAX; this module knows
which values make sense, and says so in one line that names the field.
"""

import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from spectraldiffusion_jax.config_kinds import check_kinds, check_present
from spectraldiffusion_jax.config_ranges import check_ranges
from spectraldiffusion_jax.errors import UserError

MODEL_SECTIONS = ("model.", "spectral.", "mamba_slot.", "diffusion.")
"""Sections that say what a trained model is."""

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
  "data.max_pixels",
  "mesh.",
  "model.backbone_weights",
  "training.remat",
)
"""Fields that may change between a run and its continuation: they say where
and how fast it runs and when it gives up, never what it computes."""


def flatten(config: Mapping, prefix: str = "") -> Iterator[tuple[str, Any]]:
  """Yields ("section.field", value), tuples as lists."""
  for name in sorted(config, key=str):
    value = config[name]
    if isinstance(value, (Mapping, ConfigDict)):
      yield from flatten(value, f"{prefix}{name}.")
    else:
      plain = list(value) if isinstance(value, tuple) else value
      yield prefix + name, plain


def validate(config: ConfigDict) -> None:
  """Raises a UserError that names the first field that makes no sense."""
  values = dict(flatten(config))
  check_present(values, [""])
  check_kinds(values)
  check_ranges(values)
  if config.model.num_slots == 1:
    raise UserError(
      "model.num_slots=1 is the background alone: use 2 or more, one of them"
      " for it"
    )
  if not (config.training.num_steps or config.training.num_epochs):
    raise UserError("training.num_steps and training.num_epochs are both 0")
  if config.model.backbone_scan and config.model.backbone_trainable:
    raise UserError(
      "model.backbone_scan=True freezes all blocks alike: it needs "
      "model.backbone_trainable=0"
    )
  for name in ("mesh.data", "mesh.fsdp", "mesh.model"):
    if values[name] != -1 and values[name] < 1:
      raise UserError(f"{name}={values[name]} has to be positive, or -1")
  if config.model.encoder != "unet" and not config.spectral.use_power_iteration:
    raise UserError(
      "spectral.use_power_iteration=False: only the graph of votes has a dense"
      " form; set model.encoder=unet, or leave it True"
    )
  _check_tiling(config)
  crop = values["data.crop"]
  if crop and (
    len(crop) != 4 or not 0 <= crop[0] < crop[1] or not 0 <= crop[2] < crop[3]
  ):
    raise UserError(
      f"data.crop={tuple(crop)} is not (row, row, column, column), rising"
    )


def validate_model(config: ConfigDict, *, also: tuple[str, ...] = ()) -> None:
  """The same of the sections that say what a trained model is.

  A run of an earlier version may lack fields of the others.

  Args:
    config: of a workdir.
    also: sections of which no field may be missing either, such as "data.".
  """
  values = dict(flatten(config))
  check_present(values, (*MODEL_SECTIONS, *also))
  check_kinds(values)
  check_ranges(
    {k: v for k, v in values.items() if k.startswith(MODEL_SECTIONS)}
  )
  _check_tiling(config)


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
  if model.encoder == "unet" and config.mamba_slot.key_dim < 2:
    raise UserError(
      f"mamba_slot.key_dim={config.mamba_slot.key_dim}: the votes of the unet"
      " encoder take 2"
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

  if not isinstance(values, Mapping):
    raise UserError("it is no table of fields")
  config = thaw(values)
  check_kinds(dict(flatten(config)))
  return config.lock()


def load(path: pathlib.Path) -> ConfigDict:
  """Reads what `save` wrote.

  Raises:
    UserError: there is no such file, it is not JSON, or no config.
  """
  try:
    return from_dict(json.loads(path.read_text()))
  except (FileNotFoundError, NotADirectoryError):
    raise UserError(
      f"workdir: {path} does not exist; give the folder of a training run"
    ) from None
  except UserError as error:
    raise UserError(f"workdir: {path}: {error}") from None
  except (OSError, RecursionError, TypeError, ValueError) as error:
    raise UserError(f"workdir: {path} holds no config ({error})") from None


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
