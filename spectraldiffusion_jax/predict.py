"""Own images in, pictures and label maps out."""

import pathlib
import warnings
from typing import NamedTuple

import numpy as np
from PIL import Image

from spectraldiffusion_jax import visualise
from spectraldiffusion_jax.colours import colour_masks
from spectraldiffusion_jax.data.transforms import to_rgb
from spectraldiffusion_jax.errors import UserError
from spectraldiffusion_jax.segmenter import Segmenter

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp")
SHEET = "contact_sheet.png"
SHEET_IMAGES = 24  # most images on the contact sheet


class Summary(NamedTuple):
  """What became of the images."""

  written: list[pathlib.Path]
  failed: list[tuple[pathlib.Path, str]]  # file and reason


def find_images(pattern: str) -> list[pathlib.Path]:
  """Image files of a folder (in any depth), or those a glob names.

  Raises:
    UserError: there is none.
  """
  path = pathlib.Path(pattern).expanduser()
  if path.is_dir():
    found = [p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES]
  elif path.is_file():
    found = [path]
  else:
    anchor = pathlib.Path(path.anchor or ".")
    found = [
      p for p in anchor.glob(str(path.relative_to(path.anchor))) if p.is_file()
    ]
  if not found:
    raise UserError(
      f"--images={pattern} names no image; give a folder, a file or a quoted"
      f" glob of {', '.join(SUFFIXES)}"
    )
  return sorted(found)


def read_image(path: pathlib.Path, *, max_pixels: int) -> np.ndarray:
  """RGB uint8 [H W 3] of a file of any mode; of animations the first frame.

  Raises:
    UserError: it cannot be read, or has more than `max_pixels` pixels.
  """
  try:
    with warnings.catch_warnings():
      warnings.simplefilter("error", Image.DecompressionBombWarning)
      with Image.open(path) as image:
        if image.width * image.height > max_pixels:
          raise UserError(
            f"{image.width} x {image.height} pixels are more than "
            f"--max_pixels={max_pixels}"
          )
        return to_rgb(image)
  except UserError:
    raise
  except Exception as error:  # Pillow raises a dozen kinds for broken files
    raise UserError(str(error).splitlines()[0][:200]) from None


def output_names(paths: list[pathlib.Path]) -> list[str]:
  """One file stem an image; folders and suffixes enter where stems collide."""
  stems = [path.stem for path in paths]
  return [
    stem
    if stems.count(stem) == 1
    else "-".join([*path.parts[-2:-1], stem, path.suffix[1:]])
    for path, stem in zip(paths, stems, strict=True)
  ]


def predict(
  model: Segmenter,
  paths: list[pathlib.Path],
  output: pathlib.Path,
  *,
  max_pixels: int,
  overwrite: bool,
  batch_size: int = 16,
) -> Summary:
  """Writes NAME_labels.png, NAME_masks.png, NAME_overlay.png and the sheet.

  An unreadable image is reported and skipped, the others are done.

  Raises:
    UserError: the output folder holds results already, or cannot be written.
  """
  sheet = output / SHEET
  _prepare(output, overwrite=overwrite)
  summary, shown = Summary([], []), []
  names = output_names(paths)
  for start in range(0, len(paths), batch_size):
    chunk = []
    for path, name in zip(
      paths[start : start + batch_size],
      names[start : start + batch_size],
      strict=True,
    ):
      try:
        chunk.append((name, read_image(path, max_pixels=max_pixels)))
        summary.written.append(path)
      except UserError as error:
        summary.failed.append((path, str(error)))
    found = model.segment([image for _, image in chunk])
    for (name, image), segmentation in zip(chunk, found, strict=True):
      _write_one(output, name, image, segmentation.labels)
      if len(shown) < SHEET_IMAGES:
        count = segmentation.num_segments
        shown.append((image, segmentation.labels, f"{name}: {count} segments"))
  if shown:
    images, labels, captions = zip(*shown, strict=True)
    columns = 2 if len(shown) > 1 else 1
    picture = visualise.panels(
      images, labels, captions=captions, limit=SHEET_IMAGES, columns=columns
    )
    visualise.write_png(sheet, picture)
  return summary


def _prepare(output: pathlib.Path, *, overwrite: bool) -> None:
  """Makes the output folder; refuses one that holds results."""
  if (output / SHEET).exists() and not overwrite:
    raise UserError(
      f"--output={output} holds results already; use --overwrite to replace"
      " them, or another folder"
    )
  try:
    output.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise UserError(f"--output={output}: {error.strerror}") from None


def _write_one(output, name, image, labels) -> None:
  """Label map, coloured masks and overlay of one image."""
  visualise.write_labels(output / f"{name}_labels.png", labels)
  visualise.write_png(output / f"{name}_masks.png", colour_masks(labels))
  overlay = visualise.large_overlay(
    image, labels, height=max(image.shape[0], 320)
  )
  visualise.write_png(output / f"{name}_overlay.png", overlay)
