"""A run's folder: one process group at a time, one config for good."""

import contextlib
import errno
import fcntl
import logging
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from ml_collections import ConfigDict

from spectraldiffusion_jax import config as config_lib
from spectraldiffusion_jax import distributed
from spectraldiffusion_jax.errors import UserError

CONFIG_FILE = "config.json"
UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)


@contextlib.contextmanager
def locked(workdir: pathlib.Path) -> Iterator[None]:
  """Holds the workdir for this run.

  Raises:
    UserError: it cannot be written, now or later, or another run holds it.
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
    try:
      yield
    except OSError as error:
      if error.errno not in UNWRITABLE:
        raise
      raise UserError(
        f"--workdir={workdir} cannot be written any more ({error.strerror});"
        " what is complete is intact: free space or mend the disk, and start"
        " again to go on"
      ) from None


def claim(workdir: pathlib.Path, config: ConfigDict) -> None:
  """Writes the resolved config, or compares it with the one that is there.

  One that cannot be read is kept aside: every checkpoint has its own copy,
  with which the loop compares as well.

  Raises:
    UserError: the folder belongs to a run with another config; the fields
      that differ are listed; or processes see different folders.
  """
  path = workdir / CONFIG_FILE
  if path.exists():
    try:
      there = config_lib.load(path).to_dict()
    except (UserError, AttributeError, TypeError, ValueError):
      aside = path.with_suffix(".json.damaged")
      if jax.process_index() == 0:
        path.replace(aside)
      logging.warning("%s is damaged; kept as %s", path, aside.name)
    else:
      compare(workdir, there, config)
  if jax.process_index() == 0:
    partial = path.with_suffix(".partial")
    config_lib.save(config, partial)
    partial.replace(path)
  distributed.check_shared(path)


def compare(
  workdir: pathlib.Path, there: Mapping[str, Any], config: ConfigDict
) -> None:
  """Raises a UserError that lists how a run's config differs from `config`."""
  changed = config_lib.differences(there, config.to_dict())
  if changed:
    raise UserError(
      f"--workdir={workdir} was made by another config: "
      f"{'; '.join(changed)}. Use another workdir, or the old values"
    )
