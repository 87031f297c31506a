"""Reads the text of a compiled program: instructions, shapes, loop counts.

XLA's own cost analysis counts the body of a loop once, whatever its length;
here every instruction comes with how often it runs.
"""

import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

BITS = {"pred": 8, "bf16": 16, "c64": 64, "c128": 128, "token": 0, "opaque": 0}
"""Bits of the types whose names do not say it; the others end in their size."""

_SHAPE = re.compile(r"\b([a-z][a-z0-9]*)\[([0-9,<=]*)\](\{[^}]*\})?")
_HEAD = re.compile(r"(ENTRY )?%?([\w.-]+) \(.*->.*\{$")
_CALLED = re.compile(r"\b(?:calls|to_apply|called_computations=\{)=?%([\w.-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TWO_WAY = re.compile(r"(?:true|false)_computation=%?([\w.-]+)")


class Shape(NamedTuple):
  """One array of a result; a tuple has several."""

  dtype: str
  dims: tuple[int, ...]
  layout: str

  @property
  def bytes(self) -> int:
    """Size without the padding of its layout."""
    return -(-math.prod(self.dims) * _bits(self.dtype) // 8)

  @property
  def in_hbm(self) -> bool:
    """Whether it is in main memory; TPU layouts end in S(1) for on-chip."""
    return not re.search(r"S\([1-9]\d*\)", self.layout)


class Instruction(NamedTuple):
  """One line of a computation."""

  name: str
  opcode: str
  shapes: tuple[Shape, ...]  # of the result
  arguments: str  # between the brackets: operands, or a constant's value
  attributes: str  # all that follows
  root: bool

  @property
  def operands(self) -> tuple[str, ...]:
    """Names of the instructions it reads."""
    return tuple(re.findall(r"%([\w.-]+)", self.arguments))


Computation = dict[str, Instruction]


class Visit(NamedTuple):
  """An instruction where it runs."""

  instruction: Instruction
  home: str  # name of its computation
  count: int  # runs for one call of the program
  fused: bool  # inside a fusion: its operands are not in main memory
  looped: bool  # inside a loop


class Program(NamedTuple):
  """A parsed program."""

  computations: Mapping[str, Computation]
  entry: str


def _bits(dtype: str) -> int:
  if dtype in BITS:
    return BITS[dtype]
  return int(re.match(r"[a-z]+(\d+)", dtype)[1])  # f32, s8, f8e4m3fn


def _closing(text: str, start: int) -> int:
  """Index of the bracket that closes the one at `start`."""
  depth = 0
  for i in range(start, len(text)):
    depth += (text[i] == "(") - (text[i] == ")")
    if not depth:
      return i
  raise ValueError(f"unbalanced brackets: {text[:80]}")


def _instruction(line: str) -> Instruction | None:
  name, found, rest = line.strip().partition(" = ")
  if not found:
    return None
  end = _closing(rest, 0) + 1 if rest[0] == "(" else rest.index(" ")
  shapes, rest = rest[:end], rest[end + 1 :]
  start = rest.index("(")
  stop = _closing(rest, start)
  return Instruction(
    name=name.removeprefix("ROOT ").lstrip("%"),
    opcode=rest[:start],
    shapes=tuple(
      Shape(kind, tuple(int(d) for d in re.findall(r"\d+", dims)), layout)
      for kind, dims, layout in _SHAPE.findall(shapes)
    ),
    arguments=rest[start + 1 : stop],
    attributes=rest[stop + 1 :],
    root=name.startswith("ROOT "),
  )


def parse(text: str) -> Program:
  """Parses `compiled.as_text()`.

  Raises:
    ValueError: the text has no entry computation.
  """
  computations, entry, current = {}, None, None
  for line in text.splitlines():
    head = _HEAD.match(line)
    if head:
      current = computations.setdefault(head[2], {})
      entry = head[2] if head[1] else entry
    elif line.startswith("}"):
      current = None
    elif current is not None and (found := _instruction(line)):
      current[found.name] = found
  if entry is None:
    raise ValueError("no ENTRY computation in the program's text")
  return Program(computations, entry)


def trip_count(program: Program, loop: Instruction) -> int | None:
  """Runs of a while loop's body: annotated, or read off `i < constant`."""
  known = re.search(r'known_trip_count":\{"n":"(\d+)"', loop.attributes)
  if known:
    return int(known[1])
  name = re.search(r"condition=%?([\w.-]+)", loop.attributes)[1]
  limits = [
    i.arguments
    for i in program.computations[name].values()
    if i.opcode == "constant"
  ]
  return int(limits[0]) if len(limits) == 1 and limits[0].isdigit() else None


def walk(program: Program) -> Iterator[Visit]:
  """Every instruction that runs, those inside fusions and loops too.

  A branch counts as if it were taken; a loop of unknown length as one run.
  """

  def visit(home, count, fused, looped):
    for instruction in program.computations[home].values():
      yield Visit(instruction, home, count, fused, looped)
      called, runs, inner = [], count, fused
      if instruction.opcode == "while":
        runs *= trip_count(program, instruction) or 1
        called = re.findall(r"body=%?([\w.-]+)", instruction.attributes)
      elif instruction.opcode == "conditional":
        branches = _BRANCHES.search(instruction.attributes)
        called = (
          re.findall(r"[\w.-]+", branches[1])
          if branches
          else _TWO_WAY.findall(instruction.attributes)
        )
      elif instruction.opcode in ("fusion", "call", "async-start"):
        called = _CALLED.findall(instruction.attributes)
        inner = fused or instruction.opcode == "fusion"
      loop = looped or instruction.opcode == "while"
      for name in called:
        yield from visit(name, runs, inner, loop)

  return visit(program.entry, 1, False, False)


def unknown_loops(program: Program) -> int:
  """While loops whose length the text does not say."""
  return sum(
    v.instruction.opcode == "while"
    and trip_count(program, v.instruction) is None
    for v in walk(program)
  )
