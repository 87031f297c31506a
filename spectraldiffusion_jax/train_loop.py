"""One run, top to bottom: data, model, loop, checkpoints, validation.

The order of a step: next batch, update, check, log, validate, save, stop?
Everything a user can configure arrives in one locked ConfigDict; everything
below this file takes plain values.
"""

import contextlib
import pathlib
from collections.abc import Mapping
from typing import NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from spectraldiffusion_jax import config as config_lib
from spectraldiffusion_jax import (
  diagnostics,
  distributed,
  divergence,
  replicas,
  rounds,
  sharding,
  train_state,
  writers,
)
from spectraldiffusion_jax import workdir as workdir_lib
from spectraldiffusion_jax.checkpoint import Checkpoints
from spectraldiffusion_jax.ledger import Ledger
from spectraldiffusion_jax.preemption import EXIT_CODE, StopRequest
from spectraldiffusion_jax.prefetch import Prefetch
from spectraldiffusion_jax.resume import first_state
from spectraldiffusion_jax.run import Run
from spectraldiffusion_jax.train_state import TrainState
from spectraldiffusion_jax.version import __version__

DIVERGED = 3
"""Exit code of a run whose loss diverged; its last good state is kept."""


def train_and_evaluate(
  config: ConfigDict,
  workdir: str,
  *,
  exp_name: str = "",
  resume: str = "",
  run: Run | None = None,
) -> int:
  """Trains to the end of `config`, from the workdir's checkpoint if any.

  Args:
    config: locked; see configs/default.py for every field.
    workdir: folder of the run, made if it is not there.
    exp_name: subfolder of workdir to use instead.
    resume: workdir of another run whose newest state a fresh run starts from.
    run: of this config, if it is there already.

  Returns:
    0 complete, EXIT_CODE stopped by a signal and saved, DIVERGED.

  Raises:
    UserError: config, data, workdir or devices do not fit together.
  """
  config_lib.validate(config)
  same = [__version__, config.to_json(), workdir, exp_name, resume]
  distributed.check_same("\n".join(same), "the config")
  folder = pathlib.Path(workdir).expanduser().absolute() / exp_name
  with workdir_lib.locked(folder), StopRequest() as stop:
    run = run or Run(config)
    print(sharding.describe(run.mesh))
    workdir_lib.claim(folder, config)
    with Checkpoints(
      folder,
      keep_last=config.logging.keep_last,
      keep_every=config.logging.keep_every,
      best_metric=config.logging.keep_best,
      pinned=run.round_starts,
    ) as checkpoints:
      state, carried = first_state(run, checkpoints, resume)
      start = int(state.step)
      with (
        writers.MetricWriter(
          folder, log_dir=config.logging.log_dir, start=start
        ) as writer,
        contextlib.closing(
          Ledger(folder, start=start, active=config.logging.examples)
        ) as ledger,
      ):
        loop = _Loop(run, folder, checkpoints, writer, ledger, stop, carried)
        return loop.run_to_end(state)


class _Due(NamedTuple):
  """What follows a step; a function of its number alone."""

  last: bool
  validate: bool
  log: bool
  draw: bool
  save: bool


