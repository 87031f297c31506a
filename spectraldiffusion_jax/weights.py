"""The one file format for backbone weights: safetensors with a checksum."""

import hashlib
import os
import pathlib
from collections.abc import Mapping

import numpy as np
from flax import traverse_util

from spectraldiffusion_jax.errors import UserError

FORMAT = "spectraldiffusion_jax vit 1"
MAX_HEADER = 1 << 20
"""Bytes of the names and shapes in a safetensors file; the largest published
model has a tenth of it. The format itself allows 100 MB of empty tensors."""
MAX_NAME = 512  # characters of a tensor's name


def file_kind(path: str | pathlib.Path) -> str:
  """Tells "safetensors" from "pth" by content, whatever the file is called.

  Raises:
    UserError: it is neither; what it looks like instead is in the message.
  """
  path = pathlib.Path(path)
  try:
    if not path.is_file():
      raise UserError(f"no weights file at {path}: check the path")
    with path.open("rb") as file:
      head = file.read(512)
  except OSError as error:
    raise UserError(f"{path} cannot be read: {error.strerror}") from None
  text = head.lstrip().lower()
  if head.startswith(b"PK\x03\x04"):
    return "pth"
  if head[8:9] == b"{":
    return "safetensors"
  if text.startswith(b"<"):
    found = "a web page: the download failed, fetch the file itself"
  elif text.startswith(b"version https://git-lfs"):
    found = "a git-lfs pointer: run `git lfs pull` where it was cloned"
  elif head.startswith(b"\x80"):
    found = (
      "a bare pickle (torch before 1.6), which could run code: re-save it with "
      "a newer torch.save, or use the safetensors file"
    )
  elif len(head) < 16:
    found = f"only {len(head)} bytes long: download it again"
  else:
    found = "neither safetensors nor a torch .pth file"
  raise UserError(f"{path} is {found}")


def read_safetensors(
  path: str | pathlib.Path,
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
  """Tensors and metadata of a safetensors file.

  Raises:
    UserError: damaged, truncated, or the safetensors package is missing.
  """
  safetensors = _import_safetensors()
  try:
    with open(path, "rb") as file:
      header = int.from_bytes(file.read(8), "little")
    if header > MAX_HEADER:
      raise ValueError(f"a header of {header} bytes")
    with safetensors.safe_open(path, framework="np") as file:
      metadata = file.metadata() or {}
      if max(map(len, file.keys()), default=0) > MAX_NAME:
        raise ValueError(f"a name of more than {MAX_NAME} characters")
      return {name: file.get_tensor(name) for name in file.keys()}, metadata
  except Exception as error:  # its own kind, and numpy's for unknown types
    raise UserError(
      f"{path} is truncated or damaged ({str(error)[:80]}): download it again"
    ) from None


def checksum(name: str, flat: Mapping[str, np.ndarray]) -> str:
  """SHA-256 over the model's name and each tensor's name, type and bytes."""
  digest = hashlib.sha256(name.encode())
  for key in sorted(flat):
    array = np.ascontiguousarray(flat[key])
    digest.update(f"\n{key} {array.dtype} {array.shape}\n".encode())
    digest.update(array.reshape(-1).view(np.uint8))
  return digest.hexdigest()


def save_weights(path: str | pathlib.Path, name: str, params: Mapping) -> str:
  """Writes parameters of the model called `name`; returns their checksum.

  The file appears under its name only when it is complete.

  Args:
    path: file to write; its folder is made.
    name: key of VARIANTS.
    params: nested, float32, in the plain layout.
  """
  _import_safetensors()
  import safetensors.numpy

  path = pathlib.Path(path)
  flat = {
    # safetensors copies raw memory and would scramble a strided array.
    key: np.ascontiguousarray(value, np.float32)
    for key, value in traverse_util.flatten_dict(dict(params), sep="/").items()
  }
  digest = checksum(name, flat)
  metadata = {"format": FORMAT, "name": name, "sha256": digest}
  partial = path.with_name(path.name + ".partial")
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    safetensors.numpy.save_file(flat, partial, metadata=metadata)
    os.replace(partial, path)
  except (OSError, safetensors.SafetensorError) as error:
    raise UserError(f"{path} cannot be written: {error}") from None
  return digest


def load_weights(path: str | pathlib.Path) -> tuple[str, dict]:
  """Name and nested parameters of a file of `save_weights`.

  Raises:
    UserError: no such file, another format, damaged, or its checksum differs.
  """
  needs_conversion = UserError(
    f"{path} is not a converted file: run launch/convert.py "
    f"--source={path} --output=FILE and give that FILE"
  )
  if file_kind(path) != "safetensors":
    raise needs_conversion
  flat, metadata = read_safetensors(path)
  if metadata.get("format") != FORMAT:
    raise needs_conversion
  name = metadata.get("name", "")
  if checksum(name, flat) != metadata.get("sha256"):
    raise UserError(f"{path} fails its checksum: convert or copy it again")
  folders = {key[:at] for key in flat for at in _slashes(key)}
  wrong = sorted(folders & flat.keys()) + [
    key for key, array in flat.items() if array.dtype != np.float32
  ]
  if wrong:
    raise UserError(
      f"{path}: {wrong[0]} is no float32 tensor: convert it again"
    )
  return name, traverse_util.unflatten_dict(flat, sep="/")


def _slashes(key: str) -> list[int]:
  return [at for at, letter in enumerate(key) if letter == "/"]


def _import_safetensors():
  try:
    import safetensors
  except ImportError:
    raise UserError(
      "reading weights needs safetensors: pip install "
      "'spectraldiffusion_jax[convert]'"
    ) from None
  return safetensors
