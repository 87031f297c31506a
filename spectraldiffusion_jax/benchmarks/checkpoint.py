"""What saving costs: share of the time of `interval` steps, in one run.

Three kinds of block take turns, so that a change in the machine's load meets
all: steps alone, steps with an asynchronous save after the first, steps with
a save that is waited for.
"""

import collections
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from spectraldiffusion_jax.checkpoint import Checkpoints, fingerprint

KINDS = ("none", "async", "sync")


def make_toy(
  width: int, rows: int, depth: int
) -> tuple[dict, Callable[[dict], dict]]:
  """A state of 3 * depth * width**2 numbers, and a donating Adam step."""
  x = jax.random.normal(jax.random.key(0), (rows, width))
  keys = jax.random.split(jax.random.key(1), depth)
  params = {
    f"layer{i}": jax.random.normal(key, (width, width)) / width**0.5
    for i, key in enumerate(keys)
  }
  optimizer = optax.adam(1e-3)

  def loss(params):
    y = x
    for w in params.values():
      y = jnp.tanh(y @ w)
    return jnp.mean((y - x) ** 2)

  def step(state):
    grads = jax.grad(loss)(state["params"])
    updates, moments = optimizer.update(grads, state["moments"])
    params = optax.apply_updates(state["params"], updates)
    return {"params": params, "moments": moments}

  state = {"params": params, "moments": optimizer.init(params)}
  return state, jax.jit(step, donate_argnums=0)


def _save(
  checkpoints: Checkpoints,
  number: int,
  state: dict,
  times: dict[str, list[float]],
  *,
  wait: bool,
) -> None:
  """One save after the step is done; seconds go to three lists of `times`."""
  jax.block_until_ready(state)
  began = time.perf_counter()
  jax.block_until_ready(fingerprint(state))
  times["fingerprint"].append(time.perf_counter() - began)
  began = time.perf_counter()
  checkpoints.save(number, state, config={}, metrics={})
  times["blocked"].append(time.perf_counter() - began)
  if wait:
    checkpoints.wait()
    times["written"].append(time.perf_counter() - began)


def run(
  *,
  width: int = 512,
  rows: int = 512,
  depth: int = 8,
  interval: int = 50,
  repeats: int = 5,
) -> dict[str, float | str]:
  """Measures blocks of `interval` steps of each kind; medians.

  Args:
    width: of the square layers.
    rows: of the batch.
    depth: layers.
    interval: steps between saves.
    repeats: blocks of each kind.

  Returns:
    device, megabytes of the state, step_ms without saves, blocked_ms of an
    asynchronous `save` beyond the wait for the step, fingerprint_ms within it,
    sync_ms until a save is on disk, and async_share and sync_share, by which
    blocks with a save took longer.
  """
  state, step = make_toy(width, rows, depth)
  size = sum(x.nbytes for x in jax.tree.leaves(state))
  state = jax.block_until_ready(step(state))
  jax.block_until_ready(fingerprint(state))
  times = collections.defaultdict(list)
  with tempfile.TemporaryDirectory() as folder:
    with Checkpoints(pathlib.Path(folder), keep_last=1) as checkpoints:
      for number in range(len(KINDS) * (1 + repeats)):
        checkpoints.wait()
        kind = KINDS[number % len(KINDS)]
        began = time.perf_counter()
        state = step(state)
        if kind != "none":
          _save(checkpoints, number, state, times, wait=kind == "sync")
        for _ in range(interval - 1):
          state = step(state)
        jax.block_until_ready(state)
        times[kind].append(time.perf_counter() - began)
  # The first block of each kind warms up.
  median = {k: statistics.median(v[1:]) for k, v in times.items()}
  none, background, sync = (median[kind] for kind in KINDS)
  return {
    "device": jax.devices()[0].device_kind,
    "megabytes": size / 1e6,
    "step_ms": 1e3 * none / interval,
    "blocked_ms": 1e3 * median["blocked"],
    "fingerprint_ms": 1e3 * median["fingerprint"],
    "sync_ms": 1e3 * median["written"],
    "async_share": background / none - 1,
    "sync_share": sync / none - 1,
  }
