"""Random flip, zoom and colours of a training example, through grain."""

import dataclasses
from collections.abc import Mapping

import grain
import numpy as np

from spectraldiffusion_jax.data.transforms import (
  Box,
  Example,
  resize_image,
  resize_map,
  to_float,
)
from spectraldiffusion_jax.errors import UserError

MAPS = ("segmentation", "labels")  # maps of ids beside the image
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601


@dataclasses.dataclass(frozen=True, kw_only=True)
class Augment(grain.transforms.RandomMap):
  """Random flip, zoom and colours of one example.

  Geometry acts on image, segmentation and labels alike.
  Every draw is made for every example, so that switching one option on does not
  change what the others draw.

  Attributes:
    flip: probability of a horizontal flip.
    crop_scale: smallest and largest part of the area that is kept, then resized
      to the whole; the aspect ratio stays. (1, 1) keeps everything.
    brightness: factor uniform in 1 +- this; likewise contrast (about the mean
      grey) and saturation (about each pixel's grey).
    contrast: see brightness.
    saturation: see brightness.
    grayscale: probability of dropping all colour.
  """

  flip: float = 0.0
  crop_scale: tuple[float, float] = (1.0, 1.0)
  brightness: float = 0.0
  contrast: float = 0.0
  saturation: float = 0.0
  grayscale: float = 0.0

  def __post_init__(self):
    for name in ("flip", "brightness", "contrast", "saturation", "grayscale"):
      if not 0 <= getattr(self, name) <= 1:
        raise UserError(
          f"augment.{name}={getattr(self, name)} is not in [0, 1]"
        )
    if len(self.crop_scale) != 2 or not (
      0 < self.crop_scale[0] <= self.crop_scale[1] <= 1
    ):
      raise UserError(
        f"augment.crop_scale={self.crop_scale} is not (low, high) with"
        " 0 < low <= high <= 1"
      )

  @classmethod
  def from_config(cls, config: Mapping[str, object]) -> "Augment":
    """Builds it from the fields of a config.

    Raises:
      UserError: unknown field.
    """
    known = [field.name for field in dataclasses.fields(cls)]
    for name in config:
      if name not in known:
        raise UserError(f"augment.{name}: unknown; choose from {known}")
    return cls(**config)

  def random_map(self, element: Example, rng: np.random.Generator) -> Example:
    """Augments image (uint8 [H W 3]), segmentation and labels ([H W])."""
    draws = rng.random(8)
    image, maps = element["image"], [name for name in MAPS if name in element]
    size = image.shape[:2]
    box = self._box(size, draws[:3])
    image = resize_image(image, size, box=box)
    changed = {name: resize_map(element[name], size, box=box) for name in maps}
    if draws[3] < self.flip:
      image = image[:, ::-1]
      changed = {name: ids[:, ::-1] for name, ids in changed.items()}
    return {**element, **changed, "image": self._colour(image, draws[4:])}

  def _box(self, size: tuple[int, int], draws: np.ndarray) -> Box:
    low, high = self.crop_scale
    side = np.sqrt(low + (high - low) * draws[0])
    top = draws[1] * (1 - side) * size[0]
    left = draws[2] * (1 - side) * size[1]
    # Rounding must not push the far edges outside.
    bottom = min(top + side * size[0], size[0])
    return top, bottom, left, min(left + side * size[1], size[1])

  def _colour(self, image: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """Returns float32 [H W 3] in [0, 1]."""
    spread = np.array([self.brightness, self.contrast, self.saturation])
    factors = 1 + spread * (2 * draws[:3] - 1)
    brightness, contrast, saturation = factors.astype(np.float32)
    image = to_float(image) * brightness
    mean = (image @ _LUMA).mean()
    image = mean + contrast * (image - mean)
    grey = (image @ _LUMA)[..., None]
    if draws[3] < self.grayscale:
      saturation = np.float32(0)
    image = grey + saturation * (image - grey)
    return image.clip(0, 1)
