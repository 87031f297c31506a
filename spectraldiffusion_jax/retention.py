"""Which checkpoints stay on disk: one rule, a function of their list alone."""

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence

from orbax.checkpoint import checkpoint_managers

PLANNED = "planned"
"""Metric that is 1 where the config, not a signal, chose the step."""


@dataclasses.dataclass(frozen=True)
class Retention(checkpoint_managers.PreservationPolicy):
  """Keeps the newest, the newest planned, milestones and the best.

  Checkpoints that a signal caused do not push planned ones out, so a run
  that was stopped often has the same planned ones as one that never was.

  Attributes:
    last: newest planned checkpoints kept.
    every: steps whose multiples are kept for good, 0 for none.
    metric: name of the score whose largest value is kept, "" for none.
    pinned: steps kept for good.
  """

  last: int
  every: int
  metric: str
  pinned: Collection[int]

  def score(self, metrics: Mapping[str, float] | None) -> float:
    """The metric's value; -inf where it was not measured or is NaN."""
    value = (metrics or {}).get(self.metric, -math.inf)
    return -math.inf if math.isnan(value) else value

  def should_preserve(self, checkpoints: Sequence, *, context) -> list[bool]:
    """One answer a checkpoint, in the order given, oldest first."""
    del context
    planned = [c.step for c in checkpoints if (c.metrics or {}).get(PLANNED, 1)]
    kept = {*planned[-self.last :], *self.pinned}
    kept |= {c.step for c in checkpoints[-1:]}
    if self.every:
      kept |= {step for step in planned if step % self.every == 0}
    scores = {c.step: self.score(c.metrics) for c in checkpoints}
    if max(scores.values(), default=-math.inf) > -math.inf:
      kept.add(max(scores, key=lambda step: (scores[step], step)))
    return [c.step in kept for c in checkpoints]
