"""Self-training in rounds: who labels the training images, and when.

Round 0 learns from the training-free step, every later round from the model
as it stood when the round began. A round's labels are a pure function of the
checkpoint at its first step; they are kept in the workdir, so that a run
that is stopped in the middle of a round continues with the same ones.
"""

import pathlib
import shutil
from collections.abc import Iterable

import jax
import numpy as np
from jax.sharding import Mesh

from spectraldiffusion_jax import sharding
from spectraldiffusion_jax.errors import UserError
from spectraldiffusion_jax.evaluate import Segment
from spectraldiffusion_jax.types import Batch

FOLDER = "labels"


def starts(num_steps: int, rounds: int) -> list[int]:
  """First step of each of `rounds` rounds of equal length."""
  return [num_steps * i // rounds for i in range(rounds)]


def first_step(step: int, num_steps: int, rounds: int) -> int:
  """First step of the round that training step `step` belongs to."""
  return max(edge for edge in starts(num_steps, rounds) if edge <= step)


def check_state(first: int, step: int, workdir: pathlib.Path) -> None:
  """Raises a UserError if the labels of a round can no longer be made."""
  if first and step != first:
    raise UserError(
      f"workdir: {path(workdir, first)} is gone, and only the state of step "
      f"{first} could make it again; restore the file or use a new workdir"
    )


def label_images(
  segment: Segment,
  batches: Iterable[Batch],
  *,
  num_examples: int,
  mesh: Mesh,
  progress=lambda done, total: None,
) -> np.ndarray:
  """Labels [num_examples H W] uint8 of a split, in its order."""
  parts = []
  for batch in batches:
    image = sharding.shard_batch({"image": batch["image"]}, mesh)["image"]
    labels = sharding.local_rows(segment(image))
    if jax.process_count() > 1:
      labels = jax.experimental.multihost_utils.process_allgather(
        labels, tiled=True
      )
    parts.append(labels)
    progress(sum(map(len, parts)), num_examples)
  return np.concatenate(parts)[:num_examples]


def path(workdir: pathlib.Path, first_step: int) -> pathlib.Path:
  """Where the labels of the round that begins at `first_step` are kept."""
  return workdir / FOLDER / f"{first_step}.npy"


def load(workdir: pathlib.Path, first_step: int) -> np.ndarray | None:
  """The kept labels of a round, or None."""
  file = path(workdir, first_step)
  return np.load(file, allow_pickle=False) if file.exists() else None


def save(workdir: pathlib.Path, first_step: int, labels: np.ndarray) -> None:
  """Keeps the labels of a round; complete or absent, never half."""
  file = path(workdir, first_step)
  file.parent.mkdir(exist_ok=True)
  partial = file.with_suffix(".partial")
  with open(partial, "wb") as out:
    np.save(out, labels)
  partial.replace(file)


def copy(source: pathlib.Path, workdir: pathlib.Path) -> None:
  """Takes over the labels of the run that a new one starts from."""
  if (source / FOLDER).is_dir():
    shutil.copytree(source / FOLDER, workdir / FOLDER, dirs_exist_ok=True)
