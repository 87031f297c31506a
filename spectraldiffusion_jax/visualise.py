"""What a model sees and does, as pictures; PNG files of them and of labels.

Arrays in, one uint8 [H W 3] picture out, for training, figures and reports.
"""

import math
import os
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Float, Integer
from PIL import Image, ImageDraw
from scipy.optimize import linear_sum_assignment

from spectraldiffusion_jax.colours import (
  attention_maps,
  colour_masks,
  label_colours,
  overlay,
  to_uint8,
)
from spectraldiffusion_jax.errors import UserError
from spectraldiffusion_jax.metrics import contingency, overlaps
from spectraldiffusion_jax.sheet import (
  INK,
  PAPER,
  AnyImage,
  Picture,
  contact_sheet,
  fit,
  font,
  join,
)


def panels(
  images: Sequence[AnyImage],
  pred: Sequence[Integer[np.ndarray, "_ _"]],
  *,
  truth: Sequence[Integer[np.ndarray, "_ _"]] | None = None,
  reconstruction: Sequence[AnyImage] | None = None,
  attention: Sequence[Float[np.ndarray, "_ _ _"]] | None = None,
  captions: Sequence[str] = (),
  limit: int = 8,
  height: int = 128,
  columns: int = 1,
) -> Picture:
  """What a model sees and does: one row an image.

  Input, truth, predicted masks, masks over the input, reconstruction and the
  attention of every slot, framed in its slot's colour; what is not given is
  left out. With a truth, predicted segments take the colour of the true
  segment they match best, so that equal colours mean agreement.

  Args:
    images: inputs, a list of any sizes or one [B ...] array; so are all below.
    pred: predicted labels, slot indices.
    truth: true labels.
    reconstruction: decoded images.
    attention: responsibilities of each slot.
    captions: one line an image, such as its name and FG-ARI.
    limit: most images shown.
    height: of a picture, pixels.
    columns: rows are laid out in that many columns, side by side.
  """
  rows, widest = [], 2.0
  for i in range(min(len(images), limit)):
    names = {int(label): int(label) for label in np.unique(pred[i])}
    row = {"input": images[i]}
    if truth is not None:
      names = matching_names(truth[i], pred[i])
      row["truth"] = colour_masks(truth[i])
    shown = renamed(pred[i], names)
    row["predicted"] = colour_masks(shown)
    row["overlay"] = large_overlay(images[i], shown, height=height)
    if reconstruction is not None:
      row["reconstruction"] = reconstruction[i]
    if attention is not None:
      strip = attention_strip(attention[i], names=names, height=height)
      row["attention of each slot"] = strip
      widest = max(widest, strip.shape[1] / height)
    rows.append(row)
  return contact_sheet(
    [list(row.values()) for row in rows],
    captions=captions[: len(rows)],
    titles=list(rows[0]) if rows else (),
    height=height,
    max_aspect=widest,
    columns=columns,
  )


def matching_names(
  true: Integer[np.ndarray, "H W"], pred: Integer[np.ndarray, "H W"]
) -> dict[int, int]:
  """Label to show for each predicted one: that of its true counterpart.

  One-to-one by largest total IoU; the others get labels no true one has.
  """
  table = contingency(np.asarray(true), np.asarray(pred))
  iou = overlaps(table.counts)
  names = {}
  matches = linear_sum_assignment(iou, maximize=True)
  for row, column in zip(*matches, strict=True):
    if iou[row, column] > 0:
      names[int(table.pred_ids[column])] = int(table.true_ids[row])
  fresh = max(table.true_ids.max(initial=0), 0) + 1
  for label in table.pred_ids.tolist():
    if label not in names:
      names[label] = int(fresh)
      fresh += 1
  return names


def renamed(
  labels: Integer[np.ndarray, "H W"], names: Mapping[int, int]
) -> Integer[np.ndarray, "H W"]:
  """Labels with every id replaced by its name."""
  ids, ranks = np.unique(labels, return_inverse=True)
  shown = np.array([names[label] for label in ids.tolist()])
  return shown[ranks.reshape(labels.shape)]


def large_overlay(
  image: AnyImage,
  labels: Integer[np.ndarray, "h w"],
  *,
  height: int,
) -> Picture:
  """`overlay` at display size, its lines one pixel thin at any resolution."""
  picture = fit(image, height=height, max_width=2 * height)
  h, w = picture.shape[:2]
  rows = np.arange(h) * labels.shape[0] // h
  columns = np.arange(w) * labels.shape[1] // w
  return overlay(picture, labels[rows[:, None], columns])


