"""Reads the tensors of a torch .pth file without torch, running none of it.

A .pth file is a zip of one pickle and the raw storages. A pickle is a program
that may call anything, so Python's unpickler is not used: the program's steps
are listed and those that a state dict needs are followed here. They make lists,
tables, texts, numbers and tensors; the file is refused at the first other one.

The unpickler, even where it calls nothing, can be made to take gigabytes by one
step (a memo slot of a high number) or for ever by forty (a key of nested pairs,
whose hash takes twice as long at every level). Here a memo is a table, and keys
are names.
"""

import math
import pathlib
import pickletools
import zipfile
from collections.abc import Iterable
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from spectraldiffusion_jax.errors import UserError

_STORAGES = {
  "DoubleStorage": np.float64,
  "FloatStorage": np.float32,
  "HalfStorage": np.float16,
  "BFloat16Storage": ml_dtypes.bfloat16,
  "LongStorage": np.int64,
  "IntStorage": np.int32,
  "ShortStorage": np.int16,
  "CharStorage": np.int8,
  "ByteStorage": np.uint8,
  "BoolStorage": np.bool_,
}


_MAX_PROGRAM = 1 << 18
"""Bytes of a pickle, so that its steps take seconds; the largest published
model has less than half of it."""

_MAX_NUMBER = 1 << 62
_MAX_AXES = 32


class _Refused(Exception):
  """The file asks for something that a state dict does not need."""


class _Name(NamedTuple):
  """A name of the program; what it means is decided where it is used."""

  module: str
  name: str


_TENSOR = _Name("torch._utils", "_rebuild_tensor_v2")
_PARAMETER = _Name("torch._utils", "_rebuild_parameter")
_DICT = _Name("collections", "OrderedDict")
_NAMES = {_TENSOR, _PARAMETER, _DICT, *(_Name("torch", n) for n in _STORAGES)}

_CONSTANTS = {
  "NONE": lambda: None,
  "NEWTRUE": lambda: True,
  "NEWFALSE": lambda: False,
  "EMPTY_DICT": dict,
  "EMPTY_LIST": list,
  "EMPTY_TUPLE": tuple,
}
_LITERALS = frozenset(
  "INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING"
  " SHORT_BINSTRING UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINBYTES"
  " SHORT_BINBYTES BINBYTES8".split()
)
_LAST = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3, "APPEND": 1, "SETITEM": 2}
_SINCE_MARK = ("TUPLE", "LIST", "DICT", "APPENDS", "SETITEMS", "POP_MARK")


class _Archive:
  """The storages of a .pth file, and how much may be read and made of it."""

  def __init__(self, archive: zipfile.ZipFile, root: str, size: int):
    self._archive, self._root = archive, root
    self._storages = {}
    self._left = {"read": size, "made": 2 * size}  # bytes

  def read(self, member: str) -> bytes:
    info = self._archive.getinfo(self._root + member)
    # torch stores without compression; a compressed member may be a zip bomb.
    if info.compress_type != zipfile.ZIP_STORED:
      raise _Refused(f"its member {info.filename} is compressed")
    self._spend("read", info.file_size)
    return self._archive.read(info)

  def storage(self, kind: Any, dtype: Any, key: Any, *unused) -> np.ndarray:
    """The storage of a persistent id; each is read once."""
    known = isinstance(dtype, _Name) and dtype.name in _STORAGES
    if kind != "storage" or not known or not isinstance(key, str):
      raise _Refused("it holds something else than named storages")
    if (dtype, key) not in self._storages:
      data = self.read(f"data/{key}")
      self._storages[dtype, key] = np.frombuffer(data, _STORAGES[dtype.name])
    return self._storages[dtype, key]

  def tensor(self, storage, offset, size, stride, *unused) -> np.ndarray:
    """A copy of the part of a storage that a tensor shows."""
    numbers = (offset, *size, *stride)
    # All of them come from the file: check before numpy follows them.
    if len(size) > _MAX_AXES or not all(
      isinstance(n, int) and 0 <= n < _MAX_NUMBER for n in numbers
    ):
      raise _Refused("a tensor reaches outside its storage")
    count = math.prod(size)
    last = sum((n - 1) * s for n, s in zip(size, stride, strict=True))
    inside = count == 0 or offset + last < storage.size
    if not inside or count > storage.size:
      raise _Refused("a tensor reaches outside its storage")
    self._spend("made", count * storage.itemsize)
    view = np.lib.stride_tricks.as_strided(
      storage[offset:], size, [s * storage.itemsize for s in stride]
    )
    return view.copy()

  def _spend(self, purse: str, count: int) -> None:
    self._left[purse] -= count
    if self._left[purse] < 0:
      raise _Refused("its tensors are together larger than the file")


