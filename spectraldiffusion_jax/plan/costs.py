"""Floating-point operations and main-memory traffic of a compiled program."""

import math
import re

from spectraldiffusion_jax.plan import hlo

NO_TRAFFIC = (
  "parameter",
  "constant",
  "tuple",
  "get-tuple-element",
  "bitcast",
  "while",
  "conditional",
  "call",
  "after-all",
  "iota",
  "partition-id",
  "replica-id",
)
"""Opcodes that move no bytes themselves; what they call is counted there."""

SLICES = ("dynamic-slice", "slice", "gather")


def flops(program: hlo.Program) -> float:
  """Two for each multiplication of matrix products and convolutions.

  Elementwise work is left out: it runs on other units, and beside memory
  traffic it never bounds a step here.
  """
  total = 0.0
  for visit in hlo.walk(program):
    at, home = visit.instruction, program.computations[visit.home]
    if at.opcode == "dot":
      total += visit.count * _dot_flops(at, home)
    elif at.opcode == "convolution":
      total += visit.count * _convolution_flops(at, home)
  return total


def _dot_flops(at: hlo.Instruction, home: hlo.Computation) -> float:
  left = home[at.operands[0]].shapes[0].dims
  axes = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", at.attributes)[1]
  depth = math.prod(left[int(axis)] for axis in axes.split(",") if axis)
  return 2.0 * math.prod(at.shapes[0].dims) * depth


def _convolution_flops(at: hlo.Instruction, home: hlo.Computation) -> float:
  """Counts taps that meet the input: not padding, not dilation's zeros."""
  left, right = (home[name].shapes[0].dims for name in at.operands[:2])
  labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", at.attributes)
  left_at, right_at, out_at = labels.groups()
  out = at.shapes[0].dims
  taps = 1.0
  for i, size in enumerate(_windows(at.attributes)):
    taps *= _valid_taps(
      left[left_at.index(str(i))], out[out_at.index(str(i))], **size
    )
  groups = re.search(r"batch_group_count=(\d+)", at.attributes)
  batch = left[left_at.index("b")] // (int(groups[1]) if groups else 1)
  width = right[right_at.index("i")] * right[right_at.index("o")]
  return 2.0 * batch * width * taps


def _windows(attributes: str) -> list[dict]:
  """Size, stride, first padding and dilations of each spatial axis."""
  window = re.search(r"window=\{([^}]*)\}", attributes)
  fields = dict(re.findall(r"(\w+)=(\S+)", window[1] if window else ""))
  sizes = fields["size"].split("x") if "size" in fields else []

  def values(name, default):
    found = (
      fields[name].split("x") if name in fields else [default] * len(sizes)
    )
    return [int(value.partition("_")[0]) for value in found]

  return [
    dict(size=int(n), stride=s, pad=p, left_dilate=a, right_dilate=b)
    for n, s, p, a, b in zip(
      sizes,
      values("stride", "1"),
      values("pad", "0"),
      values("lhs_dilate", "1"),
      values("rhs_dilate", "1"),
      strict=True,
    )
  ]


def _valid_taps(n, out, *, size, stride, pad, left_dilate, right_dilate) -> int:
  """Pairs of output position and tap that read one of n input positions."""
  total, span = 0, (n - 1) * left_dilate
  for tap in range(size):
    offset = tap * right_dilate - pad
    if left_dilate == 1:
      first = max(0, -(offset // stride))
      last = min(out - 1, (span - offset) // stride)
      total += max(0, last - first + 1)
    else:
      places = (place * stride + offset for place in range(out))
      total += sum(0 <= x <= span and x % left_dilate == 0 for x in places)
  return total


def memory_traffic(program: hlo.Program) -> float:
  """Bytes read from and written to main memory.

  Every instruction outside a fusion reads its operands and writes its result
  once; slices count as themselves, not as what they are cut from or put into,
  and arrays that the compiler keeps on the chip count nothing.
  """
  total = 0.0
  for visit in hlo.walk(program):
    at, home = visit.instruction, program.computations[visit.home]
    if visit.fused or at.opcode in NO_TRAFFIC or at.opcode.endswith("-done"):
      continue
    total += visit.count * _bytes_moved(program, at, home)
  return total


def _bytes_moved(program, at, home) -> int:
  operands = [home[name].shapes for name in at.operands if name in home]
  read = [sum(s.bytes for s in shapes if s.in_hbm) for shapes in operands]
  written = [s.bytes if s.in_hbm else 0 for s in at.shapes]
  if at.opcode.endswith("-start"):  # (result, operand, context)
    return sum(read) + written[0] if written else sum(read)
  if at.opcode in SLICES:
    return 2 * sum(written)
  if at.opcode == "dynamic-update-slice":
    return 2 * read[1]
  if at.opcode == "fusion":
    inner = re.search(r"calls=%?([\w.-]+)", at.attributes)
    body = program.computations[inner[1]]
    return _fusion_reads(body) + _fusion_writes(body, at)
  return sum(read) + sum(written)


def _fusion_reads(body: hlo.Computation) -> int:
  """What a fusion reads: of an operand that only slices use, the slices."""
  readers = {}
  for inner in body.values():
    for place, name in enumerate(inner.operands):
      readers.setdefault(name, []).append((inner, place))
  total = 0
  for name, parameter in body.items():
    if parameter.opcode != "parameter":
      continue
    size = sum(s.bytes for s in parameter.shapes if s.in_hbm)
    used = readers.get(name, [])
    if all(i.opcode in SLICES and not place for i, place in used):
      size = min(size, sum(s.bytes for i, _ in used for s in i.shapes))
    elif all(i.opcode == "dynamic-update-slice" and not p for i, p in used):
      size = 0  # updated in place
    total += size
  return total


def _fusion_writes(body: hlo.Computation, at: hlo.Instruction) -> int:
  """What a fusion writes: the update where its root updates a slice."""
  root = next(i for i in body.values() if i.root)
  outputs = root.operands if root.opcode == "tuple" else (root.name,)
  total = 0
  for shape, name in zip(at.shapes, outputs, strict=False):
    if not shape.in_hbm:
      continue
    inner = body[name]
    while inner.opcode in ("bitcast", "convert", "copy") and inner.operands:
      inner = body[inner.operands[0]]
    if inner.opcode == "dynamic-update-slice":
      total += sum(s.bytes for s in body[inner.operands[1]].shapes)
    else:
      total += shape.bytes
  return total