def attention_strip(
  attn: Float[np.ndarray, "K h w"],
  *,
  names: Mapping[int, int],
  height: int = 128,
) -> Picture:
  """Attention of each slot in two lines, framed in the colour of its label.

  A slot without a label, one that wins no pixel, has a pale frame.
  """
  frame = max(height // 40, 3)
  side = (height - 2) // 2 - 2 * frame
  cells = []
  for slot, picture in enumerate(attention_maps(np.asarray(attn, np.float32))):
    colour = colour_masks(np.array([[names[slot]]])) if slot in names else 225
    cell = fit(picture, height=side, max_width=2 * side)
    h, w = cell.shape[:2]
    framed = np.empty((h + 2 * frame, w + 2 * frame, 3), np.uint8)
    framed[...] = colour
    framed[frame:-frame, frame:-frame] = cell
    cells.append(framed)
  half = math.ceil(len(cells) / 2)
  lines = [join(line, 1, 2) for line in (cells[:half], cells[half:]) if line]
  return join(lines, 0, 2)


def slot_pca(
  slots: Float[np.ndarray, "B K D"],
  active: Bool[np.ndarray, "B K"] | None = None,
  *,
  size: int = 360,
) -> Picture:
  """Scatter of a batch's slots on their two principal axes.

  Every dot is one slot of one image, its number and colour the slot's index.
  Overlapping dots of one image are collapsed slots; columns of one colour are
  slots that always take the same role.
  """
  batch, num, _ = slots.shape
  active = np.ones((batch, num), bool) if active is None else np.asarray(active)
  index = np.broadcast_to(np.arange(num), (batch, num))[active]
  points = np.nan_to_num(np.asarray(slots, np.float64)[active])
  points = points - points.mean(0) if len(points) else points
  _, scales, axes = np.linalg.svd(points, full_matrices=False)
  plane = np.zeros((len(points), 2))
  projected = points @ axes[:2].T
  plane[:, : projected.shape[1]] = projected
  share = np.zeros(2)
  share[: len(scales[:2])] = scales[:2] ** 2 / max((scales**2).sum(), 1e-12)
  return _scatter(plane, index, share, size)


def _scatter(plane, index, share, size) -> Picture:
  """Numbered dots, drawn three times too large and averaged down."""
  big, radius = 3 * size, max(size // 15, 15)
  canvas = Image.new("RGB", (big, big), PAPER)
  draw = ImageDraw.Draw(canvas)
  middle, grey = big // 2, (222, 222, 222)
  draw.line([(middle, 0), (middle, big)], fill=grey, width=3)
  draw.line([(0, middle), (big, middle)], fill=grey, width=3)
  reach = max(np.abs(plane).max(initial=0), 1e-12)
  # Up is positive, and room is left for the dots and the line of text.
  spots = middle + plane * [1, -1] / reach * (middle - 4 * radius)
  colours = label_colours(256).tolist()
  for (x, y), slot in zip(spots, index.tolist(), strict=True):
    fill = tuple(colours[slot % 256])
    box = (x - radius, y - radius, x + radius, y + radius)
    draw.ellipse(box, fill=fill, outline=INK, width=3)
    ink = PAPER if sum(fill) < 330 else INK
    draw.text((x, y), str(slot), ink, font(radius * 5 // 4), "mm")
  caption = f"slot PCA   x {share[0]:.0%}   y {share[1]:.0%}"
  draw.text((radius, radius // 2), caption, INK, font(max(size // 9, 33)))
  return np.asarray(canvas.resize((size, size), Image.Resampling.BOX))


def write_png(path: str | os.PathLike, image: AnyImage) -> None:
  """Write a picture; folders are made, and a half-written file never seen."""
  _write(path, Image.fromarray(np.ascontiguousarray(to_uint8(image))))


def write_labels(
  path: str | os.PathLike, labels: Integer[np.ndarray, "H W"]
) -> None:
  """Write label ids as PNG, readable back as they are.

  Ids up to 255 become a palette image (mode P) that viewers show in the
  colours of `colour_masks`; larger ones, up to 65535, 16-bit grey.
  """
  labels = np.asarray(labels)
  low, high = labels.min(initial=0), labels.max(initial=0)
  if labels.ndim != 2 or low < 0 or high > 65535:
    raise UserError(
      f"labels {list(labels.shape)} in {low}..{high} must be [H W] in "
      "0..65535 to become a PNG; renumber them, void included"
    )
  image = Image.fromarray(labels.astype(np.uint8 if high < 256 else np.uint16))
  if high < 256:
    image.putpalette(label_colours(256).tobytes())
  _write(path, image)


def _write(path, image: Image.Image) -> None:
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  partial = path.with_name(f".{path.name}.partial")
  partial.unlink(missing_ok=True)  # what is there may be a link elsewhere
  try:
    image.save(partial, format="png")
    os.replace(partial, path)
  finally:
    partial.unlink(missing_ok=True)