class _Machine:
  """Follows the steps of one pickle."""

  def __init__(self, archive: _Archive):
    self._archive = archive
    self._stack, self._outer, self._memo = [], [], {}

  def run(self, program: bytes) -> Any:
    if len(program) > _MAX_PROGRAM:
      raise _Refused(f"its pickle is longer than {_MAX_PROGRAM} bytes")
    for step, argument, _ in pickletools.genops(program):
      self._take(step.name, argument)
    return self._stack.pop()

  def _take(self, step: str, argument: Any) -> None:
    stack = self._stack
    if step in _CONSTANTS:
      stack.append(_CONSTANTS[step]())
    elif step in _LITERALS:
      stack.append(argument)
    elif step in ("PUT", "BINPUT", "LONG_BINPUT"):
      self._memo[argument] = stack[-1]
    elif step == "MEMOIZE":
      self._memo[len(self._memo)] = stack[-1]
    elif step in ("GET", "BINGET", "LONG_BINGET"):
      stack.append(self._memo[argument])
    elif step in ("GLOBAL", "INST"):
      stack.append(_known(*argument.split(" ", 1)))
    elif step == "STACK_GLOBAL":
      name, module = stack.pop(), stack.pop()
      stack.append(_known(module, name))
    elif step == "REDUCE":
      arguments = stack.pop()
      stack.append(self._call(stack.pop(), *arguments))
    elif step == "BINPERSID":
      stack.append(self._archive.storage(*stack.pop()))
    elif step in ("POP", "BUILD"):  # BUILD sets attributes: none are needed
      stack.pop()
    elif step == "MARK":
      self._outer.append(stack)
      self._stack = []
    elif step in _LAST:
      items = [stack.pop() for _ in range(_LAST[step])]
      self._gather(step, items[::-1])
    elif step in _SINCE_MARK:
      self._stack = self._outer.pop()
      self._gather(step, stack)
    elif step not in ("PROTO", "FRAME", "STOP"):
      raise _Refused(f"its pickle takes the step {step}")

  def _gather(self, step: str, items: list) -> None:
    """Makes a list, tuple or table of items, or adds them to one."""
    stack = self._stack
    if step.startswith("TUPLE"):
      stack.append(tuple(items))
    elif step == "LIST":
      stack.append(items)
    elif step == "DICT":
      stack.append(_table(zip(items[::2], items[1::2], strict=True)))
    elif step.startswith("APPEND"):
      stack[-1].extend(items)
    elif step.startswith("SETITEM"):
      stack[-1].update(_table(zip(items[::2], items[1::2], strict=True)))

  def _call(self, function: Any, *arguments: Any) -> Any:
    if isinstance(function, _Name):
      if function == _TENSOR:
        return self._archive.tensor(*arguments)
      if function == _PARAMETER:
        return arguments[0]
      if function == _DICT:
        return _table(*arguments)
    raise _Refused("its pickle calls what is no function")


def _known(module: Any, name: Any) -> _Name:
  texts = isinstance(module, str) and isinstance(name, str)
  if not texts or _Name(module, name) not in _NAMES:
    asked = f"{module}.{name}" if texts else "something without a name"
    raise _Refused(f"its pickle asks for {asked}")
  return _Name(module, name)


def _table(pairs: Iterable[tuple[Any, Any]] = ()) -> dict:
  table = {}
  for key, value in pairs:
    if not isinstance(key, (str, int)):
      raise _Refused("a key is neither a text nor a number")
    table[key] = value
  return table


def read_pth(path: str | pathlib.Path) -> dict[str, np.ndarray]:
  """The state dict of a .pth file, also one level down under a usual key.

  Args:
    path: a file of torch.save (its zip format, the default since torch 1.6).

  Returns:
    Tensor name -> array, in the file's dtypes.

  Raises:
    UserError: not such a file, damaged, or asking for more than tensors. No
      code of the file is run in any case.
  """
  try:
    with zipfile.ZipFile(path) as archive:
      names = [n for n in archive.namelist() if n.endswith("data.pkl")]
      if len(names) != 1:
        raise _Refused("it is a zip file without a data.pkl")
      root = names[0].removesuffix("data.pkl")
      content = _Archive(archive, root, pathlib.Path(path).stat().st_size)
      if f"{root}byteorder" in archive.namelist():
        if content.read("byteorder") != b"little":
          raise _Refused("it was written on a big-endian machine")
      state = _Machine(content).run(content.read("data.pkl"))
  except _Refused as error:
    raise UserError(
      f"{path} was refused, and nothing of it run: {error}; save only "
      "model.state_dict(), or use the safetensors file"
    ) from None
  except Exception as error:  # hostile input: any failure means unreadable
    raise UserError(
      f"{path} is damaged or no torch file ({type(error).__name__}: "
      f"{str(error)[:80]}): download it again"
    ) from None
  for key in ("teacher", "state_dict", "model"):
    if isinstance(state, dict) and isinstance(state.get(key), dict):
      state = state[key]
  if not isinstance(state, dict) or not all(
    isinstance(k, str) and isinstance(v, np.ndarray) for k, v in state.items()
  ):
    raise UserError(
      f"{path} holds no plain state dict (names -> tensors): save "
      "model.state_dict()"
    )
  return dict(state)
