"""Device mesh, and where every array of a run lives on it.

Batches are split over the mesh axes `data` and `fsdp`; parameters and
optimiser state over `fsdp` and `model` by the ordered RULES below, of which
the first that matches a parameter's path wins (the scheme of big_vision).
"""

import math
import re
from collections.abc import Mapping

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from spectraldiffusion_jax.errors import UserError

AXES = ("data", "fsdp", "model")

RULES = (
  # (pattern searched in the array's path, mesh axes of its LAST dimensions)
  # Vectors, and what is smaller than the message that would gather it.
  (r"(bias|scale|mean|log_std|log_variance|logits)$", ()),
  (r"/(a_log|skip|alpha|taps|cls|registers|slots)$", ()),
  (r"(^|/)(step|count|recent)$", ()),
  # The head axis of attention, and pairs of products of which the first is
  # split by outputs and the second by inputs: one all-reduce for both.
  (r"_(query|key|value)/kernel$", ("fsdp", "model", None)),
  (r"block\d+_out/kernel$", ("model", None, "fsdp")),
  (r"(attn/out|mlp/down|mlp/Dense_1|out_proj)/kernel$", ("model", "fsdp")),
  # Its outputs are parts of unequal width, which a split would cut.
  (r"in_proj/kernel$", ("fsdp", None)),
  (r"pos_embed$", ("fsdp",)),
  (r"kernel$", ("fsdp", "model")),
)
"""The first that matches counts; an array that none matches is replicated and
named by `notes`."""

LARGE = 2**20
"""Bytes from which an array that every device holds whole is worth a word."""


def make_mesh(
  *, data: int = -1, fsdp: int = 1, model: int = 1, devices=None
) -> Mesh:
  """Mesh with axes data, fsdp, model; at most one size may be -1 (the rest).

  Raises:
    UserError: the sizes do not multiply to the number of devices.
  """
  devices = jax.devices() if devices is None else devices
  sizes = {"data": data, "fsdp": fsdp, "model": model}
  open_axes = [name for name, size in sizes.items() if size == -1]
  fixed = math.prod(size for size in sizes.values() if size != -1)
  if len(open_axes) > 1 or fixed < 1:
    raise UserError(
      f"mesh={sizes}: sizes are positive, and at most one is -1 (the rest)"
    )
  if open_axes:
    sizes[open_axes[0]] = len(devices) // fixed
  if math.prod(sizes.values()) != len(devices):
    raise UserError(
      f"mesh={sizes} needs {math.prod(sizes.values())} devices, there are "
      f"{len(devices)}: set mesh.data, mesh.fsdp and mesh.model to match"
    )
  return Mesh(
    np.asarray(devices).reshape(tuple(sizes.values())),
    AXES,
    axis_types=(AxisType.Auto,) * 3,
  )


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Rows over data and fsdp."""
  return NamedSharding(mesh, P(("data", "fsdp")))


def batch_rows(mesh: Mesh) -> int:
  """Number of devices over which the rows of a batch are split."""
  return mesh.shape["data"] * mesh.shape["fsdp"]


def row_share(mesh: Mesh) -> tuple[int, int]:
  """Index and number of the shares into which processes divide a batch.

  Processes that differ only along `model` hold the same rows, and so have to
  read the same share.
  """
  readers = _readers(mesh)
  return readers.index(_rows_of(mesh)[jax.process_index()]), len(readers)


def gather_rows(rows: np.ndarray, mesh: Mesh) -> np.ndarray:
  """Every process's rows [B / shares ...] -> those of the batch [B ...]."""
  if jax.process_count() == 1:
    return rows
  every = multihost_utils.process_allgather(rows)  # [process, row, ...]
  owners = _rows_of(mesh)
  first = [min(p for p, o in owners.items() if o == r) for r in _readers(mesh)]
  return every[first].reshape(-1, *rows.shape[1:])


def _rows_of(mesh: Mesh) -> dict[int, tuple[int, ...]]:
  """Process -> the row groups (places along data x fsdp) it has devices of."""
  owners = {}
  for row, devices in enumerate(mesh.devices.reshape(batch_rows(mesh), -1)):
    for process in {device.process_index for device in devices}:
      owners[process] = (*owners.get(process, ()), row)
  return owners


def _readers(mesh: Mesh) -> list[tuple[int, ...]]:
  """The distinct shares of a batch, in the order of their first rows.

  Raises:
    UserError: processes share some rows but not all.
  """
  shares = sorted(set(_rows_of(mesh).values()))
  if sum(map(len, shares)) != batch_rows(mesh) or len({*map(len, shares)}) > 1:
    raise UserError(
      f"mesh={dict(mesh.shape)} does not divide the rows of a batch evenly "
      f"over {len(_rows_of(mesh))} processes: choose mesh.model so that it "
      "divides, or is a multiple of, the devices of a process"
    )
  return shares


