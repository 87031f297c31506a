"""What every command in launch/ does around its main: flags, errors, codes."""

import logging
import pathlib
import re
import sys
from collections.abc import Callable
from typing import Any

from absl import app, flags
from ml_collections import ConfigDict

from spectraldiffusion_jax.errors import UserError, one_line

USER_ERROR = 2
INTERRUPTED = 130  # as a shell reports a process that Ctrl-C ended


def run(main: Callable[[list[str]], int | None]) -> None:
  """Parses the flags, runs main and exits with its code.

  A UserError and a flag that cannot be parsed are one line on stderr and exit
  code 2, Ctrl-C is exit code 130; any other exception keeps its traceback, for
  it is a defect of this program.

  Args:
    main: called with the arguments that are not flags, program name first;
      returns the exit code, None for 0.
  """

  def guarded(argv: list[str]) -> int | None:
    if flags.FLAGS.verbosity < 1:
      # TFDS and Orbax tell every file they open through the first logger, and
      # a failed write in four tracebacks before it is raised; JAX tells every
      # backend that is not there through the second.
      logging.getLogger("absl").setLevel(logging.CRITICAL)
      logging.getLogger("jax").setLevel(logging.WARNING)
    try:
      return main(argv)
    except UserError as error:
      return _report(error)
    except KeyboardInterrupt:
      print("interrupted", file=sys.stderr)
      return INTERRUPTED

  # Config files import each other as configs.NAME, wherever one stands.
  sys.path.insert(0, str(pathlib.Path(sys.argv[0]).resolve().parent.parent))
  app.run(guarded, flags_parser=_parse)


def define_cluster_flags() -> Callable[[], dict[str, Any]]:
  """Flags of a run in several processes; returns a reader of their values.

  The values are the arguments of `distributed.start`.
  """
  holders = (
    flags.DEFINE_string(
      "coordinator",
      "",
      "HOST:PORT of process 0, for a run in several processes; empty: detect "
      "the cluster (Slurm, GKE and Cloud TPU, Open MPI).",
    ),
    flags.DEFINE_integer(
      "num_processes",
      0,
      "Processes of the run; 0: detect, 1: detect nothing. A cluster with "
      "another number is refused.",
      0,
    ),
    flags.DEFINE_integer("process_id", -1, "This process; -1: detect.", -1),
    flags.DEFINE_integer(
      "initialization_timeout", 300, "Seconds to wait for the others.", 1
    ),
    flags.DEFINE_integer(
      "heartbeat_timeout",
      60,
      "Seconds of silence after which a process counts as dead.",
      1,
    ),
  )
  return lambda: {holder.name: holder.value for holder in holders}


def require(flag: flags.FlagHolder, name: str) -> Any:
  """Returns the flag's value.

  Raises:
    UserError: the flag is not given or empty.
  """
  value = flag.value
  if value is None or value == "":
    raise UserError(f"--{name} is required; --help lists the flags")
  if name == "config" and not isinstance(value, ConfigDict):
    raise UserError(f"--{name}={_given(name)} holds no config or is no file")
  return value


def _given(name: str) -> str:
  """The value of a flag as it was typed."""
  begin = f"--{name}="
  typed = [a.removeprefix(begin) for a in sys.argv if a.startswith(begin)]
  return typed[-1] if typed else "?"


def no_arguments(argv: list[str]) -> None:
  """Raises a UserError if there are arguments besides the flags."""
  if argv[1:]:
    raise UserError(f"unexpected argument {argv[1]!r}; --help lists the flags")


def _parse(
  argv: list[str], values: flags.FlagValues = flags.FLAGS
) -> list[str]:
  try:
    return values(argv)
  # A config flag runs its file and sets fields here, and so fails in as many
  # ways as those can.
  except (flags.Error, UserError, AttributeError, KeyError) as error:
    sys.exit(_report(error))
  except Exception as error:
    sys.exit(_report(f"{type(error).__name__}: {error}"))


def _without_traceback(message: str) -> str:
  """ml_collections puts a whole traceback into what it says."""
  head, found, trace = message.partition("Traceback (most recent call last)")
  last = trace.strip().rpartition("\n")[2]
  return f"{head} {last}" if found else message


def _field_unknown(error: Exception) -> str:
  """What ml_collections says of a field that there is not, as it was typed."""
  said = error.args[0] if error.args else ""
  if isinstance(said, KeyError):  # within an AttributeError
    said = said.args[0]
  said = str(said)
  found = re.fullmatch(r"'?(\w+)'?\s*(Did you mean .*)?", said, re.DOTALL)
  if not found:
    return said
  typed = (a.partition("=")[0] for a in sys.argv)
  field = next((a for a in typed if a.endswith(f".{found[1]}")), found[1])
  hint = found[2] or "configs/default.py lists all fields"
  return f"{field}: the config has no such field. {hint}"


def _report(error: Exception | str) -> int:
  """Prints the error as one line and returns its exit code."""
  if isinstance(error, KeyError | AttributeError):
    error = _field_unknown(error)
  text = one_line(_without_traceback(str(error)))
  print("error:", text, file=sys.stderr)
  return USER_ERROR
