"""Chips by name, and the devices of a slice that need not be there."""

import math
import os
import re
from typing import NamedTuple

import jax

from spectraldiffusion_jax.errors import UserError


class Chip(NamedTuple):
  """What a vendor publishes of one chip."""

  hbm: float  # bytes of main memory
  flops: float  # bf16 floating-point operations a second, peak
  bandwidth: float  # bytes a second between chip and main memory
  network: float  # bytes a second sent over all links to other chips


# docs.cloud.google.com/tpu/docs/{v4, v5e, v5p, v6e}, tables "key
# specifications", read November 2026. They give the interconnect in both
# directions together for v5e and v6e (400 and 800 GB/s) and in Gbit/s one way
# for v4 and v5p (2400 and 4800); here it is one way throughout.
CHIPS = {
  "v4": Chip(32 * 2**30, 275e12, 1200e9, 300e9),
  "v5e": Chip(16 * 2**30, 197e12, 819e9, 200e9),
  "v5p": Chip(95 * 2**30, 459e12, 2765e9, 600e9),
  "v6e": Chip(32 * 2**30, 918e12, 1638e9, 400e9),
}


class Topology(NamedTuple):
  """Devices to compile for."""

  name: str
  devices: list
  chip: Chip | None  # of one device; None for simulated devices


def open_topology(name: str) -> Topology:
  """The devices called v5e:16x16 (TPU chips a side) or cpu:8 (simulated).

  A chip of two devices gives each half of what it has.

  Raises:
    UserError: no such name, or what it needs is not installed.
  """
  kind, _, layout = name.partition(":")
  if kind == "cpu" and re.fullmatch(r"[1-9]\d*", layout):
    return Topology(name, _simulated(int(layout)), None)
  if kind not in CHIPS or not re.fullmatch(r"\d+(x\d+){1,2}", layout):
    raise UserError(
      f"--topology={name}: give cpu:N, or one of {', '.join(CHIPS)} with its"
      " chips a side, for example v5e:16x16 or v5p:4x4x8"
    )
  devices = _tpu(name)
  share = len(devices) // math.prod(int(side) for side in layout.split("x"))
  return Topology(name, devices, Chip(*(x / share for x in CHIPS[kind])))


def _simulated(count: int) -> list:
  """Devices on this machine's CPU."""
  try:
    jax.config.update("jax_num_cpu_devices", count)
  except RuntimeError:  # the backend is up, with as many as it has
    pass
  devices = jax.devices("cpu")
  if len(devices) < count:
    raise UserError(
      f"--topology=cpu:{count}: this process has {len(devices)} CPU devices"
      " already; start another one"
    )
  return devices[:count]


def _tpu(name: str) -> list:
  from jax.experimental import topologies

  # Else libtpu asks the cloud's metadata server who it is, and waits; and two
  # plans at once would quarrel about a chip that neither uses.
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
  os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
  try:
    return topologies.get_topology_desc(
      platform="tpu", topology_name=name
    ).devices
  except RuntimeError as error:
    text = str(error)
    if "not installed" in text:
      raise UserError(
        f"--topology={name} needs the TPU compiler: pip install '.[tpu]'"
      ) from None
    raise UserError(
      f"--topology={name} is refused by the TPU compiler: {text}"
    ) from None
