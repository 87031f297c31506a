"""Durable state: Orbax checkpoints whose content is verified when read.

A checkpoint holds the train state and a JSON record: resolved config, code
version, scores of its step, fingerprint, and whatever the loop carries from
step to step. Two things are in neither, because they follow from seed and
step: the place in the data (batch number `step`, data/pipeline.py) and the
random keys (`train_state.stream_keys`). So neither worker nor process count
ties a resume.
"""

import hashlib
import json
import logging
import pathlib
import re
import shutil
from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jaxtyping import Array, UInt32

from spectraldiffusion_jax import distributed
from spectraldiffusion_jax.errors import UserError
from spectraldiffusion_jax.retention import PLANNED, Retention
from spectraldiffusion_jax.version import __version__

FOLDER = "checkpoints"


@jax.jit
def fingerprint(tree) -> UInt32[Array, " leaves"]:
  """One 32-bit sum for each leaf, equal on every mesh and device count.

  The bits of element i, as an integer, times an odd number that depends on
  i, added modulo 2**32: integer addition is exact in any order, and a single
  flipped bit always changes the sum.
  """
  return jnp.stack([_leaf_sum(leaf) for leaf in jax.tree.leaves(tree)])


def _leaf_sum(leaf: Array) -> UInt32[Array, ""]:
  width = leaf.dtype.itemsize
  bits = leaf.astype(jnp.uint8) if leaf.dtype == jnp.bool_ else leaf
  kind = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[width]
  bits = jax.lax.bitcast_convert_type(bits, kind).astype(jnp.uint32)
  index = jnp.zeros(leaf.shape, jnp.uint32)
  for axis in range(leaf.ndim):
    index = index * np.uint32(leaf.shape[axis]) + jax.lax.broadcasted_iota(
      jnp.uint32, leaf.shape, axis
    )
  return jnp.sum(bits * (index * np.uint32(2654435762) + np.uint32(1)))


def _on_host(array: jax.Array) -> np.ndarray:
  """The whole array, wherever the compiler has left its parts."""
  if array.is_fully_addressable or array.is_fully_replicated:
    return np.asarray(array)
  return multihost_utils.process_allgather(array, tiled=True)


def _digest(record: Mapping[str, Any]) -> str:
  body = {k: v for k, v in record.items() if k != "digest"}
  return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


