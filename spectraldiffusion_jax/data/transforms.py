"""Colour modes, crop and resize of images and of maps of ids.

Images are resized with a filter that averages over the pixels it leaves out
(antialiased); maps of ids are never blended.
"""

from collections.abc import Mapping

import numpy as np
from PIL import Image, ImageOps

from spectraldiffusion_jax.errors import UserError

Example = dict[str, np.ndarray]
Box = tuple[float, float, float, float]  # top, bottom, left, right in pixels
Window = tuple[int, int, int, int]  # the same in whole pixels


def to_rgb(image: Image.Image | np.ndarray) -> np.ndarray:
  """Converts an image of any mode to 8-bit RGB.

  Args:
    image: a PIL image of any mode (its EXIF orientation is applied), or an
      array [H W], [H W 1], [H W 2], [H W 3] or [H W 4] (grey, grey, grey with
      alpha, RGB, RGB with alpha) of uint8 (0..255), uint16 (0..65535), bool or
      floats (0..1). Transparent pixels are laid on white.

  Returns:
    uint8 [H W 3].

  Raises:
    UserError: an array of another shape, dtype or range, or a mode that Pillow
      cannot convert.
  """
  if isinstance(image, np.ndarray):
    image = _from_array(image)
  image = ImageOps.exif_transpose(image)
  if image.mode == "I" or image.mode.startswith("I;16"):
    # 16-bit grey files; Pillow's own conversion clips them at 255. In whole
    # numbers, for floats would take eight bytes a pixel.
    grey = np.asarray(image).astype(np.int32, copy=False).clip(0, 65535)
    image = Image.fromarray(((grey + 128) // 257).astype(np.uint8))
  elif image.mode == "F":
    image = Image.fromarray(_unit_to_byte(np.asarray(image)))
  try:
    if "A" in image.getbands() or "transparency" in image.info:
      image = image.convert("RGBA")
      white = Image.new("RGBA", image.size, (255, 255, 255, 255))
      image = Image.alpha_composite(white, image)
    return np.array(image.convert("RGB"))
  except ValueError as error:
    raise UserError(f"image of mode {image.mode}: no way to RGB") from error


def _from_array(image: np.ndarray) -> Image.Image:
  if image.ndim == 2:
    image = image[..., None]
  if image.ndim != 3 or image.shape[2] not in (1, 2, 3, 4) or not image.size:
    raise UserError(
      f"image of shape {image.shape}; expected [H W] or [H W C] with C in 1..4"
    )
  if image.dtype == np.bool_ or np.issubdtype(image.dtype, np.floating):
    image = _unit_to_byte(image)
  elif image.dtype == np.uint16:
    image = _to_byte(image / 257)
  elif image.dtype != np.uint8:
    raise UserError(
      f"image of dtype {image.dtype}; expected uint8, uint16, bool or float"
    )
  return Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)


def _unit_to_byte(values: np.ndarray) -> np.ndarray:
  if not ((values >= 0) & (values <= 1)).all():
    raise UserError("image of floats outside [0, 1]; scale it, or use uint8")
  return _to_byte(values * np.float32(255))


def _to_byte(values: np.ndarray) -> np.ndarray:
  return values.round().clip(0, 255).astype(np.uint8)


def resize_image(
  image: np.ndarray, size: tuple[int, int], *, box: Box | None = None
) -> np.ndarray:
  """Resizes an image, averaging where it shrinks (bilinear, antialiased).

  Args:
    image: uint8 [H W 3].
    size: new height and width.
    box: part of the image that is kept; everything by default.

  Returns:
    uint8 [*size 3].
  """
  box = box or _whole(image)
  if size == image.shape[:2] and box == _whole(image):
    return image
  top, bottom, left, right = box
  resized = Image.fromarray(image).resize(
    size[::-1], Image.Resampling.BILINEAR, box=(left, top, right, bottom)
  )
  return np.asarray(resized)


def resize_map(
  ids: np.ndarray,
  size: tuple[int, int],
  *,
  box: Box | None = None,
  method: str = "nearest",
) -> np.ndarray:
  """Resizes a map of ids without making new ones.

  Args:
    ids: integers [H W].
    size: new height and width.
    box: part of the map that is kept; everything by default.
    method: "nearest" takes the pixel under each new pixel's centre,
      "majority" the id that covers most of each new pixel (the smallest such
      id, where several do).

  Returns:
    Integers [*size], same dtype.

  Raises:
    UserError: unknown method.
  """
  top, bottom, left, right = box or _whole(ids)
  if method == "nearest":
    rows = _centres(top, bottom, size[0], limit=ids.shape[0])
    columns = _centres(left, right, size[1], limit=ids.shape[1])
    return ids[rows[:, None], columns]
  if method != "majority":
    raise UserError(
      f"resize method {method!r}; expected 'nearest' or 'majority'"
    )
  values = np.unique(ids)
  cover = [
    Image.fromarray((ids == value).astype(np.float32)).resize(
      size[::-1], Image.Resampling.BOX, box=(left, top, right, bottom)
    )
    for value in values
  ]
  return values[np.argmax(np.stack(cover), axis=0)]


def _centres(low: float, high: float, n: int, *, limit: int) -> np.ndarray:
  """Source pixel under the centre of each of n new pixels on [low, high)."""
  centres = low + (np.arange(n) + 0.5) * ((high - low) / n)
  return np.floor(centres).astype(np.intp).clip(0, limit - 1)


def _whole(pixels: np.ndarray) -> Box:
  return 0, pixels.shape[0], 0, pixels.shape[1]


def crop(pixels: np.ndarray, window: Window | None) -> np.ndarray:
  """Cuts rows and columns out of an image or a map.

  Args:
    pixels: [H W] or [H W C].
    window: first and end row, first and end column, as in (29, 221, 64, 256)
      for CLEVR; None keeps everything.

  Returns:
    A view of the pixels.

  Raises:
    UserError: the window is empty or does not fit.
  """
  if window is None:
    return pixels
  height, width = pixels.shape[:2]
  if len(window) != 4:
    raise UserError(
      f"crop={window}: expected (row, end row, column, end column)"
    )
  top, bottom, left, right = window
  if not (0 <= top < bottom <= height and 0 <= left < right <= width):
    raise UserError(
      f"crop={tuple(window)} (rows {top}:{bottom}, columns {left}:{right}) does"
      f" not fit an image of {height}x{width}"
    )
  return pixels[top:bottom, left:right]


def fit(
  example: Mapping[str, np.ndarray],
  *,
  window: Window | None,
  size: tuple[int, int],
) -> Example:
  """Crops and resizes a decoded example; other entries are dropped.

  Args:
    example: image uint8 [H W 3] and, if it has one, segmentation int [H W].
    window: see crop.
    size: height and width of the result; the aspect ratio follows it.

  Returns:
    image uint8 [*size 3] and segmentation [*size] (nearest).
  """
  fitted = {"image": resize_image(crop(example["image"], window), size)}
  if "segmentation" in example:
    segmentation = crop(example["segmentation"], window)
    fitted["segmentation"] = resize_map(segmentation, size)
  return fitted


def to_float(image: np.ndarray) -> np.ndarray:
  """Returns uint8 pixels as float32 in [0, 1]."""
  return image.astype(np.float32) / np.float32(255)
