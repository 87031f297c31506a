"""Kills tiny runs at random until they are done, then damages what is left.

  python tests/chaos.py --runs=10 --kills=50 --seed=0   (make chaos)

Every run has to end with the arrays, metrics and examples of one that was
never disturbed. Prints one line a life and a JSON summary; exit code 1 if a
promise was broken.
"""

import argparse
import collections
import functools
import json
import os
import pathlib
import random
import shutil
import signal
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

KINDS = ("kill", "save", "term", "save", "early", "kill", "int", "twice")
"""How lives end: SIGKILL after a step, SIGKILL within a save, SIGTERM, SIGKILL
while starting, SIGINT, SIGTERM twice; runs of two processes lose one."""


def arguments() -> argparse.Namespace:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--kills", type=int, default=50)
  parser.add_argument("--runs", type=int, default=100, help="at most")
  parser.add_argument("--seconds", type=float, default=3600.0, help="at most")
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--pairs", type=int, default=2, help="two processes")
  parser.add_argument("--poison", type=int, default=-1, help="a NaN batch")
  parser.add_argument("--damage", type=int, default=1, help="0: kills only")
  parser.add_argument("--data", default="", help="prepared data sets")
  parser.add_argument("--folder", default="", help='"": a temporary one')
  return parser.parse_args()


def live(killing, start, run, kind: str, rng: random.Random) -> int:
  """One life of a run, ended by a signal unless it ends before."""
  pid = start(run)
  done = len(killing.ledger(run))
  target = done + rng.randint(1, 6)
  began, early = time.monotonic(), rng.uniform(0.0, 8.0)
  pause = rng.uniform(0.0, 0.2) if kind == "save" else 0.0
  while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
    if kind == "early":
      now = time.monotonic() - began > early
    else:
      # The last line may be older than this life: it is cut on resume.
      lines = killing.ledger(run)
      now = bool(lines) and lines[-1]["step"] >= target
      now = now and (kind != "save" or killing.saving(run))
    if now:
      time.sleep(pause)
      for number in signals(kind):
        os.kill(pid, number)
        time.sleep(0.05)
      break
    time.sleep(0.005)
  return killing.exit_code(pid)


def signals(kind: str) -> list[int]:
  term, stop, kill = signal.SIGTERM, signal.SIGINT, signal.SIGKILL
  return {"term": [term], "int": [stop], "twice": [term, term]}.get(
    kind, [kill]
  )


def damage(path: pathlib.Path, kind: str, rng: random.Random) -> None:
  content = path.read_bytes()
  place = rng.randrange(len(content)) if content else 0
  if kind == "removed":
    path.unlink()
  elif kind == "empty":
    path.write_bytes(b"")
  elif kind == "truncated":
    path.write_bytes(content[:place])
  elif content:
    flipped = bytes([content[place] ^ (1 << rng.randrange(8))])
    path.write_bytes(content[:place] + flipped + content[place + 1 :])


def damaged(config, run: pathlib.Path, scratch, seed: int) -> dict[str, int]:
  """Every file of the newest checkpoint in every way; call in a child."""
  import jax
  import numpy as np

  from spectraldiffusion_jax import build
  from spectraldiffusion_jax.checkpoint import Checkpoints

  rng, abstract = random.Random(seed), build.abstract_state(config)
  with Checkpoints(run, read_only=True) as checkpoints:
    steps = checkpoints.steps()[-2:]
    good = {s: checkpoints.restore(s, abstract)[0] for s in steps}
  files = [
    p.relative_to(run)
    for p in sorted((run / "checkpoints" / str(steps[-1])).rglob("*"))
    if p.is_file()
  ]
  count = collections.Counter()
  for name in files:
    for kind in ("removed", "empty", "truncated", "flipped", "flipped"):
      copy = scratch / "damaged"
      shutil.rmtree(copy, ignore_errors=True)
      for step in steps:
        part = pathlib.Path("checkpoints", str(step))
        shutil.copytree(run / part, copy / part)
      damage(copy / name, kind, rng)
      with Checkpoints(copy) as checkpoints:
        state, record = checkpoints.restore_latest(abstract)
      pairs = zip(
        jax.tree.leaves(state),
        jax.tree.leaves(good[record["step"]]),
        strict=True,
      )
      wrong = not all(np.array_equal(a, b, equal_nan=True) for a, b in pairs)
      count["cases"] += 1
      count["silent_wrong"] += wrong
      count["fell_back"] += record["step"] == steps[0]
  return dict(count)


def one_run(killing, start, run, *, kinds, rng, ends) -> None:
  """Kills a run until it is complete; how its lives ended goes to `ends`."""
  code = None
  while code != 0:
    kind = next(kinds)
    code = live(killing, start, run, kind, rng)
    step = len(killing.ledger(run))
    print(f"{run.name} {kind}: exit {code}, step {step}", flush=True)
    assert code in (0, 75, -9, -15, 143, -2), (run / "log.txt").read_text()
    if code:
      ends[f"{kind} {code}"] += 1


