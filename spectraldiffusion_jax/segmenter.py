"""The library face: load a trained model, segment images of any kind."""

import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from flax import traverse_util
from ml_collections import ConfigDict
from PIL import Image

from spectraldiffusion_jax import build, checkpoint, evaluate, train_step
from spectraldiffusion_jax import config as config_lib
from spectraldiffusion_jax.data.transforms import resize_image, to_rgb
from spectraldiffusion_jax.errors import UserError
from spectraldiffusion_jax.workdir import CONFIG_FILE, compare

PRETRAINED = pathlib.Path(__file__).parent / "pretrained"


class Segmentation(NamedTuple):
  """One segmented image."""

  labels: np.ndarray  # [H W] int32, slot of each pixel; 0 = background
  masks: np.ndarray  # [K h w] float32 at the model's resolution, sum 1 over K
  num_segments: int  # distinct labels; unused slots leave gaps in them


class Segmenter:
  """A trained model as a function of images.

  Attributes:
    config: the resolved config it was trained with.
    params: its parameters.
  """

  def __init__(self, config: ConfigDict, params: dict):
    self.config, self.params = config, params
    self._step = train_step.make_eval_step(build.make_model(config))
    self._masks = jax.jit(lambda params, image: self._step(params, image).masks)

  def labels(self, params: dict, image: jax.Array) -> jax.Array:
    """Label maps [B H W] uint8 of images at the model's size, traceable."""
    return evaluate.labels_of(self._step(params, image))

  def segment(
    self, images: Sequence | np.ndarray, *, batch_size: int = 16
  ) -> list[Segmentation]:
    """Segments images of any size, mode and aspect.

    Each image is stretched to the model's square, its soft masks are
    stretched back bilinearly, and every pixel goes to its largest mask.

    Args:
      images: PIL images or arrays as `data.transforms.to_rgb` takes them, of
        different sizes if need be; an array [B H W 3] is a batch.
      batch_size: images a step of the model; the last is filled up.

    Returns:
      One Segmentation an image, in order.
    """
    side = self.config.model.image_size
    out = []
    for start in range(0, len(images), batch_size):
      chunk = [to_rgb(image) for image in images[start : start + batch_size]]
      small = np.zeros((batch_size, side, side, 3), np.float32)
      for row, image in enumerate(chunk):
        small[row] = resize_image(image, (side, side)) / np.float32(255)
      masks = np.asarray(self._masks(self.params, small))
      out += [
        self._finish(mask, image.shape[:2])
        for mask, image in zip(masks, chunk, strict=False)
      ]
    return out

  def _finish(self, masks: np.ndarray, size: tuple[int, int]) -> Segmentation:
    labels = largest(masks, size)
    return Segmentation(labels, masks, len(np.unique(labels)))


def largest(masks: np.ndarray, size: tuple[int, int]) -> np.ndarray:
  """Index [H W] of the largest of masks [K h w], each stretched to `size`.

  One mask at a time: a large image never needs K copies of itself.
  """
  best = np.full(size, -np.inf, np.float32)
  labels = np.zeros(size, np.int32)
  for index, mask in enumerate(masks):
    if not mask.any():
      continue
    stretched = np.asarray(
      Image.fromarray(mask.astype(np.float32)).resize(
        size[::-1], Image.Resampling.BILINEAR
      )
    )
    labels[stretched > best] = index
    best = np.maximum(best, stretched)
  return labels


def load(source: str | pathlib.Path) -> Segmenter:
  """Loads a model.

  Args:
    source: a workdir, for its newest checkpoint; `WORKDIR@best` for the one
      that validated best, `WORKDIR@STEP` for another; or `pretrained:NAME`.

  Raises:
    UserError: there is no such model, or it is damaged.
  """
  source = str(source)
  if source.startswith("pretrained:"):
    return _load_pretrained(source.removeprefix("pretrained:"))
  name, _, which = source.partition("@")
  folder = pathlib.Path(name).expanduser().absolute()
  config = config_lib.load(folder / CONFIG_FILE)
  config_lib.validate_model(config)
  return Segmenter(config, _restore_params(folder, config, which))


def _restore_params(folder, config, which: str) -> dict:
  """Parameters of a workdir's checkpoint, verified as a resume would."""
  state = build.abstract_state(config)
  if not (folder / checkpoint.FOLDER).is_dir():
    raise UserError(f"--workdir={folder} holds no checkpoint yet")
  with checkpoint.Checkpoints(
    folder, best_metric=config.logging.keep_best, read_only=True
  ) as checkpoints:
    if not which or which == "latest":
      restored = checkpoints.restore_latest(state)
      if restored is None:
        raise UserError(f"--workdir={folder} holds no checkpoint yet")
    else:
      restored = _restore_step(folder, checkpoints, which, state)
  # The record is verified, the file is not: a flipped bit in it is found.
  compare(folder, restored[1]["config"], config)
  return restored[0].params


def _restore_step(folder, checkpoints, which: str, state) -> tuple:
  """State and record of `best` or of a step given as text."""
  steps = checkpoints.steps()
  step = checkpoints.best_step() if which == "best" else which
  if str(step) not in map(str, steps):
    raise UserError(f"--workdir={folder}@{which}: there are @best, {steps}")
  try:
    return checkpoints.restore(int(step), state)
  except UserError:
    raise
  except Exception as error:  # Orbax raises bare Exception for bad files
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    raise UserError(
      f"--workdir={folder}@{which} is damaged ({reason[:200]}); there are"
      f" @best, {steps}"
    ) from None


def save_pretrained(segmenter: Segmenter, folder: pathlib.Path) -> None:
  """Writes config and parameters (float16) as a publishable folder."""
  folder.mkdir(parents=True, exist_ok=True)
  config_lib.save(segmenter.config, folder / CONFIG_FILE)
  flat = traverse_util.flatten_dict(segmenter.params, sep="/")
  np.savez_compressed(
    folder / "params.npz",
    **{name: np.asarray(value, np.float16) for name, value in flat.items()},
  )


def _load_pretrained(name: str) -> Segmenter:
  there = {p.name: p for p in PRETRAINED.glob("*") if p.is_dir()}
  if name not in there:  # and so never a path that leads elsewhere
    raise UserError(
      f"pretrained:{name} does not exist; there are: "
      f"{', '.join(sorted(there)) or '-'}"
    )
  folder = there[name]
  config = config_lib.load(folder / CONFIG_FILE)
  config_lib.validate_model(config)
  wanted = traverse_util.flatten_dict(
    build.abstract_state(config).params, sep="/"
  )
  try:
    with np.load(folder / "params.npz", allow_pickle=False) as stored:
      names = sorted(set(stored.files) ^ set(wanted))
      flat = {key: np.float32(stored[key]) for key in wanted.keys() - names}
  except Exception as error:  # numpy and zipfile raise many kinds
    raise UserError(f"pretrained:{name} is damaged ({error})") from None
  names += [k for k in flat if flat[k].shape != wanted[k].shape]
  if names:
    raise UserError(f"pretrained:{name} does not fit its config: {names[0]}")
  return Segmenter(config, traverse_util.unflatten_dict(flat, sep="/"))
