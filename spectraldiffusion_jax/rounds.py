"""Self-training in rounds: who labels the training images, and when.

Round 0 learns from the training-free step, every later round from the model
as it stood when the round began. A round's labels are a pure function of the
checkpoint at its first step; they are kept in the workdir, so that a run
that is stopped in the middle of a round continues with the same ones. That
checkpoint is kept as well (`retention.Retention.pinned`): from it damaged
labels are made again.
"""

import datetime
import hashlib
import io
import logging
import os
import pathlib
import shutil
import time
from collections.abc import Callable, Iterable

import jax
import numpy as np
from jax.sharding import Mesh

from spectraldiffusion_jax import distributed, sharding
from spectraldiffusion_jax.errors import UserError
from spectraldiffusion_jax.evaluate import Segment
from spectraldiffusion_jax.train_state import TrainState
from spectraldiffusion_jax.types import Batch

FOLDER = "labels"
PATIENCE = 10.0
"""Seconds between two lines about how far the labels are."""
DIGEST = hashlib.sha256().digest_size


def starts(num_steps: int, rounds: int) -> list[int]:
  """First step of each of `rounds` rounds of equal length."""
  return [num_steps * i // rounds for i in range(rounds)]


def first_step(step: int, num_steps: int, rounds: int) -> int:
  """First step of the round that training step `step` belongs to."""
  return max(edge for edge in starts(num_steps, rounds) if edge <= step)


def label_images(
  segment: Segment,
  batches: Iterable[Batch],
  *,
  num_examples: int,
  mesh: Mesh,
) -> np.ndarray:
  """Labels [num_examples H W] uint8 of a split, in its order.

  Says every few seconds how far it is.
  """
  parts, begin = [], time.monotonic()
  said = begin
  for batch in batches:
    image = sharding.shard_batch({"image": batch["image"]}, mesh)["image"]
    labels = sharding.local_rows(segment(image))
    parts.append(sharding.gather_rows(labels, mesh))
    now = time.monotonic()
    if now - said > PATIENCE and jax.process_index() == 0:
      said, done = now, min(sum(map(len, parts)), num_examples)
      rate = done / (now - begin)
      print(
        f"labels {done}/{num_examples}  {rate:.0f} images/s  eta"
        f" {datetime.timedelta(seconds=round((num_examples - done) / rate))}",
        flush=True,
      )
  return np.concatenate(parts)[:num_examples]


def path(workdir: pathlib.Path, first_step: int) -> pathlib.Path:
  """Where the labels of the round that begins at `first_step` are kept."""
  return workdir / FOLDER / f"{first_step}.npy"


def load(workdir: pathlib.Path, first_step: int) -> np.ndarray | None:
  """The kept labels of a round, verified, or None, alike in every process.

  A file that is not what `save` wrote is named in the log, and kept aside.
  """
  file = path(workdir, first_step)
  if not distributed.first_says(jax.process_index() == 0 and _intact(file)):
    return None
  distributed.check_shared(file)
  return np.load(io.BytesIO(file.read_bytes()[:-DIGEST]), allow_pickle=False)


def _intact(file: pathlib.Path) -> bool:
  if not file.exists():
    return False
  content = file.read_bytes()
  body, digest = content[:-DIGEST], content[-DIGEST:]
  if hashlib.sha256(body).digest() == digest:
    return True
  aside = file.with_suffix(".npy.damaged")
  file.replace(aside)
  logging.warning("labels %s are damaged; kept as %s", file, aside.name)
  return False


def save(workdir: pathlib.Path, first_step: int, labels: np.ndarray) -> None:
  """Keeps the labels of a round; complete or absent, never half.

  The file is one that `numpy.load` reads, followed by its SHA-256. Every
  process has the labels already (see `label_images`); the first one writes.
  """
  if jax.process_index():
    return
  file = path(workdir, first_step)
  file.parent.mkdir(exist_ok=True)
  buffer = io.BytesIO()
  np.save(buffer, labels)
  body = buffer.getvalue()
  partial = file.with_suffix(".partial")
  with open(partial, "wb") as out:
    out.write(body + hashlib.sha256(body).digest())
    out.flush()
    os.fsync(out.fileno())
  partial.replace(file)


def obtain(
  workdir: pathlib.Path,
  first_step: int,
  *,
  state: TrainState,
  state_of: Callable[[int], TrainState | None],
  make: Callable[[TrainState, int], np.ndarray],
) -> np.ndarray:
  """The labels of a round: the kept ones, else made (again) and kept.

  Args:
    workdir: of the run.
    first_step: at which the round begins.
    state: of the run, now.
    state_of: gives the state that a step began with, None if it is lost.
    make: labels all images with a state, for the round from a step on.

  Raises:
    UserError: the labels are lost and cannot be made again.
  """
  labels = load(workdir, first_step)
  if labels is not None:
    return labels
  if first_step and int(state.step) != first_step:
    state = state_of(first_step)
    if state is None:
      raise UserError(
        f"workdir: {path(workdir, first_step)} is gone, and only the"
        f" checkpoint of step {first_step} could make it again; restore one of"
        " them or use a new workdir"
      )
  labels = make(state, first_step)
  save(workdir, first_step, labels)
  return labels


def copy(source: pathlib.Path, workdir: pathlib.Path) -> None:
  """Takes over the labels of the run that a new one starts from."""
  if (source / FOLDER).is_dir():
    shutil.copytree(source / FOLDER, workdir / FOLDER, dirs_exist_ok=True)
