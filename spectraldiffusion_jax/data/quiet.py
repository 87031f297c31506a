"""TFDS without its own bars and printed sizes: it knows neither total."""

import contextlib
import io
from collections.abc import Iterator

import tensorflow_datasets as tfds


@contextlib.contextmanager
def tfds_silent() -> Iterator[None]:
  """Leaves the terminal to the progress bar of the caller."""
  tfds.disable_progress_bar()
  try:
    with contextlib.redirect_stdout(io.StringIO()):
      yield
  finally:
    tfds.enable_progress_bar()
