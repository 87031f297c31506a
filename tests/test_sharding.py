"""Meshes, rules and the rows of a batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from spectraldiffusion_jax import sharding
from spectraldiffusion_jax.errors import UserError


def test_the_open_axis_takes_the_rest():
  mesh = sharding.make_mesh(data=-1, fsdp=2, model=2)
  assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "model": 2}


@pytest.mark.parametrize(
  ("sizes", "word"),
  [
    (dict(data=3), "needs 3 devices, there are 8"),
    (dict(data=-1, fsdp=-1), "at most one is -1"),
    (dict(data=-1, fsdp=3), "needs 6 devices"),
    (dict(data=0), "sizes are positive"),
  ],
)
def test_impossible_meshes_are_refused_by_number(sizes, word):
  with pytest.raises(UserError, match=word):
    sharding.make_mesh(**sizes)


def test_rules_split_kernels_and_spare_the_rest():
  mesh = sharding.make_mesh(data=2, fsdp=2, model=2)
  spec = lambda path, *shape: sharding.parameter_spec(path, shape, mesh)
  assert spec("params/dense/kernel", 8, 16) == P("fsdp", "model")
  assert spec("params/conv/kernel", 3, 3, 8, 16) == P(
    None, None, "fsdp", "model"
  )
  assert spec("params/dense/kernel", 7, 16) == P(None, "model")
  assert spec("params/dense/bias", 16) == P(None)
  assert spec("step") == P()


def test_optimiser_moments_live_where_their_parameters_do():
  mesh = sharding.make_mesh(data=2, fsdp=2, model=2)
  kernel = jax.ShapeDtypeStruct((8, 16), jnp.float32)
  tree = {"params": {"a": {"kernel": kernel}}, "mu": {"a": {"kernel": kernel}}}
  specs = sharding.state_sharding(tree, mesh)
  assert specs["mu"]["a"]["kernel"] == specs["params"]["a"]["kernel"]


def test_uneven_batches_are_refused_by_number():
  mesh = sharding.make_mesh(data=4, fsdp=2)
  sharding.check_batch_size(16, 2, mesh)
  with pytest.raises(UserError, match="batch_size=24.*multiple of 16"):
    sharding.check_batch_size(24, 2, mesh)


@pytest.mark.parametrize("sizes", [dict(), dict(data=2, fsdp=2, model=2)])
def test_rows_come_back_in_order(sizes):
  mesh = sharding.make_mesh(**sizes)
  rows = np.arange(24, dtype=np.float32).reshape(8, 3)
  array = sharding.shard_batch({"x": rows}, mesh)["x"]
  assert array.sharding.is_equivalent_to(sharding.batch_sharding(mesh), 2)
  np.testing.assert_array_equal(sharding.local_rows(array), rows)