def start_pair(data: pathlib.Path, run: pathlib.Path) -> list:
  """The same run in two processes of two devices each."""
  import killing
  import process_runs

  return process_runs.start_training(
    killing.fields(data),
    run,
    config="configs/procedural.py:baseline",
    devices=2,
    heartbeat=30,
  )


def one_pair(killing, data, run, rng, ends) -> None:
  """Kills one of two processes until the run is complete.

  The first two lives end by SIGKILL, of the first and of the second process;
  the other process has to stop by itself.
  """
  import process_runs

  for victim in (0, 1, None):
    running = start_pair(data, run)
    target = len(killing.ledger(run)) + rng.randint(2, 5)
    while victim is not None and len(killing.ledger(run)) < target:
      if any(process.poll() is not None for process in running):
        raise RuntimeError(process_runs.finish(running, timeout=60))
      time.sleep(0.005)
    began = time.monotonic()
    if victim is not None:
      time.sleep(rng.uniform(0.0, 0.3))
      running[victim].kill()
    done = process_runs.finish(running)
    codes = [code for code, _, _ in done]
    seconds = round(time.monotonic() - began, 1)
    step = len(killing.ledger(run))
    print(f"{run.name}: exit {codes}, step {step}, {seconds} s", flush=True)
    if victim is None:
      assert codes == [0, 0], done
    else:
      assert codes[victim] == -9 and codes[1 - victim] in (69, -6), done
      ends[f"one of two: the other {codes[1 - victim]}"] += 1


def count_same(killing, count, run, whole, arrays, wanted) -> None:
  """Compares a complete run with the undisturbed one."""
  import numpy as np

  same = all(
    np.array_equal(a, b, equal_nan=True)
    for a, b in zip(wanted, arrays, strict=True)
  )
  count["runs"] += 1
  count["runs_identical"] += same
  count["curves_identical"] += killing.metrics(run) == killing.metrics(whole)
  count["order_identical"] += killing.ledger(run) == killing.ledger(whole)
  count["examples_wrong"] += killing.miscounted(run)
  count["reports"] += (run / "divergence.json").exists()


def main() -> int:
  options = arguments()
  folder = pathlib.Path(options.folder or tempfile.mkdtemp(prefix="chaos"))
  folder.mkdir(parents=True, exist_ok=True)
  import killing
  import process_runs

  os.environ.update(killing.environment(folder / "cache"))

  from spectraldiffusion_jax import train_loop  # noqa: F401, before the forks

  data = pathlib.Path(options.data or folder / "data")
  if not options.data:
    killing.in_child(lambda: killing.prepare(data), folder)
  config = killing.config(data)
  start = functools.partial(killing.train, config, poison=options.poison)
  rng, began = random.Random(options.seed), time.monotonic()
  count, ends = collections.Counter(), collections.Counter()
  kinds = iter(KINDS * options.kills)

  def arrays(run):
    state = functools.partial(killing.final_state, config, run, killing.STEPS)
    return killing.in_child(state, folder)

  whole = folder / "whole"
  assert killing.exit_code(start(whole)) == 0
  wanted = arrays(whole)
  compare = functools.partial(count_same, killing, count)
  while (
    ends.total() < options.kills
    and count["runs"] < options.runs
    and time.monotonic() - began < options.seconds
  ):
    run = folder / f"run{count['runs']}"
    one_run(killing, start, run, kinds=kinds, rng=rng, ends=ends)
    compare(run, whole, arrays(run), wanted)
  if options.pairs:
    whole_pair = folder / "whole_pair"
    done = process_runs.finish(start_pair(data, whole_pair))
    assert [code for code, _, _ in done] == [0, 0], done
    wanted = arrays(whole_pair)
  for number in range(options.pairs):
    run = folder / f"pair{number}"
    one_pair(killing, data, run, rng, ends)
    compare(run, whole_pair, arrays(run), wanted)
  summary = {"kills": ends.total(), **count, "ends": dict(sorted(ends.items()))}
  if options.damage:
    checked = lambda: damaged(config, whole, folder, options.seed)
    summary |= killing.in_child(checked, folder)
  summary["seconds"] = round(time.monotonic() - began)
  print(json.dumps(summary, indent=2))
  broken = count["examples_wrong"] + summary.get("silent_wrong", 0)
  for name in ("runs_identical", "curves_identical", "order_identical"):
    broken += summary["runs"] - summary[name]
  if not options.folder:
    shutil.rmtree(folder)
  return int(broken > 0)


if __name__ == "__main__":
  sys.exit(main())
