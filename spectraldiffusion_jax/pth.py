"""Reads the tensors of a torch .pth file without torch, running none of it.

A .pth file is a zip of one pickle and the raw storages. A pickle is a program
that may call anything, so this reader resolves the six names that a state dict
needs and refuses the file at the first other one, before anything is called.
"""

import collections
import io
import math
import pathlib
import pickle
import zipfile
from typing import Any

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


class _Refused(Exception):
  """The pickle asks for something that a state dict does not need."""


def _functions() -> dict[tuple[str, str], Any]:
  """What the pickle may name, made anew for each file.

  A pickle can set attributes of any object it holds: on these throw-away
  closures that changes nothing for the next file.
  """

  def rebuild_tensor(storage, offset, size, stride, *unused):
    # Strides come from the file: check them before numpy follows them.
    count = math.prod(size)
    last = sum((n - 1) * s for n, s in zip(size, stride, strict=True))
    inside = count == 0 or offset + last < storage.size
    if not inside or count > storage.size or min((offset, *stride, 0)) < 0:
      raise _Refused("a tensor reaches outside its storage")
    view = np.lib.stride_tricks.as_strided(
      storage[offset:], size, [s * storage.itemsize for s in stride]
    )
    return view.copy()

  def rebuild_parameter(tensor, *unused):
    return tensor

  return {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): rebuild_parameter,
  }


class _Unpickler(pickle.Unpickler):
  """Knows dicts and tensors, and nothing else."""

  def __init__(self, archive: zipfile.ZipFile, root: str):
    super().__init__(io.BytesIO(_read(archive, f"{root}data.pkl")))
    self._archive, self._root = archive, root
    self._known = _functions()

  def find_class(self, module, name):
    if module == "torch" and name in _STORAGES:
      return name  # a string: calling it fails
    if (module, name) not in self._known:
      raise _Refused(f"its pickle asks for {module}.{name}")
    return self._known[module, name]

  def persistent_load(self, pid):
    kind, storage, key, *_ = pid
    if kind != "storage" or storage not in _STORAGES:
      raise _Refused(f"it holds {kind!r} {storage!r}")
    data = _read(self._archive, f"{self._root}data/{key}")
    return np.frombuffer(data, _STORAGES[storage])


def _read(archive: zipfile.ZipFile, member: str) -> bytes:
  # torch stores without compression; a compressed member may be a zip bomb.
  if archive.getinfo(member).compress_type != zipfile.ZIP_STORED:
    raise _Refused(f"its member {member} is compressed")
  return archive.read(member)


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
      if f"{root}byteorder" in archive.namelist():
        if _read(archive, f"{root}byteorder") != b"little":
          raise _Refused("it was written on a big-endian machine")
      state = _Unpickler(archive, root).load()
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
