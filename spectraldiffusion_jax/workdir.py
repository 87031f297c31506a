"""A run's folder: one process group at a time, one config for good."""

import contextlib
import fcntl
import pathlib
from collections.abc import Iterator

import jax
from ml_collections import ConfigDict

from spectraldiffusion_jax import config as config_lib
from spectraldiffusion_jax import distributed
from spectraldiffusion_jax.errors import UserError

CONFIG_FILE = "config.json"


@contextlib.contextmanager
def locked(workdir: pathlib.Path) -> Iterator[None]:
  """Holds the workdir for this run.

  Raises:
    UserError: it cannot be written, or another run holds it.
  """
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    lock = open(workdir / f".lock-{jax.process_index()}", "w")
  except OSError as error:
    raise UserError(
      f"--workdir={workdir} cannot be written ({error.strerror})"
    ) from None
  with lock:
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      raise UserError(
        f"--workdir={workdir} is in use by another running process; wait for"
        " it or choose another folder"
      ) from None
    yield


def claim(workdir: pathlib.Path, config: ConfigDict) -> None:
  """Writes the resolved config, or compares it with the one that is there.

  Raises:
    UserError: the folder belongs to a run with another config; the fields
      that differ are listed; or processes see different folders.
  """
  path = workdir / CONFIG_FILE
  if path.exists():
    changed = config_lib.differences(
      config_lib.load(path).to_dict(), config.to_dict()
    )
    if changed:
      raise UserError(
        f"--workdir={workdir} was made by another config: "
        f"{'; '.join(changed)}. Use another workdir, or the old values"
      )
  if jax.process_index() == 0:
    partial = path.with_suffix(".partial")
    config_lib.save(config, partial)
    partial.replace(path)
  distributed.check_shared(path)
