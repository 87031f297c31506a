"""Image files that nobody vouches for, as RGB arrays of bounded size."""

import pathlib
import threading
import warnings
from collections.abc import Callable
from typing import BinaryIO

import numpy as np
from jaxtyping import Integer, UInt8
from PIL import Image, UnidentifiedImageError

from spectraldiffusion_jax.data.transforms import to_rgb
from spectraldiffusion_jax.errors import UserError

FORMATS = ("PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP", "PPM")
"""The decoders a file may reach, whatever it is called. Pillow has forty more,
among them one that starts Ghostscript."""

_OPENING = threading.Lock()


MAX_PIXELS = 64_000_000
"""Of a file, where nothing else is said: a gigabyte or two while it is laid on
white and made RGB."""


def read_rgb(
  file: pathlib.Path | BinaryIO, *, max_pixels: int = MAX_PIXELS
) -> UInt8[np.ndarray, "H W 3"]:
  """Decodes an image file of any mode; of animations the first frame.

  EXIF orientation is applied and transparency laid on white (`to_rgb`).

  Args:
    file: path, or an open binary file.
    max_pixels: most pixels the file may declare; nothing is allocated for more.

  Raises:
    UserError: it is no image, damaged, or too large.
  """
  return _decode(file, to_rgb, max_pixels)


def read_map(
  file: pathlib.Path | BinaryIO, *, max_pixels: int = MAX_PIXELS
) -> Integer[np.ndarray, "H W"]:
  """Decodes a map of ids: grey levels or palette indices as they are.

  Raises:
    UserError: as `read_rgb`, or it has several channels.
  """
  ids = _decode(file, np.array, max_pixels)
  if ids.ndim != 2 or not np.issubdtype(ids.dtype, np.integer):
    raise UserError("is no map of whole numbers")
  return ids


def _decode(
  file: pathlib.Path | BinaryIO,
  convert: Callable[[Image.Image], np.ndarray],
  max_pixels: int,
) -> np.ndarray:
  # A named pipe would wait for a writer, and a device never end.
  if isinstance(file, pathlib.Path) and not file.is_file():
    kind = "is a folder" if file.is_dir() else "is no regular file"
    raise UserError(kind if file.exists() else "is not there")
  try:
    with _open(file, max_pixels=max_pixels) as image:
      if image.width * image.height > max_pixels:
        raise UserError(
          f"{image.width} x {image.height} pixels are more than"
          f" max_pixels={max_pixels}"
        )
      return convert(image)
  except UserError:
    raise
  except UnidentifiedImageError:
    raise UserError(f"is no image of {', '.join(FORMATS)}") from None
  except Image.DecompressionBombError:
    raise UserError(
      f"declares more pixels than max_pixels={max_pixels}"
    ) from None
  except Exception as error:  # Pillow raises a dozen kinds for broken files
    reason = str(error)[:200] or type(error).__name__
    raise UserError(f"is no readable image: {reason}") from None


def _open(file, *, max_pixels: int) -> Image.Image:
  """Reads the header, with max_pixels in the place of Pillow's own limit.

  Some decoders allocate while they read the header, and ask the limit first:
  a refusal at twice its value, a warning below.
  """
  with _OPENING, warnings.catch_warnings():
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)
    usual = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = (max_pixels + 1) // 2
    try:
      return Image.open(file, formats=FORMATS)
    finally:
      Image.MAX_IMAGE_PIXELS = usual
