"""Where a run begins: the newest intact state, and what was carried with it."""

import logging
import pathlib
from collections.abc import Mapping
from typing import Any

import jax

from spectraldiffusion_jax import build, rounds, workdir
from spectraldiffusion_jax.checkpoint import Checkpoints
from spectraldiffusion_jax.errors import UserError
from spectraldiffusion_jax.run import Run
from spectraldiffusion_jax.train_state import TrainState


def first_state(
  run: Run, checkpoints: Checkpoints, resume: str
) -> tuple[TrainState, Mapping[str, Any] | None]:
  """The newest intact state here, else that of `resume`, else a new one.

  With it what the loop carried when it was saved here, if it was.
  """
  restored = checkpoints.restore_latest(run.abstract_state)
  if restored is not None:
    state, record = restored
    folder = checkpoints.folder.parent
    workdir.compare(folder, record["config"], run.config)
    logging.info("continuing from step %d", record["step"])
    return state, record["carried"]
  if not resume:
    return build.first_state(run.config, run.init_state), None
  other = pathlib.Path(resume).expanduser()
  if not (other / workdir.CONFIG_FILE).exists():
    raise UserError(f"--resume={resume} is not the workdir of a run")
  with Checkpoints(other, read_only=True) as source:
    restored = source.restore_latest(run.abstract_state)
  if restored is None:
    raise UserError(f"--resume={resume} holds no checkpoint yet")
  if jax.process_index() == 0:
    rounds.copy(other, checkpoints.folder.parent)
  return restored[0], None
