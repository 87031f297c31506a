"""Sheets of pictures: fitting, joining, captions.

Everything ends as one uint8 [H W 3] array, whatever the size, aspect and
number of the pictures in it: small ones are enlarged pixel by pixel, large
ones are averaged down.
"""

import functools
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Num, UInt8
from PIL import Image, ImageDraw, ImageFont

from spectraldiffusion_jax.colours import to_uint8
from spectraldiffusion_jax.errors import UserError

PAPER, INK = (255, 255, 255), (32, 34, 38)
Picture = UInt8[np.ndarray, "_ _ 3"]
AnyImage = Num[np.ndarray, "_ _ ..."]  # what `to_uint8` takes, any size


def fit(image: AnyImage, *, height: int, max_width: int) -> Picture:
  """Largest picture of the same aspect within height and max_width pixels."""
  picture = to_uint8(image)
  h, w = picture.shape[:2]
  scale = min(height / h, max_width / w)
  # Whole repeats first: enlarged pixels stay square, equal and sharp.
  repeats = math.ceil(scale)
  picture = picture.repeat(repeats, 0).repeat(repeats, 1)
  size = (max(round(w * scale), 1), max(round(h * scale), 1))
  if size == picture.shape[1::-1]:
    return picture
  resized = Image.fromarray(picture).resize(size, Image.Resampling.BOX)
  return np.asarray(resized)


def contact_sheet(
  rows: Sequence[Sequence[AnyImage | None]],
  *,
  captions: Sequence[str] = (),
  titles: Sequence[str] = (),
  height: int = 160,
  max_aspect: float = 2.0,
  columns: int = 1,
) -> Picture:
  """Rows of pictures with a caption over each row and titles on top.

  Args:
    rows: pictures, None for an empty cell; rows may differ in length.
    captions: one line a row.
    titles: one a cell of a row.
    height: of a picture, pixels.
    max_aspect: wider pictures than this are shrunk to fit.
    columns: rows are laid out in that many columns, side by side.
  """
  if not rows:
    raise UserError("contact_sheet needs at least one row of pictures")
  max_width = round(height * max_aspect)
  cells = [
    [
      _blank() if c is None else fit(c, height=height, max_width=max_width)
      for c in row
    ]
    for row in rows
  ]
  count = max(map(len, cells))
  cells = [row + [_blank()] * (count - len(row)) for row in cells]
  widths = [max(row[i].shape[1] for row in cells) for i in range(count)]
  gap = max(height // 20, 4)
  blocks = [_line(row, widths, gap) for row in cells]
  if captions:
    lines = [*captions, *[""] * len(blocks)]
    blocks = [
      join([_text(line, block.shape[1], height), block], 0, 0)
      for line, block in zip(lines, blocks, strict=False)
    ]
  columns = min(columns, len(blocks))
  per_column = math.ceil(len(blocks) / columns)
  pairs = zip(titles, widths, strict=False)
  heads = [_text(title, width, height) for title, width in pairs]
  heads += [_blank()] * (count - len(heads))
  stacks = []
  for start in range(0, len(blocks), per_column):
    stack = blocks[start : start + per_column]
    if titles:
      stack = [_line(heads, widths, gap), *stack]
    stacks.append(join(stack, 0, gap))
  return np.pad(
    join(stacks, 1, 4 * gap),
    ((gap, gap), (gap, gap), (0, 0)),
    constant_values=255,
  )


def join(pictures: Sequence[Picture], axis: int, gap: int) -> Picture:
  """Pictures in a line, gap pixels apart, smaller ones padded with paper."""
  across = 1 - axis
  extent = max(p.shape[across] for p in pictures)
  padded = []
  for i, picture in enumerate(pictures):
    pads = [(0, 0)] * 3
    pads[across] = (0, extent - picture.shape[across])
    pads[axis] = (gap if i else 0, 0)
    padded.append(np.pad(picture, pads, constant_values=255))
  return np.concatenate(padded, axis)


@functools.cache
def font(size: int) -> ImageFont.FreeTypeFont:
  """Pillow's own typeface, so that text looks alike on every machine."""
  return ImageFont.load_default(size)


def _text(line: str, width: int, height: int) -> Picture:
  """One line of text, cut with an ellipsis where it would not fit."""
  size = max(height // 11, 12)
  face = font(size)
  if face.getlength(line) > width:
    while line and face.getlength(line + "…") > width:
      line = line[:-1]
    line += "…"
  canvas = Image.new("RGB", (width, round(size * 1.35)), PAPER)
  ImageDraw.Draw(canvas).text((0, 0), line, INK, face)
  return np.asarray(canvas)


def _blank() -> Picture:
  return np.full((1, 1, 3), 255, np.uint8)


def _line(row, widths, gap) -> Picture:
  """Pictures of one row, each at the left of its column."""
  cells = [
    np.pad(c, ((0, 0), (0, w - c.shape[1]), (0, 0)), constant_values=255)
    for c, w in zip(row, widths, strict=True)
  ]
  return join(cells, 1, gap)
