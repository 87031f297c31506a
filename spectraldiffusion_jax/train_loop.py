"""One run, top to bottom: data, model, loop, checkpoints, validation.

The order of a step: next batch, update, check, log, validate, save, stop?
Everything a user can configure arrives in one locked ConfigDict; everything
below this file takes plain values.
"""

import logging
import pathlib
from collections.abc import Iterator

import jax
from ml_collections import ConfigDict

from spectraldiffusion_jax import config as config_lib
from spectraldiffusion_jax import (
  diagnostics,
  distributed,
  divergence,
  replicas,
  rounds,
  sharding,
  writers,
)
from spectraldiffusion_jax import workdir as workdir_lib
from spectraldiffusion_jax.checkpoint import Checkpoints
from spectraldiffusion_jax.errors import UserError
from spectraldiffusion_jax.preemption import EXIT_CODE, StopRequest
from spectraldiffusion_jax.run import Run
from spectraldiffusion_jax.train_state import TrainState
from spectraldiffusion_jax.types import Batch
from spectraldiffusion_jax.version import __version__

DIVERGED = 3
"""Exit code of a run whose loss was not finite; its last good state is kept."""


def train_and_evaluate(
  config: ConfigDict,
  workdir: str,
  *,
  exp_name: str = "",
  resume: str = "",
) -> int:
  """Trains to the end of `config`, from the workdir's checkpoint if any.

  Args:
    config: locked; see configs/default.py for every field.
    workdir: folder of the run, made if it is not there.
    exp_name: subfolder of workdir to use instead.
    resume: workdir of another run whose newest state a fresh run starts from.

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
    run = Run(config)
    print(sharding.describe(run.mesh))
    workdir_lib.claim(folder, config)
    with Checkpoints(folder, keep_last=config.logging.keep_last) as checkpoints:
      state = _first_state(run, checkpoints, resume)
      with writers.MetricWriter(
        folder, log_dir=config.logging.log_dir, start=int(state.step)
      ) as writer:
        return _Loop(run, folder, checkpoints, writer, stop).run_to_end(state)


def _first_state(run: Run, checkpoints: Checkpoints, resume: str) -> TrainState:
  """The newest intact state here, else that of `resume`, else a new one."""
  restored = checkpoints.restore_latest(run.abstract_state)
  if restored is not None:
    logging.info("continuing from step %d", restored[1]["step"])
    return restored[0]
  if not resume:
    return run.init_state()
  other = pathlib.Path(resume).expanduser()
  if not (other / workdir_lib.CONFIG_FILE).exists():
    raise UserError(f"--resume={resume} is not the workdir of a run")
  with Checkpoints(other, read_only=True) as source:
    restored = source.restore_latest(run.abstract_state)
  if restored is None:
    raise UserError(f"--resume={resume} holds no checkpoint yet")
  if jax.process_index() == 0:
    rounds.copy(other, checkpoints.folder.parent)
  return restored[0]


class _Loop:
  """The side effects of a run, in their order."""

  def __init__(self, run, folder, checkpoints, writer, stop):
    self.run, self.folder, self.stop = run, folder, stop
    self.checkpoints, self.writer = checkpoints, writer
    self.config, self.length = run.config, run.length
    self.scores = {}  # of the latest validation
    self.advised = set()  # problems that were named at the last log
    self.watch = divergence.Watch(
      folder, max_skips=self.config.training.max_skips
    )

  def run_to_end(self, state: TrainState) -> int:
    """Trains; returns the exit code."""
    step, logging_ = int(state.step), self.config.logging
    if step >= self.length.num_steps:
      print(f"complete: step {step} of {self.length.num_steps}")
      return 0
    self.progress = writers.Progress(
      total=self.length.num_steps,
      batch_size=self.config.training.batch_size,
      start=step,
    )
    batches = self._batches(state, step)
    while step < self.length.num_steps:
      if self.run.begins_round(step):
        self._save(state, step)
        batches.close()
        batches = self._batches(state, step)
      batch = next(batches)
      index, batch = batch["index"], self.run.place(batch, step)
      state, metrics = self.run.train_step(state, batch)
      step += 1
      self.watch.remember(step, metrics, index)
      last = step == self.length.num_steps
      validate = last or step % self.length.val_steps == 0
      stopping = self.stop.requested(step) and not last
      log = validate or step % logging_.log_interval == 0
      save = last or stopping or step % logging_.save_interval == 0
      if (log or save) and self.watch.diverged():
        return DIVERGED
      if log:
        self._log(state, step, metrics, validate=validate)
      if logging_.image_interval and step % logging_.image_interval == 0:
        self._draw(state, step)
      if save:
        self._save(state, step)
      if stopping:
        print(f"stopped and saved at step {step}; start again to go on")
        return EXIT_CODE
    batches.close()
    return 0

  def _batches(self, state: TrainState, step: int) -> Iterator[Batch]:
    """Batches from number `step` on, with the labels of its round."""
    with self.progress.paused():
      labels = self.run.round_labels(state, self.folder, step)
    return self.run.train_batches(start=step, labels=labels)

  def _log(self, state, step, metrics, *, validate: bool) -> None:
    """Scalars of a step, validation scores with them, and advice."""
    values = {k: float(v) for k, v in metrics.items()}
    row = {f"train/{name}": value for name, value in values.items()}
    row["learning_rate"] = row.pop("train/learning_rate")
    if validate:
      with self.progress.paused():
        self.scores = self.run.validate(state)
      row |= self.scores
    loss, ari = row["train/loss"], self.scores.get("val/ari")
    row |= self.progress.log(step, loss, ari)
    self.writer.write_scalars(step, row)
    advice = diagnostics.advice(values)
    named = {line.partition(":")[0] for line in advice}
    if named - self.advised:
      print("\n".join(advice))
    self.advised = named

  def _draw(self, state: TrainState, step: int) -> None:
    """Pictures of a fixed validation batch, to TensorBoard."""
    with self.progress.paused():
      self.writer.write_images(step, self.run.pictures(state))

  def _save(self, state: TrainState, step: int) -> None:
    replicas.check(state)
    self.writer.flush()
    self.checkpoints.save(
      step, state, config=self.config.to_dict(), metrics=self.scores
    )
