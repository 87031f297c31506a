"""One strict test session: eight CPU devices, warnings and rank promotion."""

import atexit
import os
import pathlib
import shutil
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# Compilation dominates the suite: half of its time goes without these passes,
# here and in the processes that tests start.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

# One cache for the workers and the processes that tests start: much of what
# they compile is the same. The first to come makes it, and removes it.
CACHE = "JAX_COMPILATION_CACHE_DIR"
if CACHE not in os.environ:
  os.environ[CACHE] = tempfile.mkdtemp(prefix="compiled")
  atexit.register(shutil.rmtree, os.environ[CACHE], ignore_errors=True)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")

import jax  # noqa: E402
import pytest  # noqa: E402
from absl import flags  # noqa: E402

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_threefry_partitionable", True)
if not flags.FLAGS.is_parsed():
  flags.FLAGS.mark_as_parsed()

ROOT = pathlib.Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def root() -> pathlib.Path:
  """The checkout's root folder."""
  return ROOT


@pytest.fixture(scope="session")
def shared_data() -> pathlib.Path:
  """Folder of real data samples; the test is skipped where it is absent."""
  shared = os.environ.get("SPECTRALDIFFUSION_SHARED", "../shared")
  path = (ROOT / shared).resolve() / "data"
  if not path.is_dir():
    pytest.skip(f"no real data at {path}; set SPECTRALDIFFUSION_SHARED")
  return path
