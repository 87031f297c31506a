"""Horizontal bars with error bars, and the differences to the full model."""

from collections.abc import Mapping

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw

from spectraldiffusion_jax.colours import OKABE_ITO
from spectraldiffusion_jax.sheet import INK, PAPER, font

SCALE = 2  # pixels drawn for one of the figures below
LINE, BAR, TEXT = 34, 11, 13  # heights of a row, a bar and a letter
NAMES, PANEL, GAP, TOP = 170, 380, 60, 64  # widths, and the head's height
FAINT, GRID = (120, 124, 130), (226, 228, 232)
COLOURS = {"fg_ari": OKABE_ITO[4], "ari": OKABE_ITO[0]}


def draw(
  rows: list[dict], titles: Mapping[str, str]
) -> UInt8[np.ndarray, "H W 3"]:
  """FG-ARI and ARI of each row, and beside them the paired differences.

  Args:
    rows: of `report.summarise`.
    titles: name of a metric for people.
  """
  width = NAMES + 2 * PANEL + GAP + 90
  height = TOP + LINE * len(rows) + 30
  canvas = Image.new("RGB", (width * SCALE, height * SCALE), PAPER)
  pen = _Pen(ImageDraw.Draw(canvas))
  gains = [row[f"{m}_gain"] for row in rows for m in COLOURS]
  # The phases lie far off: differences of single parts set the scale.
  small = [abs(g) for g in gains if g is not None and abs(g) < 0.15]
  span = 1.15 * max(small, default=0.01) + 0.005
  score = _Axis(NAMES, 0.0, 1.0)
  gain = _Axis(NAMES + PANEL + GAP, -span, span)
  bottom = TOP + LINE * len(rows)
  _head(pen, titles, score, gain, bottom)
  for i, row in enumerate(rows):
    y = TOP + LINE * i
    pen.text(NAMES - 12, y + LINE / 2, row["name"], "rm")
    for j, metric in enumerate(COLOURS):
      top = y + LINE / 2 - BAR + j * BAR
      _bar(pen, row, metric, score, top)
      _dot(pen, row, metric, gain, top + BAR / 2)
  return np.asarray(canvas)


class _Axis:
  """From values to horizontal places."""

  def __init__(self, left: float, low: float, high: float):
    self.left, self.low, self.high = left, low, high

  def __call__(self, value: float) -> float:
    share = (value - self.low) / (self.high - self.low)
    return self.left + PANEL * min(max(share, 0.0), 1.0)

  def ticks(self) -> list[float]:
    step = min(
      (m * 10.0**e for e in range(-4, 1) for m in (1, 2, 5)),
      key=lambda s: abs((self.high - self.low) / s - 5),
    )
    first = int(np.ceil(self.low / step - 1e-9))
    last = int(np.floor(self.high / step + 1e-9))
    return [i * step for i in range(first, last + 1)]


class _Pen:
  """Draws in the units of this file."""

  def __init__(self, to: ImageDraw.ImageDraw):
    self._to = to

  def text(self, x, y, words, anchor, ink=INK, size=TEXT):
    place = (x * SCALE, y * SCALE)
    self._to.text(place, words, ink, font(size * SCALE), anchor)

  def line(self, x0, y0, x1, y1, ink=INK, width=1):
    ends = [v * SCALE for v in (x0, y0, x1, y1)]
    self._to.line(ends, ink, width * SCALE)

  def box(self, x0, y0, x1, y1, ink):
    self._to.rectangle([v * SCALE for v in (x0, y0, x1, y1)], ink)

  def disc(self, x, y, radius, ink):
    ends = (x - radius, y - radius, x + radius, y + radius)
    self._to.ellipse([v * SCALE for v in ends], ink)

  def whiskers(self, x0, x1, y, ink=INK):
    self.line(x0, y, x1, y, ink)
    for x in (x0, x1):
      self.line(x, y - 3, x, y + 3, ink)


def _head(pen, titles, score, gain, bottom):
  """Titles, legend, grid and ticks of both panels."""
  x = score.left
  for metric, ink in COLOURS.items():
    pen.box(x, 14, x + 14, 28, ink)
    pen.text(x + 20, 21, titles[metric], "lm")
    x += 100
  pen.text(x, 21, "mean, bars: sd over seeds", "lm", FAINT)
  pen.text(gain.left, 21, "paired difference to full, +- se", "lm", FAINT)
  for axis, form in ((score, ".1f"), (gain, "+.3g")):
    for tick in axis.ticks():
      zero = abs(tick) < 1e-12
      ink = FAINT if zero else GRID
      pen.line(axis(tick), TOP - 8, axis(tick), bottom, ink)
      label = "0" if zero else f"{tick:{form}}"
      pen.text(axis(tick), TOP - 16, label, "mm", FAINT, 11)


def _bar(pen, row, metric, axis, top):
  value, spread = row[metric], row[f"{metric}_sd"]
  if value is None:
    return
  middle = top + BAR / 2
  pen.box(axis(0.0), top + 1, axis(value), top + BAR - 1, COLOURS[metric])
  if spread:
    pen.whiskers(axis(value - spread), axis(value + spread), middle)
  place = axis(max(value + (spread or 0.0), 0.0)) + 5
  pen.text(place, middle, f"{value:.3f}", "lm", FAINT, 10)


def _dot(pen, row, metric, axis, middle):
  value, error = row[f"{metric}_gain"], row[f"{metric}_gain_se"]
  if value is None:
    return
  ink = COLOURS[metric]
  if value < axis.low:
    words = f"{value:+.2f}, off the scale"
    pen.text(axis(value) + 6, middle, words, "lm", ink, 10)
    return
  pen.whiskers(axis(value - error), axis(value + error), middle, ink)
  pen.disc(axis(value), middle, 3, ink)