class _Loop:
  """The side effects of a run, in their order."""

  def __init__(self, run, folder, checkpoints, writer, ledger, stop, carried):
    self.run, self.folder, self.stop = run, folder, stop
    self.checkpoints, self.writer, self.ledger = checkpoints, writer, ledger
    self.config, self.length = run.config, run.length
    carried = carried or {"scores": {}, "best": {}, "advised": []}
    self.scores = carried["scores"]  # of the latest validation
    self.best = carried["best"]  # largest score so far, and its step
    self.advised = set(carried["advised"])  # problems named so far
    self.batches = None
    self.compiled = False  # the training step, in this process
    training = self.config.training
    self.watch = divergence.Watch(
      folder,
      layers=train_state.layer_names(run.abstract_state.params),
      max_skips=training.max_skips,
      max_rollbacks=training.max_rollbacks,
      past=carried.get("divergence"),
    )

  def run_to_end(self, state: TrainState) -> int:
    """Trains; returns the exit code."""
    step = int(state.step)
    if step >= self.length.num_steps:
      print(f"complete: step {step} of {self.length.num_steps}")
      return 0
    self.progress = writers.Progress(
      total=self.length.num_steps,
      batch_size=self.config.training.batch_size,
      start=step,
    )
    # A disk that takes no checkpoint is found before anything is trained.
    self._save(state, step)
    try:
      return self._train(state, step)
    finally:
      self._close_batches()

  def _train(self, state: TrainState, step: int) -> int:
    while step < self.length.num_steps:
      if self.batches is None:
        self._open_batches(state, step)
      index, batch = next(self.batches)
      state, metrics = self._update(state, batch)
      step += 1
      self.ledger.write(step, index)
      self.watch.remember(step, metrics, index)
      due = self._due(step)
      stopping = self.stop.requested(step) and not due.last
      if any(due) or stopping:
        verdict = self.watch.look()
        if verdict is divergence.Verdict.GIVE_UP:
          return DIVERGED
        if verdict is divergence.Verdict.ROLL_BACK:
          state, step, metrics = self._roll_back()
          due = self._due(step)._replace(save=True)
      if due.log:
        self._log(state, step, metrics, validate=due.validate)
      if due.draw:
        self._draw(state, step)
      if due.save or stopping:
        self._save(state, step, validated=due.validate, planned=due.save)
      if stopping:
        print(f"stopped and saved at step {step}; start again to go on")
        return EXIT_CODE
      if step in self.run.round_starts:
        self._close_batches()
    return 0

  def _update(self, state: TrainState, batch: dict) -> tuple:
    if self.compiled:
      return self.run.train_step(state, batch)
    with self.progress.compiling():
      self.compiled = True
      return jax.block_until_ready(self.run.train_step(state, batch))

  def _due(self, step: int) -> _Due:
    logging_ = self.config.logging
    last = step == self.length.num_steps
    validate = last or step % self.length.val_steps == 0
    images = logging_.image_interval
    return _Due(
      last=last,
      validate=validate,
      log=validate or step % logging_.log_interval == 0,
      draw=bool(images) and step % images == 0,
      save=validate
      or step % logging_.save_interval == 0
      or step in self.run.round_starts,
    )

  def _roll_back(self) -> tuple[TrainState, int, Mapping]:
    """The newest planned state, moved past the batch that failed.

    Batches between the two are not seen again; the step counts them, so that
    batch number `step` stays the next one. It is planned states only, because
    those are the same however often the run was stopped.
    """
    step, metrics = self.watch.failed
    self.checkpoints.wait()
    restored = self.checkpoints.restore_latest(
      self.run.abstract_state, planned=True
    )
    state, record = restored
    print(f"going on from the state of step {record['step']} at step {step}")
    at = self.run.abstract_state.step.sharding
    state = state.replace(step=jax.device_put(np.int32(step), at))
    self.ledger.rewind(step)
    self._close_batches()
    return state, step, metrics

  def _open_batches(self, state: TrainState, step: int) -> None:
    """Batches from number `step` on, with the labels of its round."""

    def state_of(first: int) -> TrainState | None:
      self.checkpoints.wait()
      if first not in self.checkpoints.steps():
        return None
      return self.checkpoints.restore(first, self.run.abstract_state)[0]

    labels, count = None, self.config.composite.rounds
    if count:
      with self.progress.paused():
        labels = rounds.obtain(
          self.folder,
          rounds.first_step(step, self.length.num_steps, count),
          state=state,
          state_of=state_of,
          make=self.run.teach,
        )
    self.batches = Prefetch(
      self.run.train_batches(start=step, labels=labels),
      self.run.place,
      first=step,
    )

  def _close_batches(self) -> None:
    if self.batches is not None:
      self.batches.close()
      self.batches = None

  def _log(self, state, step, metrics, *, validate: bool) -> None:
    """Scalars of a step, validation scores with them, and advice."""
    values = {k: float(v) for k, v in metrics.items() if np.ndim(v) == 0}
    row = {f"train/{name}": value for name, value in values.items()}
    row["learning_rate"] = row.pop("train/learning_rate")
    if validate:
      with self.progress.paused():
        self.scores = self.run.validate(state)
      row |= self.scores
      self._keep_best(step)
    loss, ari = row["train/loss"], self.scores.get("val/ari")
    row |= self.progress.log(step, loss, ari)
    self.writer.write_scalars(step, row)
    if step <= self.length.warmup_steps:  # slots have not begun to bind
      values = {"loss": values["loss"]}
    for line in diagnostics.advice(values):
      problem = line.partition(":")[0]
      if problem not in self.advised:
        print(line)
      self.advised.add(problem)

  def _keep_best(self, step: int) -> None:
    for name, value in self.scores.items():
      if name not in self.best or value > self.best[name]["value"]:
        self.best[name] = {"value": value, "step": step}

  def _draw(self, state: TrainState, step: int) -> None:
    """Pictures of a fixed validation batch, to TensorBoard."""
    with self.progress.paused():
      self.writer.write_images(step, self.run.pictures(state))

  def _save(
    self,
    state: TrainState,
    step: int,
    *,
    validated: bool = False,
    planned: bool = True,
  ) -> None:
    replicas.check(state)
    self.writer.flush()
    self.checkpoints.save(
      step,
      state,
      config=self.config.to_dict(),
      metrics=self.scores if validated else {},
      carried={
        "scores": self.scores,
        "best": self.best,
        "advised": sorted(self.advised),
        "divergence": self.watch.carried(),
      },
      planned=planned,
    )
