"""Optimiser: clipped AdamW under a warm-up cosine schedule."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import optax

NO_DECAY = ("bias", "scale", "log_a", "a_log", "skip", "dt_bias", "embedding")
"""Last names of parameters that weight decay leaves alone: offsets, norms,
and the decay rates, skips and step sizes of state-space models."""


class Length(NamedTuple):
  """A run's length, derived once from epochs; the loop counts steps only."""

  steps_per_epoch: int
  num_steps: int
  warmup_steps: int
  val_steps: int  # steps between validations


def run_length(
  *,
  num_examples: int,
  batch_size: int,
  num_epochs: float,
  num_steps: int,
  warmup_epochs: float,
  val_interval: float,
) -> Length:
  """Turns the guide's epochs into steps; num_steps > 0 overrides num_epochs."""
  per_epoch = max(1, num_examples // batch_size)
  steps = num_steps or max(1, round(num_epochs * per_epoch))
  return Length(
    steps_per_epoch=per_epoch,
    num_steps=steps,
    warmup_steps=min(round(warmup_epochs * per_epoch), steps // 10 + 1),
    val_steps=max(1, round(val_interval * per_epoch)),
  )


def decay_mask(params) -> object:
  """True for the parameters that weight decay acts on."""
  return jax.tree_util.tree_map_with_path(
    lambda path, p: p.ndim > 1 and path[-1].key.lower() not in NO_DECAY,
    params,
  )


def make_schedule(
  *, learning_rate: float, length: Length, starts: Sequence[int] = (0,)
) -> optax.Schedule:
  """Linear warm-up to `learning_rate`, then a cosine to zero.

  Args:
    learning_rate: peak.
    length: of the run.
    starts: steps at which the schedule starts anew (Loshchilov & Hutter 2017:
      warm restarts), one for each round of self-training.
  """
  ends = [*starts[1:], length.num_steps]
  rounds = []
  for start, end in zip(starts, ends, strict=True):
    warmup = min(length.warmup_steps, (end - start) // 10 + 1)
    rounds.append(
      optax.warmup_cosine_decay_schedule(
        init_value=0.0 if length.warmup_steps else learning_rate,
        peak_value=learning_rate,
        warmup_steps=warmup if length.warmup_steps else 0,
        decay_steps=max(end - start, warmup + 1),
      )
    )
  return optax.join_schedules(rounds, list(starts[1:]))


def make_optimizer(
  schedule: optax.Schedule,
  *,
  weight_decay: float,
  grad_clip: float,
  trainable: Callable[[dict], dict] | None = None,
) -> optax.GradientTransformation:
  """AdamW (Loshchilov & Hutter 2019) after clipping by the global norm.

  Args:
    schedule: of the learning rate.
    weight_decay: of the parameters in `decay_mask`.
    grad_clip: largest global norm of the gradient; 0 = not clipped.
    trainable: parameters -> a tree of bools; what is False stays as it is,
      has no moments and does not count in the norm. None trains everything.
  """
  clip = optax.clip_by_global_norm(grad_clip) if grad_clip else optax.identity()
  tuned = optax.chain(
    clip, optax.adamw(schedule, weight_decay=weight_decay, mask=decay_mask)
  )
  if trainable is None:
    return tuned

  def labels(params):
    return jax.tree.map(
      lambda train: "tuned" if train else "frozen", trainable(params)
    )

  return optax.partition(
    {"tuned": tuned, "frozen": optax.set_to_zero()}, labels
  )
