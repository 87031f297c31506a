"""One strict test session: eight CPU devices, warnings and rank promotion."""

import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import jax  # noqa: E402
import pytest  # noqa: E402
from absl import flags  # noqa: E402

jax.config.update("jax_num_cpu_devices", 8)
# Compilation dominates the suite: half of its time goes without these passes.
jax.config.update("jax_disable_most_optimizations", True)
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
