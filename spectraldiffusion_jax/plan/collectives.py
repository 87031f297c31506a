"""What devices send each other in a compiled program, by kind."""

import math
import re
from typing import NamedTuple

from spectraldiffusion_jax.plan import hlo

KINDS = (
  "all-reduce",
  "all-gather",
  "reduce-scatter",
  "all-to-all",
  "collective-permute",
  "ragged-all-to-all",
)


class Collective(NamedTuple):
  """All collectives of one kind in one call of the program, per device."""

  kind: str
  count: int  # runs
  looped: int  # of those, inside loops
  payload: int  # bytes of the whole operands (all-gather: of the results)
  wire: int  # bytes that a device sends with ring algorithms


def group_size(attributes: str, devices: int) -> int:
  """Devices that take part in one collective together; no groups = all.

  Raises:
    ValueError: groups in a form that is not known.
  """
  named = re.search(
    r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", attributes
  )
  if named:
    sizes = dict(re.findall(r"('[^']+')=(\d+)", named[1]))
    # 'axis':(a)b is a part of an axis: b devices of it.
    axes = re.findall(r"('[^']+')(?::\(\d+\)(\d+))?", named[2])
    return math.prod(int(part or sizes[axis]) for axis, part in axes)
  iota = re.search(r"replica_groups=\[(\d+),(\d+)\]", attributes)
  if iota:
    return int(iota[2])
  listed = re.search(r"replica_groups=\{\{([\d,]+)\}", attributes)
  if listed:
    return len(listed[1].split(","))
  if "replica_groups=" in attributes and "replica_groups={}" not in attributes:
    raise ValueError(f"replica groups of an unknown form: {attributes[:200]}")
  return devices


def wire_bytes(kind: str, operand: int, group: int) -> float:
  """Bytes a device sends: ring algorithms (Patarasuk & Yuan 2009)."""
  share = (group - 1) / group
  return {
    "all-reduce": 2 * share * operand,
    "all-gather": (group - 1) * operand,
    "reduce-scatter": share * operand,
    "all-to-all": share * operand,
    "ragged-all-to-all": share * operand,
    "collective-permute": operand,
  }[kind]


def _kind(visit: hlo.Visit) -> str | None:
  kind = visit.instruction.opcode.removesuffix("-start")
  if kind not in KINDS:
    return None
  # The TPU compiler writes a reduce-scatter as an all-reduce and a slice in
  # one fusion of this name, and moves the slice's bytes alone.
  if kind == "all-reduce" and visit.home.startswith("all-reduce-scatter"):
    return "reduce-scatter"
  return kind


def count_collectives(
  program: hlo.Program, *, devices: int
) -> list[Collective]:
  """One row for each kind that occurs.

  An asynchronous collective is written out several times, at its start and
  its end; its channel number is the same, and it counts once.
  """
  seen = {}
  for visit in hlo.walk(program):
    kind = _kind(visit)
    if kind is None:
      continue
    at = visit.instruction
    home = program.computations[visit.home]
    operand = sum(s.bytes for name in at.operands for s in home[name].shapes)
    group = group_size(at.attributes, devices)
    channel = re.search(r"channel_id=(\d+)", at.attributes)
    key = (kind, channel[1]) if channel else (visit.home, at.name)
    if key not in seen or seen[key][1] < visit.count:
      seen[key] = (kind, visit.count, visit.looped, operand, group)
  rows = {}
  for kind, count, looped, operand, group in seen.values():
    payload = operand * group if kind == "all-gather" else operand
    old = rows.get(kind, Collective(kind, 0, 0, 0, 0))
    rows[kind] = Collective(
      kind,
      old.count + count,
      old.looped + count * looped,
      old.payload + count * payload,
      old.wire + round(count * wire_bytes(kind, operand, group)),
    )
  return [rows[kind] for kind in KINDS if kind in rows]
