"""Own images in, pictures and label maps out."""

import collections
import os
import pathlib
import warnings
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from spectraldiffusion_jax import visualise
from spectraldiffusion_jax.colours import colour_masks
from spectraldiffusion_jax.data.images import read_rgb
from spectraldiffusion_jax.errors import UserError, one_line
from spectraldiffusion_jax.segmenter import Segmenter
from spectraldiffusion_jax.sheet import fit

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp")
RESULTS = ("_labels.png", "_masks.png", "_overlay.png")
SHEET = "contact_sheet.png"
SHEET_IMAGES = 24  # most images on the contact sheet
THUMBNAIL = 256  # pixels, height of an image kept for the sheet
LONGEST_STEM = 200  # bytes; file systems end at 255 for the whole name


class Summary(NamedTuple):
  """What became of the images."""

  written: list[pathlib.Path]
  failed: list[tuple[pathlib.Path, str]]  # file and reason


def find_images(pattern: str, *, output: pathlib.Path) -> list[pathlib.Path]:
  """Image files of a folder (in any depth), or those a glob names.

  Earlier results that lie in `output` are no input.

  Raises:
    UserError: there is none, or the pattern is no pattern.
  """
  try:
    found = [p for p in _matches(pattern) if not _is_result(p, output)]
  except (OSError, ValueError, RuntimeError, NotImplementedError) as error:
    raise UserError(f"--images={pattern}: {error}") from None
  if not found:
    raise UserError(
      f"--images={pattern} names no image; give a folder, a file or a quoted"
      f" glob of {', '.join(SUFFIXES)}"
    )
  return sorted(found)


def _matches(pattern: str) -> list[pathlib.Path]:
  path = pathlib.Path(pattern).expanduser()
  if path.is_dir():
    found = [p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES]
    return [p for p in found if not p.is_dir()]
  if path.exists():
    return [path]
  anchor = pathlib.Path(path.anchor or ".")
  return list(anchor.glob(str(path.relative_to(path.anchor))))


def _is_result(path: pathlib.Path, output: pathlib.Path) -> bool:
  named = path.name == SHEET or path.name.endswith(RESULTS)
  return named and path.parent.resolve() == output.resolve()


def output_names(paths: list[pathlib.Path]) -> list[str]:
  """One file stem an image, no two alike.

  Folder and suffix enter where stems collide, and a number where those do.
  Upper and lower case count as one: not every file system tells them apart.
  """
  stems = [_short(path.stem) for path in paths]
  times = collections.Counter(stem.casefold() for stem in stems)
  taken = {stem for stem, count in times.items() if count == 1}
  names = []
  for path, stem in zip(paths, stems, strict=True):
    name = stem
    if times[stem.casefold()] > 1:
      base = _short("-".join([*path.parts[-2:-1], stem, path.suffix[1:]]))
      name, number = base, 2
      while name.casefold() in taken:
        name, number = f"{base}-{number}", number + 1
      taken.add(name.casefold())
    names.append(name)
  return names


def _short(stem: str) -> str:
  name = os.fsencode(stem)
  if len(name) <= LONGEST_STEM:
    return stem
  return name[:LONGEST_STEM].decode(errors="ignore")


def check_output(
  paths: list[pathlib.Path], output: pathlib.Path, *, overwrite: bool
) -> None:
  """Refuses to replace what is there; before any work, and writes nothing.

  Raises:
    UserError: `output` is no folder, a result is there already and may not be
      overwritten, or would replace an image that is to be read.
  """
  if os.path.lexists(output) and not output.is_dir():
    raise UserError(f"--output={output} is no folder; choose another name")
  if not output.is_dir():
    return
  inputs = {path.resolve() for path in paths}
  names = [name + end for name in output_names(paths) for end in RESULTS]
  there = {entry.name for entry in os.scandir(output)}
  for name in [SHEET, *names]:
    if name not in there:
      continue
    target = output / name
    if target.resolve() in inputs or target.is_dir():
      raise UserError(
        f"--output={output}: {name} is an image to be read, or a folder; choose"
        " another folder"
      )
    if not overwrite:
      raise UserError(
        f"--output={output} holds {name} already; use --overwrite to replace"
        " it, or another folder"
      )


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

  An unreadable image is reported and skipped, the others are done. At most
  about `max_pixels` of decoded images are held at a time.

  Raises:
    UserError: as `check_output`, or the folder cannot be written.
  """
  check_output(paths, output, overwrite=overwrite)
  summary, shown = Summary([], []), []
  try:
    output.mkdir(parents=True, exist_ok=True)
    for chunk in _chunks(paths, summary, max_pixels, batch_size):
      found = model.segment([image for _, image in chunk])
      for (name, image), segmentation in zip(chunk, found, strict=True):
        _write_one(output, name, image, segmentation.labels)
        if len(shown) < SHEET_IMAGES:
          caption = one_line(f"{name}: {segmentation.num_segments} segments")
          shown.append((*_thumbnail(image, segmentation.labels), caption))
    if shown:
      images, labels, captions = zip(*shown, strict=True)
      columns = 2 if len(shown) > 1 else 1
      picture = visualise.panels(
        images, labels, captions=captions, limit=SHEET_IMAGES, columns=columns
      )
      visualise.write_png(output / SHEET, picture)
  except OSError as error:
    raise UserError(
      f"--output={output} cannot be written: {error.strerror or error}"
    ) from None
  return summary


def _chunks(
  paths, summary: Summary, max_pixels: int, batch_size: int
) -> Iterator[list[tuple[str, np.ndarray]]]:
  """Names and images to segment together; fills the summary."""
  chunk, pixels = [], 0
  for path, name in zip(paths, output_names(paths), strict=True):
    try:
      with warnings.catch_warnings():
        # What Pillow would add of its own is no line of this program.
        warnings.simplefilter("ignore")
        image = read_rgb(path, max_pixels=max_pixels)
    except UserError as error:
      summary.failed.append((path, str(error)))
      continue
    size = image.shape[0] * image.shape[1]
    if chunk and (len(chunk) == batch_size or pixels + size > max_pixels):
      yield chunk
      chunk, pixels = [], 0
    summary.written.append(path)
    chunk.append((name, image))
    pixels += size
  if chunk:
    yield chunk


def _thumbnail(image, labels) -> tuple[np.ndarray, np.ndarray]:
  """Both at the size the sheet shows, labels of the nearest pixel."""
  small = fit(image, height=THUMBNAIL, max_width=2 * THUMBNAIL)
  h, w = small.shape[:2]
  rows = np.arange(h) * labels.shape[0] // h
  columns = np.arange(w) * labels.shape[1] // w
  return small, labels[rows[:, None], columns]


def _write_one(output, name, image, labels) -> None:
  """Label map, coloured masks and overlay of one image."""
  visualise.write_labels(output / f"{name}_labels.png", labels)
  visualise.write_png(output / f"{name}_masks.png", colour_masks(labels))
  overlay = visualise.large_overlay(
    image, labels, height=max(image.shape[0], 320)
  )
  visualise.write_png(output / f"{name}_overlay.png", overlay)
