"""Hostile weight files, made from a seed."""

import functools
import io
import json
import os
import pickle
import struct
import zipfile

import numpy as np
import safetensors.numpy
from fuzz_harness import flipped, mangled
from published import write_pth

from spectraldiffusion_jax.weights import FORMAT

TYPES = "BOOL U8 I8 I16 U16 F16 BF16 I32 U32 F32 F64 I64 F8_E4M3 F4 X".split()
STEPS = (
  b"( ) ] } N K\x01 K\x00 J\xff\xff\xff\x7f \x85 \x86 \x87 t l d a e s u 0 1 2"
  b" q\x00 h\x00 r\xff\xff\xff\x7f \x94 Q R b \x81 \x93 \x88 X\x01\0\0\0a"
  b" U\x07storage U\x010 ctorch\nFloatStorage\n"
  b" ctorch._utils\n_rebuild_tensor_v2\n"
  b" ccollections\nOrderedDict\n cos\nsystem\n G\x7f\xf0\0\0\0\0\0\0"
).split(b" ")


class Touch:
  """Unpickled by pickle.load, it makes a folder `ran`."""

  def __init__(self, folder):
    self.folder = folder

  def __reduce__(self):
    return os.mkdir, (f"{self.folder}/ran",)


def tensors() -> dict[str, np.ndarray]:
  """A few tensors with the names of a vision transformer."""
  return {
    "patch_embed.proj.weight": np.ones((4, 3, 2, 2), np.float32),
    "blocks.0.attn.qkv.weight": np.ones((12, 4), np.float32),
    "norm.weight": np.ones(4, np.float32),
    "cls_token": np.ones((1, 1, 4), np.float32),
  }


@functools.cache
def good(kind: str) -> bytes:
  if kind == "safetensors":
    return safetensors.numpy.save(tensors())
  file = io.BytesIO()
  write_pth(file, tensors())
  return file.getvalue()


def headed(header: object) -> bytes:
  """A safetensors file with any header, and as many bytes as it declares."""
  ends = [e["data_offsets"][1] for e in _entries(header)]
  body = bytes(min(max([0, *ends]), 64))
  text = header if isinstance(header, bytes) else json.dumps(header).encode()
  return struct.pack("<Q", len(text)) + text + body


def _entries(header: object) -> list[dict]:
  if not isinstance(header, dict):
    return []
  return [e for n, e in header.items() if n != "__metadata__"]


def entry(dtype="F32", shape=(4,), offsets=(0, 16)) -> dict:
  return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def wrong_header(random) -> bytes:
  """A file whose header says something else than there is."""
  count = int(random.choice([0, 1, 2**31, 2**62, -1]))
  name = "patch_embed.proj.weight"
  kind, width = random.choice(TYPES), int(random.choice([1, 2, 4, 8]))
  headers = (
    lambda: {name: entry(shape=(count, 4))},
    lambda: {name: entry(shape=(0, 3, 2, 2), offsets=(0, 0))},
    lambda: {name: entry(offsets=(0, count))},
    lambda: {name: entry(str(kind), (4,), (0, 4 * width))},
    lambda: {name: entry(str(kind), (), (0, width))},
    lambda: {name: entry("F32", (2, 0, 1, 1), (0, 0))},
    lambda: {"blocks.0.attn.qkv.weight": entry("F32", (), (0, 4))},
    lambda: {f"a{i}": entry(shape=(0,), offsets=(0, 0)) for i in range(20_000)},
    lambda: {"/" * 400_000: entry()},
    lambda: {"a\n\x1b[31m" * 50: entry()},
    lambda: {"a": entry(), "a/b": entry(offsets=(16, 32))},
    lambda: {"__metadata__": {"format": FORMAT}, "a": entry()},
    lambda: b"[" * 100_000,
    lambda: b'{"a":' * 50_000,
  )
  data = headed(headers[random.integers(len(headers))]())
  if random.random() < 0.1:
    return struct.pack("<Q", 2**63 - 1) + data[8:]
  return data


def zipped(
  program: bytes,
  *,
  compression=zipfile.ZIP_STORED,
  storage: bytes = bytes(16),
) -> bytes:
  """A .pth file with any pickle and one storage."""
  file = io.BytesIO()
  with zipfile.ZipFile(file, "w", compression) as archive:
    archive.writestr("a/data.pkl", program)
    archive.writestr("a/data/0", storage)
  return file.getvalue()


def wrong_program(random, folder) -> bytes:
  """A .pth file whose pickle is a bomb, malicious, damaged or random."""
  kind = random.integers(7)
  if kind == 0:
    return zipped(pickle.dumps(Touch(folder), int(random.integers(0, 6))))
  if kind == 1:
    return zipped(b"}K\x00r\xff\xff\xff\x7f0.")  # a memo slot of 2**31
  if kind == 2:  # a key whose hash takes 2**50 steps
    return zipped(b"}K\x00" + b"q\x00h\x00\x86" * 50 + b"K\x00s.")
  if kind == 3:
    return zipped(bytes(50 << 20), compression=zipfile.ZIP_DEFLATED)
  if kind == 4:
    step = STEPS[random.integers(len(STEPS))]
    return zipped(b"\x80\x02" + step * 30_000 + b".")
  if kind == 5:
    picks = random.integers(0, len(STEPS), random.integers(1, 60))
    return zipped(b"".join(STEPS[i] for i in picks) + b".")
  with zipfile.ZipFile(io.BytesIO(good("pth"))) as archive:
    return zipped(mangled(archive.read("archive/data.pkl"), random))


def case(seed: int, folder) -> bytes:
  """The file of one seed.

  Args:
    seed: chooses.
    folder: where a pickle that is run would leave its trace.
  """
  random = np.random.default_rng(seed)
  kind = seed % 8
  if kind == 0:
    others = (b"", b"<html>", b"\x80\x04.", b"version https://git-lfs", b"PK")
    return others[random.integers(len(others))] * int(random.integers(1, 3))
  if kind < 3:
    return wrong_header(random)
  if kind < 5:
    return wrong_program(random, folder)
  data = good("pth" if kind == 5 else "safetensors")
  return flipped(data, random) if kind == 7 else mangled(data, random)
