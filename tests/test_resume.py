"""Killed runs, counted examples, another mesh; `make chaos` does it longer."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest
import toy_scenes
from test_train_step import batch, make

from spectraldiffusion_jax import sharding
from spectraldiffusion_jax.checkpoint import Checkpoints


@pytest.mark.slow
def test_a_handful_of_kills_changes_nothing(root):
  # Batch 7 is not finite: the run rolls back once, killed or not.
  flags = ["--kills=4", "--runs=1", "--pairs=0", "--damage=0", "--seed=3"]
  done = subprocess.run(
    [sys.executable, "tests/chaos.py", "--poison=7", *flags],
    cwd=root,
    capture_output=True,
    text=True,
    timeout=560,
  )
  assert done.returncode == 0, done.stdout + done.stderr
  summary = json.loads(done.stdout[done.stdout.index("{") :])
  assert summary["kills"] >= 2 and summary["reports"] == 1
  assert summary["runs_identical"] == summary["curves_identical"] == 1
  assert summary["order_identical"] == 1 and summary["examples_wrong"] == 0


def test_a_run_goes_on_on_another_mesh_within_tolerance(tmp_path):
  state, step = make()
  state, _ = jax.jit(step)(state, batch())
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, state, config={}, metrics={})
  mesh = sharding.make_mesh(data=2, fsdp=2, model=2)
  at = sharding.state_sharding(state, mesh)
  target = jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, at
  )
  with Checkpoints(tmp_path) as checkpoints:
    other, _ = checkpoints.restore_latest(target)
  spread = jax.jit(step, in_shardings=(at, sharding.batch_sharding(mesh)))
  for seed in (1, 2):
    state, ours = jax.jit(step)(state, batch(seed))
    other, theirs = spread(other, sharding.shard_batch(batch(seed), mesh))
  np.testing.assert_allclose(ours["loss"], theirs["loss"], rtol=1e-5)
  np.testing.assert_allclose(state.params["w"], other.params["w"], rtol=1e-5)


COUNT = """
import itertools
import json
import sys
sys.path.insert(0, "tests")
from absl import flags
import test_pipeline
if __name__ == "__main__":
  flags.FLAGS.mark_as_parsed()
  seen = []
  # 23 examples in batches of 4: 23 batches are four whole epochs.
  for first, last in ((0, 5), (5, 6), (6, 23)):
    batches = test_pipeline.pipeline.make_train(
      **test_pipeline.TRAIN
      | {"num_workers": int(sys.argv[2]), "batch_size": 4},
      data_root=sys.argv[1],
      first_batch=first,
    )
    part = itertools.islice(batches, last - first)
    seen += [i for batch in part for i in batch["index"].tolist()]
    batches.close()
  print(json.dumps(seen))
"""


@pytest.mark.slow
def test_no_example_is_lost_or_doubled_with_any_number_of_workers(
  tmp_path, root
):
  data = toy_scenes.prepare(tmp_path / "data")
  script, orders = tmp_path / "count.py", []
  script.write_text(COUNT)
  for workers in (0, 1, 2):
    done = subprocess.run(
      [sys.executable, str(script), str(data), str(workers)],
      cwd=root,
      capture_output=True,
      text=True,
      timeout=400,
    )
    assert done.returncode == 0, done.stderr
    orders.append(json.loads(done.stdout.splitlines()[-1]))
  assert orders[0] == orders[1] == orders[2]
  for epoch in np.reshape(orders[0], (4, 23)):
    assert sorted(epoch) == list(range(23))
