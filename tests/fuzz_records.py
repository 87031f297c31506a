"""Hostile TFRecord files, made from a seed."""

import functools
import gzip
import struct

import clevr_files
import numpy as np
from fuzz_harness import flipped, mangled
from tensorflow_datasets.proto import tf_example_generated_pb2 as pb

from spectraldiffusion_jax.data.tfrecord import MAX_RECORD, masked_crc32c


@functools.cache
def good() -> bytes:
  return clevr_files.encode(clevr_files.scene(0))


def framed(length: int, body: bytes) -> bytes:
  """A frame that declares any length, its checksum right."""
  head = struct.pack("<Q", length)
  return head + struct.pack("<I", masked_crc32c(head)) + body


def field(number: int, payload: bytes, *, declared: int | None = None) -> bytes:
  """A length-delimited protobuf field that may declare another length."""
  length = len(payload) if declared is None else declared
  return bytes([number << 3 | 2]) + _varint(length) + payload


def _varint(value: int) -> bytes:
  out = bytearray()
  while value >= 0x80:
    out.append(value & 0x7F | 0x80)
    value >>= 7
  return bytes([*out, value])


def feature(name: bytes, values: bytes, *, kind: int = 1) -> bytes:
  """An Example of one feature, its list written by hand."""
  entry = field(1, name) + field(2, field(kind, values))
  return field(1, field(1, entry))


@functools.cache
def bombs() -> list[bytes]:
  """Small files that would take memory or time without bound."""
  most = MAX_RECORD - 100
  records = [
    feature(b"image", b"\x0a\0" * (most // 2)),  # millions of empty strings
    feature(b"x", field(1, b"") * (most // 2)),
    field(1, field(1, field(1, b"x") + field(2, b"\x0a\0" * (most // 2)))),
    field(1, field(1, b"".join(field(3, b"") for _ in range(most // 2)))),
    feature(b"x", b"\x0a" + b"\xff" * most),  # a number without an end
    feature(b"x\n\x1b[2J" * 1000, b"\x0a\x01a"),
    field(1, b"\x0a" * most, declared=1 << 60),
    field(1, b"\x0a\0" * (most // 2)),
  ]
  files = [framed(len(r), r + bytes(4)) for r in records]
  files.append(bytes(200 << 20))
  files.append(framed(1 << 62, bytes(1000)))
  files.append(framed(MAX_RECORD, bytes(100)))
  files.append(framed(MAX_RECORD, bytes(MAX_RECORD + 4)))
  return [gzip.compress(f, 1) for f in files]


def wrong_feature(random) -> bytes:
  """A scene with one feature gone, renamed, cut, or of another kind."""
  scene = clevr_files.scene(0)
  name = list(scene)[random.integers(len(scene))]
  values = scene[name]
  kind = random.integers(7)
  if kind == 0:
    del scene[name]
  elif kind == 1:
    scene[name + "\n"] = scene.pop(name)
  elif kind == 2:
    scene[name] = values.ravel()[: random.integers(values.size)]
  elif kind == 3:
    other = np.float32 if values.dtype == np.uint8 else np.uint8
    scene[name] = values.ravel()[:1000].astype(other)
  elif kind == 4 and values.dtype == np.float32:
    scene[name] = np.full_like(values, random.choice([np.nan, np.inf, -3e38]))
  elif kind == 5:
    scene[name] = random.permuted(values.ravel())
  else:
    example = pb.Example.FromString(good())
    example.features.feature[name].int64_list.value.append(3)
    return example.SerializeToString()
  return clevr_files.encode(scene)


def case(seed: int) -> bytes:
  """The file of one seed."""
  random = np.random.default_rng(seed)
  if seed % 20 == 0:
    return bombs()[seed // 20 % len(bombs())]
  kind = random.integers(6)
  record = good() if kind else wrong_feature(random)
  if kind == 1:  # damaged, but the stream around it is intact
    record = mangled(record, random)
  elif kind == 2:
    start = int(random.integers(0, 300))
    record = record[:start] + flipped(record[start:], random)
  stream = clevr_files.frame(record)
  if kind == 3:
    stream = mangled(stream, random)
  elif kind == 4:
    stream = framed(int(random.integers(0, 2**63)), record)
  file = gzip.compress(stream, 1)
  return mangled(file, random) if kind == 5 else file
