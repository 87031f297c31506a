"""Forms of the selective scan beside the sequential loop.

Time of one forward pass and of one gradient, and the bytes the compiler sets
aside for temporaries in each. The forms take turns, so that a change in the
machine's load meets all of them.
"""

import statistics
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from spectraldiffusion_jax.ops import scan

LENGTHS = (256, 1024, 4096, 16384)
FORMS = {
  "sequential": {"method": "sequential"},
  "associative": {"method": "associative"},
  "associative, one chunk": {"method": "associative", "chunk": 1 << 30},
  "chunked": {"method": "chunked"},
}


def _arguments(length: int, heads: int, width: int, state: int) -> tuple:
  rng = np.random.default_rng(0)
  arrays = (
    rng.normal(size=(length, heads, width)),
    rng.exponential(0.1, size=(length, heads)),
    -rng.uniform(1, 16, size=(heads, 1)),
    rng.normal(size=(length, state)),
    rng.normal(size=(length, state)),
  )
  return tuple(jnp.asarray(x, jnp.float32) for x in arrays)


def _compile(form: str, arrays: tuple) -> dict[str, Callable]:
  """The compiled forward pass and gradient of one form."""

  def value(*arrays):
    return jnp.sum(scan.selective_scan(*arrays, **FORMS[form])[0] ** 2)

  gradient = jax.grad(value, argnums=tuple(range(len(arrays))))
  return {
    name: jax.jit(function).lower(*arrays).compile()
    for name, function in (("forward", value), ("gradient", gradient))
  }


def _milliseconds(function: Callable, arrays: tuple) -> float:
  start = time.perf_counter()
  jax.block_until_ready(function(*arrays))
  return 1e3 * (time.perf_counter() - start)


def _difference(gradients: tuple, reference: tuple) -> float:
  """Largest difference of any gradient, relative to its largest entry."""
  return max(
    float(jnp.abs(a - b).max() / jnp.abs(b).max())
    for a, b in zip(gradients, reference, strict=True)
  )


def _rows(length: int, forms: Sequence[str], repeats: int, size: tuple):
  """One row for each form at one length."""
  arrays = _arguments(length, *size)
  compiled = {form: _compile(form, arrays) for form in forms}
  times = {(f, p): [] for f in forms for p in ("forward", "gradient")}
  for form, part in times:
    compiled[form][part](*arrays)  # the first call allocates
  for _ in range(repeats):
    for form, part in times:
      took = _milliseconds(compiled[form][part], arrays)
      times[form, part].append(took)
  reference = compiled["sequential"]["gradient"](*arrays)
  for form in forms:
    row = {"length": length, "form": form}
    for part in ("forward", "gradient"):
      base = statistics.median(times["sequential", part])
      took = statistics.median(times[form, part])
      memory = compiled[form][part].memory_analysis().temp_size_in_bytes
      row |= {
        f"{part}_ms": took,
        f"{part}_speedup": base / took,
        f"{part}_megabytes": memory / 1e6,
      }
    got = compiled[form]["gradient"](*arrays)
    yield row | {"gradient_difference": _difference(got, reference)}


def run(
  *,
  lengths: Sequence[int] = LENGTHS,
  repeats: int = 5,
  size: tuple[int, int, int] = (4, 16, 64),
  longest_single_chunk: int = 4096,
) -> list[dict]:
  """Measures every form at every length; times are medians.

  Args:
    lengths: tokens.
    repeats: timed calls of each form.
    size: heads, channels per head, states.
    longest_single_chunk: above it the one-chunk form is left out: its
      temporaries are several times the L M P S states.

  Returns:
    Rows with length, form, milliseconds, speed-up over "sequential" and
    megabytes of temporaries, forward and gradient, and the difference of the
    gradients from those of "sequential".
  """
  rows = []
  for length in lengths:
    single = length <= longest_single_chunk
    forms = [f for f in FORMS if single or f != "associative, one chunk"]
    rows += _rows(length, forms, repeats, size)
  return rows
