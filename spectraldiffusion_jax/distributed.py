"""Several processes as one run: start, agreement, and a loud end.

Every process executes the same program on its own devices. What they have to
agree on is asked here; what only one may do is done by process 0. A process
that fails leaves at once, and the others follow within a bounded time: none
ever goes on alone.
"""

import hashlib
import logging
import os
import pathlib
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from spectraldiffusion_jax.errors import UserError

T = TypeVar("T")

LOST_PEER = 69
"""Exit code of a process that lost contact with another one
(EX_UNAVAILABLE of sysexits.h); the newest checkpoint is intact."""

USER_ERROR, DEFECT = 2, 1
_SIGNS = (
  "gloo",
  "nccl",
  "connection reset",
  "connection closed",
  "coordination service",
  "coordinationservice",
  "heartbeat",
  "unavailable",
  "deadline_exceeded",
  "barrier",
)
"""Words of the errors that a collective raises when a peer is gone."""


def start(
  *,
  coordinator: str,
  num_processes: int,
  process_id: int,
  initialization_timeout: int,
  heartbeat_timeout: int,
) -> None:
  """Joins the processes of this run; call it before any use of JAX.

  Without `coordinator` the cluster is detected by JAX (Slurm, GKE and Cloud
  TPU, Open MPI); where there is none, one process it is.

  Args:
    coordinator: HOST:PORT of process 0, "" to detect it.
    num_processes: of the run; 0 to detect it, 1 to detect nothing.
    process_id: of this process, -1 to detect it.
    initialization_timeout: seconds to wait for the other processes.
    heartbeat_timeout: seconds of silence after which a process counts as dead.

  Raises:
    UserError: the flags do not fit together, or a process did not come.
  """
  _check(coordinator, num_processes, process_id)
  if num_processes == 1 and not coordinator:
    return
  explicit = (
    dict(
      coordinator_address=coordinator,
      num_processes=num_processes,
      process_id=process_id,
      cluster_detection_method="deactivate",
    )
    if coordinator
    else {}
  )
  _join(explicit, num_processes, initialization_timeout, heartbeat_timeout)
  if num_processes not in (0, jax.process_count()):
    raise UserError(
      f"--num_processes={num_processes}, but the cluster has "
      f"{jax.process_count()} processes"
    )


def _join(
  explicit: dict,
  num_processes: int,
  initialization_timeout: int,
  heartbeat_timeout: int,
) -> None:
  """Starts jax.distributed; its failures as UserErrors, see `start`."""
  began = time.monotonic()
  try:
    with warnings.catch_warnings():
      # A pod without the kubernetes package: the flags say what it would.
      warnings.simplefilter("ignore")
      jax.distributed.initialize(
        **explicit,
        initialization_timeout=initialization_timeout,
        heartbeat_timeout_seconds=heartbeat_timeout,
      )
  except ValueError as error:
    if explicit or "coordinator_address" not in str(error):
      raise UserError(f"processes: {error}") from None
    if num_processes:
      raise UserError(
        f"--num_processes={num_processes}: no cluster was detected; give "
        "--coordinator=HOST:PORT and --process_id as well"
      ) from None
  except RuntimeError as error:
    raise UserError(
      f"processes: not all of them came within {time.monotonic() - began:.0f} s"
      f" (--initialization_timeout={initialization_timeout}): "
      f"{str(error).splitlines()[0][:200]}"
    ) from None


def _check(coordinator: str, num_processes: int, process_id: int) -> None:
  """Raises a UserError unless the flags name one process of a run."""
  if not coordinator and process_id >= 0:
    raise UserError(f"--process_id={process_id} needs --coordinator=HOST:PORT")
  if not coordinator:
    return
  host, _, port = coordinator.rpartition(":")
  if not host or not port.isdigit():
    raise UserError(f"--coordinator={coordinator} is not HOST:PORT")
  if not 0 <= process_id < num_processes:
    raise UserError(
      f"--coordinator needs --process_id in 0..--num_processes - 1, not "
      f"{process_id} of {num_processes}"
    )


def together(job: Callable[[], int | None]) -> int | None:
  """Runs `job` in every process; a failure in one of them ends all.

  With several processes an exception ends this process at once: the orderly
  exit of JAX waits for the others, which in turn wait for this one's share
  of a collective. They see the connection close and end with LOST_PEER, or,
  where a collective cannot see it, are ended by JAX's coordination service
  after its heartbeat timeout. Only process 0 keeps its standard output.

  Returns:
    What `job` returns.
  """
  if jax.process_count() == 1:
    return job()
  if jax.process_index():
    sys.stdout = open(os.devnull, "w")
  try:
    return job()
  except BaseException as error:
    code = _report(error)
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _report(error: BaseException) -> int:
  """Says on stderr what happened, and returns the exit code for it."""
  who = f"process {jax.process_index()} of {jax.process_count()}"
  if isinstance(error, UserError):
    print(f"error: {who}: {error}", file=sys.stderr)
    return USER_ERROR
  if lost_peer(error):
    reason = " ".join(str(error).split())[:160]
    print(
      f"error: {who} lost contact with another process and stops; start all "
      "again with the same --workdir to go on from the newest checkpoint "
      f"({reason})",
      file=sys.stderr,
    )
    return LOST_PEER
  traceback.print_exception(error)
  return DEFECT


def lost_peer(error: BaseException) -> bool:
  """Whether an error is that of a collective whose other side is gone."""
  return isinstance(error, (RuntimeError, ValueError)) and any(
    sign in str(error).lower() for sign in _SIGNS
  )


def all_agree(here: bool) -> bool:
  """Whether `here` is true in every process; each has to ask."""
  if jax.process_count() == 1:
    return here
  return bool(np.all(multihost_utils.process_allgather(np.array(here))))


def first_says(here: bool) -> bool:
  """What process 0 passed; each process has to ask."""
  if jax.process_count() == 1:
    return here
  return bool(multihost_utils.broadcast_one_to_all(np.array(here)))


def wait(name: str) -> None:
  """Returns once every process has come to the point called `name`."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(name)


def first_alone(make: Callable[[], T]) -> T:
  """Returns `make()`, called in process 0 before the others may.

  For what prepares a file where it is absent: the others find it there.
  """
  if jax.process_index() == 0:
    made = make()
    wait("made")
    return made
  wait("made")
  return make()


def check_same(text: str, what: str) -> None:
  """Raises a UserError in every process unless all passed the same text.

  Processes with different configs would train different models, or wait for
  each other for ever.
  """
  if jax.process_count() == 1:
    return
  digest = np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint8)
  every = multihost_utils.process_allgather(digest)
  others = np.flatnonzero((every != every[0]).any(axis=1)).tolist()
  if others:
    raise UserError(
      f"{what} of process {others[0]} is not that of process 0: start every "
      "process with the same code, flags and config"
    )


def check_shared(path: pathlib.Path, *, patience: float = 30.0) -> None:
  """Raises a UserError if a file of process 0 is not seen here.

  Args:
    path: a file that process 0 has written.
    patience: seconds that a network file system is given to show it.
  """
  wait(f"written {path.name}")
  deadline = time.monotonic() + patience
  while not path.exists():
    if time.monotonic() > deadline:
      raise UserError(
        f"--workdir={path.parent} is not the same folder in every process: "
        "use storage that all machines share"
      )
    time.sleep(0.2)