class Checkpoints:
  """The checkpoints of one workdir; use as a context manager.

  Saves are asynchronous: `save` returns after the copy to the host, and
  leaving the context waits for the last write. `read_only` leaves the folder
  as it is, damaged checkpoints included: another process may be writing. The
  other options are those of `retention.Retention`.
  """

  def __init__(
    self,
    workdir: str | pathlib.Path,
    *,
    keep_last: int = 3,
    keep_every: int = 0,
    best_metric: str = "val/ari",
    pinned: Collection[int] = (),
    read_only: bool = False,
  ):
    self._read_only = read_only
    self.folder = pathlib.Path(workdir).absolute() / FOLDER
    self.best_metric = best_metric
    if jax.process_index() == 0:
      self._screen()
    distributed.wait("checkpoints screened")
    keep = Retention(keep_last, keep_every, best_metric, pinned)
    self._manager = ocp.CheckpointManager(
      self.folder,
      options=ocp.CheckpointManagerOptions(
        preservation_policy=keep,
        best_fn=keep.score,
        best_mode="max",
        cleanup_tmp_directories=not read_only,
        read_only=read_only,
        create=not read_only,
        save_interval_steps=0 if read_only else 1,
      ),
    )

  def __enter__(self) -> "Checkpoints":
    return self

  def __exit__(self, kind, *_) -> None:
    # Closing waits for the other processes' writes, and one may be gone.
    if kind is not None and jax.process_count() > 1:
      return
    try:
      self._manager.close()
    except Exception as error:  # of the write that was under way
      if kind is None:
        raise self._explained(error) from None

  def steps(self) -> list[int]:
    """Steps on disk, oldest first."""
    return sorted(self._manager.all_steps())

  def best_step(self) -> int | None:
    """The step that scored highest, or None where none was scored."""
    step = self._manager.best_step()
    scores = {} if step is None else self._manager.metrics(step)
    return step if self.best_metric in (scores or {}) else None

  def save(
    self,
    step: int,
    state,
    *,
    config: Mapping[str, Any],
    metrics: Mapping[str, float],
    carried: Mapping[str, Any] | None = None,
    planned: bool = True,
  ) -> None:
    """Starts writing; a step that is on disk already is left as it is.

    Args:
      step: of the state.
      state: tree of arrays, donated by the caller only after the return.
      config: resolved, as a dict.
      metrics: scores measured at this very step, by which the best is chosen.
      carried: JSON values that the caller wants back with the state.
      planned: False for a step that a signal chose.

    Raises:
      UserError: this write or the one before it failed: disk full, folder no
        longer writable. Checkpoints that are complete stay as they are.
    """
    if step in self._manager.all_steps():
      return
    record = {
      "version": __version__,
      "step": step,
      "config": json.loads(json.dumps(config)),
      "metrics": dict(metrics),
      "carried": json.loads(json.dumps(carried or {})),
      "fingerprint": _on_host(fingerprint(state)).tolist(),
    }
    record["digest"] = _digest(record)
    try:
      self._manager.save(
        step,
        args=ocp.args.Composite(
          state=ocp.args.StandardSave(state), record=ocp.args.JsonSave(record)
        ),
        metrics={"step": step, PLANNED: int(planned), **metrics},
        force=True,
      )
    except Exception as error:  # OSError, or what TensorStore makes of one
      raise self._explained(error) from None

  def wait(self) -> None:
    """Returns when the last save is on disk; raises what `save` raises."""
    try:
      self._manager.wait_until_finished()
    except Exception as error:
      raise self._explained(error) from None

  def _explained(self, error: Exception) -> Exception:
    """A UserError where the disk refused a write, else the error itself."""
    found = re.search(r"([A-Z][\w ]+) \[os_error_code", str(error))
    if not found and not isinstance(error, OSError):
      return error
    reason = found.group(1) if found else error.strerror or str(error)
    return UserError(
      f"workdir: a checkpoint in {self.folder} could not be written"
      f" ({reason}); the complete ones are intact: free space or mend the"
      " disk, and start again to go on"
    )

  def restore(self, step: int, abstract_state) -> tuple[Any, dict]:
    """State and record of one step, verified.

    Raises:
      UserError: it is intact, but of another version of the state.
      Exception: anything Orbax raises for a damaged file, or ValueError where
        the content read is not the content saved.
    """
    record = self._read(step, record=ocp.args.JsonRestore())
    if record.get("digest") != _digest(record):
      raise ValueError("the record's digest does not match its content")
    if len(record["fingerprint"]) != len(jax.tree.leaves(abstract_state)):
      raise UserError(
        f"workdir: {self.folder / str(step)} was made by version"
        f" {record['version']} with another set of arrays than version"
        f" {__version__} has: use that version, or a new workdir"
      )
    state = self._read(step, state=ocp.args.StandardRestore(abstract_state))
    if record["fingerprint"] != _on_host(fingerprint(state)).tolist():
      raise ValueError("array content differs from what was saved")
    return state, record

  def _read(self, step: int, **item) -> Any:
    """One item of a step, or the same kind of failure in every process."""
    out, problem = {}, None
    try:
      out = self._manager.restore(step, args=ocp.args.Composite(**item))
    except Exception as error:  # Orbax raises bare Exception for bad files
      problem = error
    if not distributed.all_agree(problem is None):
      raise problem or ValueError("another process could not read its part")
    return out[next(iter(item))]

  def restore_latest(
    self, abstract_state, *, planned: bool = False
  ) -> tuple[Any, dict] | None:
    """The newest intact checkpoint, or None where there is none at all.

    A damaged one is named in the log and moved to `checkpoints-damaged/`.

    Args:
      abstract_state: see `restore`.
      planned: leave those out that a signal caused.

    Raises:
      UserError: there are checkpoints, and every one is damaged.
    """
    steps = self.steps()
    if planned:
      # A score that cannot be read is no reason to leave a checkpoint out.
      steps = [
        s for s in steps if (self._manager.metrics(s) or {}).get(PLANNED, 1)
      ]
    for step in reversed(steps):
      try:
        return self.restore(step, abstract_state)
      except UserError:
        raise
      except Exception as error:  # Orbax raises bare Exception for bad files
        self._set_aside(step, _first_line(error))
        distributed.wait("checkpoint set aside")
        if not self._read_only:
          self._manager.reload()
    damaged = self.folder.parent / f"{FOLDER}-damaged"
    if damaged.is_dir() or steps:
      raise UserError(
        f"workdir: every checkpoint of {self.folder.parent} is damaged (see"
        f" {damaged}); start again in a new workdir"
      )
    return None

  def _screen(self) -> None:
    """Sets steps aside whose scores cannot be read: Orbax reads all at once."""
    if self._read_only or not self.folder.is_dir():
      return
    for path in self.folder.iterdir():
      if path.name.isdigit():
        try:
          json.loads((path / "metrics" / "metrics").read_text())
        except (OSError, ValueError) as error:
          self._set_aside(int(path.name), str(error))

  def _set_aside(self, step: int, reason: str) -> None:
    if self._read_only:
      logging.warning("checkpoint %d is damaged (%s), skipped", step, reason)
      return
    target = self.folder.parent / f"{FOLDER}-damaged" / str(step)
    if jax.process_index() == 0:
      target.parent.mkdir(exist_ok=True)
      if target.exists():
        shutil.rmtree(target)
      shutil.move(self.folder / str(step), target)
    message = "checkpoint %d is damaged (%s); kept in %s, falling back"
    logging.warning(message, step, reason, target)


def _first_line(error: Exception) -> str:
  lines = str(error).strip().splitlines() or [type(error).__name__]
  return lines[0][:200]
