"""From results to the table: means, spreads, paired differences, Markdown."""

import json
import math
import pathlib
from collections.abc import Mapping

import numpy as np
from PIL import Image

from spectraldiffusion_jax.ablation import cells, chart, one, readout
from spectraldiffusion_jax.markdown import table as markdown_table

METRICS = {"fg_ari": "FG-ARI", "ari": "ARI", "mbo": "mBO"}
MEASURED = {"seconds_per_step": min, "peak_mb": max, "seconds": max}
"""What is kept of the measurements of a cell's runs."""
Results = Mapping[str, Mapping[int, dict]]
"""cell -> seed -> what `one` wrote."""


def write(results: Results, folder: pathlib.Path) -> str:
  """Writes ablation.json, .md and .png; returns the table."""
  rows = summarise(results)
  text = markdown(rows)
  (folder / "ablation.json").write_text(json.dumps(rows, indent=2) + "\n")
  (folder / "ablation.md").write_text(text)
  Image.fromarray(chart.draw(rows, METRICS)).save(folder / "ablation.png")
  return text


def summarise(results: Results) -> list[dict]:
  """One row a cell, controls first: `metric`, `metric_sd` over seeds, ...

  `metric_gain` and `metric_gain_se` are the paired difference to the cell
  `full` with the same seeds: negative where what is missing was worth
  something. `slots_PROPERTY` and `slots_PROPERTY_sd` are what slot contents
  tell of their objects (see `readout`). A number that cannot be had is None.
  """
  rows = []
  full = results.get(cells.FULL, {})
  controls = (
    ("training_free", "colour alone, no parameters"),
    ("step0", "full before its first step"),
  )
  for key, note in controls:
    scores = _scores(full, key)
    if scores:
      rows.append(_row(key, note, scores, _scores(full, "trained")))
  for name, cell in cells.CELLS.items():
    if name not in results:
      continue
    runs = results[name]
    scores = _scores(runs, "trained")
    row = _row(name, cell.note, scores, _scores(full, "trained"))
    row["diverged"] = len(runs) - len(scores)
    kept = [r for r in runs.values() if r["scores"]]
    told = [r["readout"] for r in kept if r.get("readout")]
    for what in readout.PROPERTIES:
      key = f"slots_{what}"
      row[key], row[f"{key}_sd"] = _mean_sd([values[what] for values in told])
    for field, pick in MEASURED.items():
      if any(field in r for r in kept):
        row[field] = pick([r[field] for r in kept])
    rows.append(row)
  return rows


def _scores(runs: Mapping[int, dict], key: str) -> dict[int, dict]:
  """Seed -> metric -> scores [images] of one segmentation function."""
  return {
    seed: {m: np.array(run["scores"][key][m], float) for m in one.SCORES}
    for seed, run in runs.items()
    if key in run["scores"]
  }


def _row(name, note, scores, full) -> dict:
  row = {"name": name, "note": note, "seeds": len(scores)}
  for metric in METRICS:
    means = [np.nanmean(s[metric]) for s in scores.values()]
    row[metric], row[f"{metric}_sd"] = _mean_sd(means)
    gain = None, None
    if name != cells.FULL:
      both = sorted(scores.keys() & full.keys())
      gain = difference(
        [scores[seed][metric] - full[seed][metric] for seed in both]
      )
    row[f"{metric}_gain"], row[f"{metric}_gain_se"] = gain
  return row


def _mean_sd(values) -> tuple[float | None, float | None]:
  """Mean and standard deviation over seeds, None where there are too few."""
  mean = float(np.mean(values)) if values else None
  return mean, float(np.std(values, ddof=1)) if len(values) > 1 else None


def difference(gains: list[np.ndarray]) -> tuple[float | None, float | None]:
  """Mean and standard error of paired differences [images], one a seed.

  Images and seeds are both samples: the error is the root of the sum of the
  squared errors over images (of their mean over seeds) and over seeds (of
  their mean over images), an upper bound of the error of the mean.
  """
  if not gains:
    return None, None
  table = np.stack(gains)
  table = table[:, np.isfinite(table).all(0)]

  def error(means):
    return np.std(means, ddof=1) / len(means) ** 0.5 if len(means) > 1 else 0.0

  total = math.hypot(error(table.mean(0)), error(table.mean(1)))
  return float(table.mean()), float(total)


def markdown(rows: list[dict]) -> str:
  """The table, one row a cell; what no cell has is left out."""
  head = ["cell", "seeds", *METRICS.values()]
  head += [f"{METRICS[m]} - full" for m in ("fg_ari", "ari")]
  head += ["slots tell " + ", ".join(readout.PROPERTIES), "s/step", "MB"]
  head += ["what"]
  lines = []
  for row in rows:
    line = [row["name"], str(row["seeds"])]
    line += [_plus_minus(row[m], row[f"{m}_sd"]) for m in METRICS]
    line += [
      _plus_minus(row[f"{m}_gain"], row[f"{m}_gain_se"], sign="+")
      for m in ("fg_ari", "ari")
    ]
    told = [row.get(f"slots_{name}") for name in readout.PROPERTIES]
    line += ["" if None in told else ", ".join(f"{t:.2f}" for t in told)]
    line += [_number(row, "seconds_per_step", ".3f"), _number(row, "peak_mb")]
    failed = row.get("diverged")
    line += [row["note"] + (f"; {failed} diverged" if failed else "")]
    lines.append(line)
  columns = zip(head, *lines, strict=True)
  kept = [c for c in columns if any(c[1:])]
  head, *lines = zip(*kept, strict=True)
  return markdown_table(head, lines)


def _plus_minus(value, spread, sign="") -> str:
  if value is None:
    return ""
  text = f"{value:{sign}.3f}"
  return text if spread is None else f"{text} +- {spread:.3f}"


def _number(row, name, form="d") -> str:
  return f"{row[name]:{form}}" if name in row else ""
