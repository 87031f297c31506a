"""Gradients are synchronised: a device or process on its own is found."""

import jax
import jax.numpy as jnp
import numpy as np
import process_runs
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from spectraldiffusion_jax import replicas, sharding
from spectraldiffusion_jax.errors import UserError

STEPS = 3


def loss(params, rows):
  return jnp.mean(jnp.tanh(rows @ params["kernel"] + params["bias"][None]) ** 2)


def start(mesh):
  values = {"kernel": np.ones((4, 8), np.float32), "bias": np.zeros(8, "f")}
  placed = sharding.state_sharding(values, mesh)
  return jax.device_put(values, placed), placed


def rows_of(step, count=16):
  random = np.random.default_rng(step)
  return random.normal(size=(count, 4)).astype(np.float32)


def train(mesh, rows_at):
  """A few steps of plain gradient descent, sharded as a real run is."""
  params, placed = start(mesh)
  data = sharding.batch_sharding(mesh)

  def update(params, rows):
    grads = jax.grad(loss)(params, rows)
    return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)

  step = jax.jit(update, in_shardings=(placed, data), out_shardings=placed)
  for number in range(STEPS):
    batch = sharding.shard_batch({"rows": rows_at(number)}, mesh)
    params = step(params, batch["rows"])
  return params


def train_alone(mesh, rows_at):
  """The defect: every device follows the gradient of its own rows."""

  def update(params, rows):
    grads = jax.grad(loss)(params, rows)
    return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)

  rows = P(("data", "fsdp"))
  step = jax.jit(
    jax.shard_map(
      update, mesh=mesh, in_specs=(P(), rows), out_specs=P(), check_vma=False
    )
  )
  params = jax.device_put(
    jax.device_get(start(sharding.make_mesh(devices=jax.local_devices()))[0]),
    NamedSharding(mesh, P()),
  )
  for number in range(STEPS):
    batch = sharding.shard_batch({"rows": rows_at(number)}, mesh)
    params = step(params, batch["rows"])
  return params


@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 4, 1), (2, 2, 2)])
def test_synchronised_devices_are_in_step_and_learn_from_all_rows(sizes):
  mesh = sharding.make_mesh(**dict(zip(sharding.AXES, sizes, strict=True)))
  params = train(mesh, rows_of)
  assert replicas.out_of_step(params) == []
  replicas.check(params)
  half = train(mesh, lambda n: np.tile(rows_of(n)[:8], (2, 1)))
  for name in params:
    gap = np.abs(np.asarray(params[name]) - np.asarray(half[name])).max()
    assert gap > 1e-4, name


def test_devices_that_train_alone_are_found():
  params = train_alone(sharding.make_mesh(), rows_of)
  assert replicas.out_of_step(params) == ["bias", "kernel"]
  with pytest.raises(UserError, match="2 arrays differ between devices, bias"):
    replicas.check(params)


def test_one_flipped_bit_on_one_device_is_found():
  mesh = sharding.make_mesh()
  same = np.ones((4, 8), np.float32)
  other = same.copy()
  other.view(np.uint32)[2, 3] ^= 1
  for last, found in ((same, []), (other, ["x"])):
    copies = [
      jax.device_put(last if device == mesh.devices.flat[-1] else same, device)
      for device in mesh.devices.flat
    ]
    array = jax.make_array_from_single_device_arrays(
      same.shape, sharding.replicated(mesh), copies
    )
    assert replicas.out_of_step({"x": array}) == found


def test_processes_are_in_step_and_one_on_its_own_is_found():
  worker = process_runs.ROOT / "tests" / "sync_worker.py"
  done = process_runs.finish(process_runs.launch([str(worker)], devices=2))
  assert [code for code, _, _ in done] == [0, 0], done
  whole = train(sharding.make_mesh(), rows_of)
  for _, out, _ in done:
    together, alone, total = out.split("\n")[:3]
    assert together == "together []"
    assert alone == "alone ['bias', 'kernel']"
    expected = sum(
      float(np.abs(v).sum()) for v in map(np.asarray, whole.values())
    )
    assert float(total) == pytest.approx(expected, rel=1e-6)
