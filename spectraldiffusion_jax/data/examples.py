"""Examples as the pipeline serves them: chosen, decoded, cropped, resized."""

import dataclasses
from typing import Any

import numpy as np

from spectraldiffusion_jax.data.sources import Source
from spectraldiffusion_jax.data.transforms import (
  Example,
  Window,
  fit,
  to_float,
)
from spectraldiffusion_jax.errors import UserError


@dataclasses.dataclass
class Examples:
  """The function from a position to its example, with an optional memory.

  Attributes:
    source: the data set.
    rows: int [n], position in the source of each example that is served.
    window: see transforms.crop.
    size: height and width.
    cached: fitted uint8 examples by position, or None to fit each time anew.
    labels: uint8 [n H W], or None.
  """

  source: Source
  rows: np.ndarray
  window: Window | None
  size: tuple[int, int]
  cached: dict[int, Example] | None
  labels: np.ndarray | None

  def __len__(self) -> int:
    return len(self.rows)

  def __getstate__(self) -> dict[str, Any]:
    # A worker process starts with an empty cache of its own.
    return {**self.__dict__, "cached": None if self.cached is None else {}}

  def __call__(self, position: int) -> Example:
    """Returns image uint8, perhaps segmentation and labels, mask and index."""
    example = {**self._fitted(int(position))}
    example["mask"] = np.bool_(True)
    example["index"] = np.int32(position)
    if self.labels is not None:
      example["labels"] = self.labels[position]
    return example

  def padded(self, position: int) -> Example:
    """As a call, and zeros with mask False, index -1 beyond the last one."""
    if position < len(self):
      return self(position)
    example = {name: np.zeros_like(value) for name, value in self(0).items()}
    return {**example, "index": np.int32(-1)}

  def _fitted(self, position: int) -> Example:
    if self.cached is not None and position in self.cached:
      return self.cached[position]
    example = self.source[int(self.rows[position])]
    fitted = fit(example, window=self.window, size=self.size)
    if self.cached is not None:
      self.cached[position] = fitted
    return fitted


def open_examples(
  source: Source,
  *,
  image_size: int | tuple[int, int],
  crop: Window | None,
  max_objects: int | None,
  cache: bool,
  labels: np.ndarray | None = None,
) -> Examples:
  """Checks the options against the source; see pipeline.make_train.

  Raises:
    UserError: an option does not fit the source.
  """
  size = (image_size,) * 2 if isinstance(image_size, int) else tuple(image_size)
  if len(size) != 2 or min(size) < 1:
    raise UserError(f"image_size={image_size}: expected a size or (H, W)")
  rows = select(source, max_objects)
  shape = (len(rows), *size)
  if labels is not None and not (
    labels.shape == shape and labels.dtype == np.uint8
  ):
    raise UserError(
      f"labels: {labels.dtype} {labels.shape}, expected uint8 {shape}"
    )
  examples = Examples(
    source=source,
    rows=rows,
    window=tuple(crop) if crop else None,
    size=size,
    cached={} if cache else None,
    labels=labels,
  )
  examples(0)  # a crop that does not fit is told now, not in some thread later
  return examples


def select(source: Source, max_objects: int | None) -> np.ndarray:
  """Returns the positions of the scenes with at most max_objects objects.

  All positions, without counting, where max_objects is None or 0.

  Raises:
    UserError: no scene is left.
  """
  if not max_objects:
    return np.arange(len(source))
  counts = source.num_objects()
  rows = np.flatnonzero(counts <= max_objects)
  if not rows.size:
    raise UserError(
      f"max_objects={max_objects} leaves no scene of {source}; the smallest has"
      f" {counts.min()} objects"
    )
  return rows


def finish(example: Example) -> Example:
  """Gives every entry the dtype that types.Batch promises."""
  finished = {**example}
  if example["image"].dtype != np.float32:
    finished["image"] = to_float(example["image"])
  if "segmentation" in example:
    finished["segmentation"] = example["segmentation"].astype(np.int32)
  return finished
