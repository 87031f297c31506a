"""Round trips, retention, and every kind of damage."""

import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spectraldiffusion_jax import checkpoint, sharding
from spectraldiffusion_jax.errors import UserError

# Orbax leaves coroutines unawaited when a file it reads is damaged.
pytestmark = pytest.mark.filterwarnings(
  "ignore::pytest.PytestUnraisableExceptionWarning",
  "ignore::ResourceWarning",
)

CONFIG = {"seed": 0, "model": {"width": 8, "crop": [1, 2]}}


def make_state(step: int):
  key = jax.random.fold_in(jax.random.key(0), step)
  return {
    "step": jnp.asarray(step, jnp.int32),
    "kernel": jax.random.normal(key, (16, 8)),
    "half": jax.random.normal(key, (5,)).astype(jnp.bfloat16),
    "flag": jnp.array([True, False]),
  }


def abstract(state):
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
    state,
  )


def save(folder, steps, metrics=None, **options):
  with checkpoint.Checkpoints(folder, **options) as checkpoints:
    for step in steps:
      score = {} if metrics is None else {"val/ari": metrics[step]}
      checkpoints.save(step, make_state(step), config=CONFIG, metrics=score)
  return checkpoints


def equal(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    assert x.dtype == y.dtype
    np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def test_round_trip_with_record(tmp_path):
  save(tmp_path, [3])
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    state, record = checkpoints.restore_latest(abstract(make_state(0)))
  equal(state, make_state(3))
  assert record["config"] == CONFIG and record["step"] == 3


def test_an_empty_workdir_has_nothing_to_restore(tmp_path):
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.restore_latest(abstract(make_state(0))) is None


def test_newest_and_best_are_kept(tmp_path):
  scores = {1: 0.1, 2: 0.9, 3: 0.2, 4: 0.3, 5: 0.4}
  save(tmp_path, scores, scores, keep_last=2)
  with checkpoint.Checkpoints(tmp_path, keep_last=2) as checkpoints:
    assert checkpoints.steps() == [2, 4, 5]
    assert checkpoints.best_step() == 2


def test_unscored_checkpoints_do_not_pile_up(tmp_path):
  save(tmp_path, range(6), keep_last=2)
  with checkpoint.Checkpoints(tmp_path, keep_last=2) as checkpoints:
    assert checkpoints.steps()[-2:] == [4, 5]
    assert len(checkpoints.steps()) <= 3


def test_fingerprint_is_the_same_on_every_mesh():
  tree = {"x": np.random.default_rng(0).normal(size=(16, 8)).astype("f")}
  prints = []
  for sizes in (dict(), dict(data=2, fsdp=2, model=2)):
    mesh = sharding.make_mesh(**sizes)
    spread = jax.device_put(
      tree, {"x": sharding.NamedSharding(mesh, sharding.P("data", "model"))}
    )
    prints.append(np.asarray(checkpoint.fingerprint(spread)))
  prints.append(np.asarray(checkpoint.fingerprint(tree)))
  np.testing.assert_array_equal(prints[0], prints[1])
  np.testing.assert_array_equal(prints[0], prints[2])


@pytest.mark.parametrize("bit", [0, 17, 31])
def test_fingerprint_sees_any_flipped_bit_and_any_swap(bit):
  x = np.random.default_rng(1).normal(size=(7, 5)).astype(np.float32)
  before = np.asarray(checkpoint.fingerprint({"x": x}))
  flipped = x.copy()
  flipped.view(np.uint32)[4, 2] ^= np.uint32(1 << bit)
  assert (np.asarray(checkpoint.fingerprint({"x": flipped})) != before).any()
  swapped = x[:, ::-1].copy()
  assert (np.asarray(checkpoint.fingerprint({"x": swapped})) != before).any()


def damage_cases(folder: pathlib.Path):
  files = sorted(p for p in folder.rglob("*") if p.is_file())
  for path in files:
    for kind in ("removed", "empty", "truncated", "flipped"):
      yield path.relative_to(folder), kind


def damage(path: pathlib.Path, kind: str) -> None:
  content = path.read_bytes()
  middle = len(content) // 2
  if kind == "removed":
    path.unlink()
  elif kind == "empty":
    path.write_bytes(b"")
  elif kind == "truncated":
    path.write_bytes(content[:middle])
  else:
    flipped = bytes([content[middle] ^ 0x40]) if content else b""
    path.write_bytes(content[:middle] + flipped + content[middle + 1 :])


def test_no_damaged_file_restores_wrong_numbers(tmp_path):
  pristine = tmp_path / "pristine"
  save(pristine, [1, 2])
  newest = pristine / checkpoint.FOLDER / "2"
  cases = list(damage_cases(newest))
  assert len(cases) >= 40
  fallen_back = 0
  for index, (name, kind) in enumerate(cases):
    run = tmp_path / f"case{index}"
    shutil.copytree(pristine, run)
    damage(run / checkpoint.FOLDER / "2" / name, kind)
    with checkpoint.Checkpoints(run) as checkpoints:
      state, record = checkpoints.restore_latest(abstract(make_state(0)))
    equal(state, make_state(record["step"]))
    fallen_back += record["step"] == 1
    if record["step"] == 1:
      assert (run / f"{checkpoint.FOLDER}-damaged" / "2").is_dir()
    shutil.rmtree(run)
  assert fallen_back >= len(cases) // 4


def test_nothing_intact_is_said_not_restarted(tmp_path):
  save(tmp_path, [1])
  shutil.rmtree(tmp_path / checkpoint.FOLDER / "1" / "state")
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    with pytest.raises(UserError, match="every checkpoint .* is damaged"):
      checkpoints.restore_latest(abstract(make_state(0)))


def test_an_empty_folder_named_like_a_step_is_set_aside(tmp_path):
  save(tmp_path, [1])
  (tmp_path / checkpoint.FOLDER / "7").mkdir()
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    state, _ = checkpoints.restore_latest(abstract(make_state(0)))
  equal(state, make_state(1))


def test_a_rewritten_record_is_refused(tmp_path):
  save(tmp_path, [1])
  path = next((tmp_path / checkpoint.FOLDER / "1" / "record").rglob("*meta*"))
  record = json.loads(path.read_text())
  record["config"]["seed"] = 9
  path.write_text(json.dumps(record))
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    with pytest.raises(ValueError, match="digest"):
      checkpoints.restore(1, abstract(make_state(0)))


def test_restores_onto_another_mesh(tmp_path):
  save(tmp_path, [1])
  mesh = sharding.make_mesh(data=2, fsdp=2, model=2)
  state = make_state(1)
  target = jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    state,
    sharding.state_sharding(state, mesh),
  )
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    restored, _ = checkpoints.restore_latest(target)
  equal(restored, state)
  assert restored["kernel"].sharding.mesh.shape["fsdp"] == 2
