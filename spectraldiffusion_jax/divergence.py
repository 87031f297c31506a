"""When a step is refused: what it was, where, and what happens then."""

import enum
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

FILE = "divergence.json"
LARGEST = 5  # layers a report names


class Verdict(enum.Enum):
  """What the loop does after a look at the steps since the last one."""

  GO_ON = enum.auto()
  ROLL_BACK = enum.auto()
  GIVE_UP = enum.auto()


class Watch:
  """Remembers the steps since the last look, and finds those refused.

  The train step refuses a bad update by itself, so looking can wait until
  the host needs numbers anyway: no step is ever slowed down. What follows
  depends on the failures alone, never on when the looks came, so a run that
  was stopped and started again skips and rolls back as one that was not.

  Attributes:
    failed: step and metrics of the latest failure that asked for more than
      being skipped.
  """

  def __init__(
    self,
    workdir: pathlib.Path,
    *,
    layers: Sequence[str],
    max_skips: int,
    max_rollbacks: int,
    past: Mapping[str, Any] | None = None,
  ):
    self._workdir, self._layers = workdir, layers
    self._max_skips, self._max_rollbacks = max_skips, max_rollbacks
    self._recent = []
    self._past = dict(past or {"reports": [], "forgiven": 0, "rollbacks": 0})
    self.failed = (0, {})

  def carried(self) -> dict[str, Any]:
    """What another Watch needs as `past` to go on from here."""
    return self._past

  def remember(self, step: int, metrics: Mapping, index: np.ndarray) -> None:
    """Keeps a step's metrics (still on the devices) and its batch's ids."""
    self._recent.append((step, metrics, index))

  def look(self) -> Verdict:
    """Judges the remembered steps; reports on disk and in one line each."""
    verdict, before = Verdict.GO_ON, len(self._past["reports"])
    for step, metrics, index in self._recent:
      if not float(metrics["accepted"]):
        # In every process at once, for the metrics are the same in all.
        index = multihost_utils.process_allgather(index, tiled=True)
        verdict = self._judge(step, metrics, index)
      if verdict != Verdict.GO_ON:
        break  # the steps after this one are to be done again, or never
    self._recent.clear()
    if len(self._past["reports"]) > before and jax.process_index() == 0:
      path = self._workdir / FILE
      path.write_text(json.dumps(self._past["reports"], indent=2) + "\n")
    return verdict

  def _judge(self, step, metrics, index) -> Verdict:
    # In every process at once, for the metrics are the same in all.
    index = multihost_utils.process_allgather(index, tiled=True)
    report = describe(step, metrics, index, layers=self._layers)
    past = self._past
    past["reports"] = [*past["reports"], report]
    what = f"{report['cause']} in {report['layer']}"
    if len(past["reports"]) - past["forgiven"] <= self._max_skips:
      print(f"step {step} was skipped: {what}")
      return Verdict.GO_ON
    self.failed = (step, metrics)
    if past["rollbacks"] < self._max_rollbacks:
      past["rollbacks"] += 1
      past["forgiven"] = len(past["reports"])
      print(f"step {step} failed: {what}; rolling back")
      return Verdict.ROLL_BACK
    print(
      f"error: {what} at step {step}; no bad update was applied; see"
      f" {self._workdir / FILE}; lower training.learning_rate or"
      " training.grad_clip, or raise training.max_skips or"
      " training.max_rollbacks"
    )
    return Verdict.GIVE_UP


def describe(
  step: int, metrics: Mapping, index: np.ndarray, *, layers: Sequence[str]
) -> dict[str, Any]:
  """A report: cause, terms, layers, all scalars, the examples of the batch.

  Args:
    step: that failed, counted from 1.
    metrics: of that step.
    index: ids of its examples.
    layers: names of the entries of `layer_grad_norms`.

  Returns:
    JSON values. `layer` is the first whose gradient is not finite, else the
    one whose gradient is largest; `layer_grad_norms` has LARGEST such layers.
  """
  norms = np.asarray(metrics["layer_grad_norms"], np.float64)
  order = np.argsort(-np.nan_to_num(norms, nan=np.inf), kind="stable")
  values = {
    name: float(value) for name, value in metrics.items() if np.ndim(value) == 0
  }
  terms = [
    name
    for name, value in values.items()
    if not np.isfinite(value) and name.endswith("_loss")
  ]
  if values["finite"]:
    cause = (
      f"loss {values['loss']:.4g} or gradient norm {values['grad_norm']:.4g}"
      " above training.max_loss_ratio times its median"
    )
  else:
    cause = f"{', '.join(terms) or 'the gradient'} not finite"
  return {
    "step": step,
    "cause": cause,
    "terms": terms,
    "layer": layers[order[0]],
    "layer_grad_norms": {
      layers[i]: _json(norms[i]) for i in order[:LARGEST].tolist()
    },
    "metrics": {name: _json(value) for name, value in values.items()},
    "batch_index": np.asarray(index).tolist(),
  }


def _json(value: float) -> float | str:
  return float(value) if np.isfinite(value) else str(float(value))