def describe(mesh: Mesh) -> str:
  """One line: processes, devices and the mesh they form."""
  sizes = " x ".join(f"{name} {size}" for name, size in mesh.shape.items())
  return (
    f"{jax.process_count()} process(es), {mesh.devices.size} "
    f"{mesh.devices.flat[0].platform} device(s), mesh {sizes}"
  )


def replicated(mesh: Mesh) -> NamedSharding:
  """The whole array on every device."""
  return NamedSharding(mesh, P())


def parameter_spec(path: str, shape: tuple[int, ...], mesh: Mesh) -> P:
  """Spec of one array: the first matching rule, where the sizes divide."""
  names = _rule(path) or ()
  spec = [None] * len(shape)
  offset = len(shape) - len(names)
  for i, name in enumerate(names):
    if name and offset >= 0 and shape[offset + i] % mesh.shape[name] == 0:
      spec[offset + i] = name
  return P(*spec)


def _rule(path: str) -> tuple[str | None, ...] | None:
  """Axes of the first rule that matches; None if none does."""
  found = (axes for pattern, axes in RULES if re.search(pattern, path))
  return next(found, None)


def notes(abstract_state) -> list[str]:
  """What a user should know of a sharded state: a line for each problem.

  Arrays that no rule matches, and large ones that every device holds whole
  although the mesh has an axis to split them over.
  """
  missed, whole = [], []
  for path, leaf in jax.tree_util.tree_leaves_with_path(abstract_state):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    size, mesh = leaf.size * leaf.dtype.itemsize, leaf.sharding.mesh
    if _rule(name) is None:
      missed.append(name)
    if (
      size >= LARGE
      and mesh.shape["fsdp"] * mesh.shape["model"] > 1
      and leaf.sharding.is_fully_replicated
    ):
      whole.append(f"{name} {leaf.shape} ({size / 2**20:.0f} MiB)")
  lines = []
  if missed:
    lines.append(f"no sharding rule matches {', '.join(missed)}: replicated")
  if whole:
    lines.append(f"large and replicated: {', '.join(whole)}")
  return lines


def state_sharding(abstract_state, mesh: Mesh):
  """A sharding for every leaf of a state (optimiser moments follow params)."""
  return jax.tree_util.tree_map_with_path(
    lambda path, leaf: NamedSharding(
      mesh,
      parameter_spec(
        jax.tree_util.keystr(path, simple=True, separator="/"),
        leaf.shape,
        mesh,
      ),
    ),
    abstract_state,
  )


def gather_weights(params, mesh: Mesh):
  """Inside jit: parameters as the step multiplies with them.

  Split over `model` alone: what `fsdp` keeps apart is gathered first. Without
  `model` XLA decides this by itself, and well. With all three axes above 1 its
  partitioner (jax 0.10.2, CPU; GSPMD and Shardy) may align the rows of a batch
  with a weight's split over `fsdp` and forget to move them back:
  `x @ a + ((x @ a) @ b) @ c` came out wrong by 0.86 relative on 2 x 2 x 2.
  """
  if mesh.shape["model"] == 1 or mesh.shape["fsdp"] == 1:
    return params

  def gather(leaf, at: NamedSharding):
    spec = P(*(None if axis == "fsdp" else axis for axis in at.spec))
    return jax.lax.with_sharding_constraint(leaf, NamedSharding(mesh, spec))

  return jax.tree.map(gather, params, state_sharding(params, mesh))


def check_batch_size(batch_size: int, accumulation: int, mesh: Mesh) -> None:
  """Raises a UserError naming the numbers if rows do not split evenly."""
  rows = batch_rows(mesh)
  unit = rows * accumulation
  if batch_size % unit:
    raise UserError(
      f"training.batch_size={batch_size} does not split over mesh.data * "
      f"mesh.fsdp = {rows} devices times training.gradient_accumulation="
      f"{accumulation}: use a multiple of {unit}, for example "
      f"--config.training.batch_size={-(-batch_size // unit) * unit}"
    )


def shard_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict:
  """This process's rows -> global arrays, split over data and fsdp."""
  sharding = batch_sharding(mesh)
  return {
    name: jax.make_array_from_process_local_data(sharding, np.asarray(rows))
    for name, rows in batch.items()
  }


def local_rows(array: jax.Array) -> np.ndarray:
  """The rows of a batch-sharded array that this process holds, in order."""
  parts = {
    shard.index[0].start or 0: shard.data for shard in array.addressable_shards
  }
  return np.concatenate([np.asarray(parts[start]) for start in sorted(parts)])
