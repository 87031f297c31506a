"""Streaming reader of GZIP TFRecords of tf.train.Example, without TensorFlow.

A TFRecord is a sequence of frames: u64 length, u32 masked CRC32C of the length,
the record, u32 masked CRC32C of the record (TensorFlow, lib/io/record_reader).
The CRC of each length is checked here, before anything is allocated for it.
The records' own CRC32C is not: the gzip stream carries a CRC of every byte,
which zlib verifies at no cost, while CRC32C in Python takes longer than
reading the file.

Records are parsed from the protobuf wire format by hand. A record of the public
multi-object files spells each pixel as a string of its own (`0a 01 XX`), some
1.1 million strings, which a protobuf library turns into as many Python objects
in 90 ms; here the whole list is one strided numpy view.
"""

import dataclasses
import gzip
import io
import itertools
import math
import os
import struct
import zlib
from collections.abc import Callable, Iterator
from typing import BinaryIO

import numpy as np

from spectraldiffusion_jax.data.crc32c import masked_crc32c
from spectraldiffusion_jax.errors import UserError

MAX_RECORD = 1 << 22  # bytes; the public files stay below 4 MB a record
_MAX_STRINGS = 100_000  # of a list, unless each is one byte
_MAX_VARINT = 10  # bytes, of 64 bits in groups of 7
_BYTES_LIST, _FLOAT_LIST = 1, 2  # field numbers of tf.train.Feature
_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5  # protobuf wire types


@dataclasses.dataclass(frozen=True)
class Example:
  """One parsed record.

  Attributes:
    where: file and record number, for messages.
    features: flat uint8 or float32 values by feature name. A bytes feature is
      the concatenation of its strings, so that one value a string and one
      string for all values read alike.
  """

  where: str
  features: dict[str, np.ndarray]

  def get(
    self, name: str, shape: tuple[int, ...], dtype: type[np.generic]
  ) -> np.ndarray:
    """Returns a feature as an array of this shape.

    Args:
      name: feature name.
      shape: expected shape; the number of values has to match exactly.
      dtype: np.uint8 for a bytes feature, np.float32 for a float feature.

    Returns:
      A read-only or fresh array [*shape] of dtype.

    Raises:
      UserError: the feature is missing, of another kind or length, or holds a
        value that is not finite.
    """
    if name not in self.features:
      held = ", ".join(sorted(self.features)) or "none"
      raise self.error(name, f"missing (the record holds: {held})")
    values = self.features[name]
    if values.dtype != dtype:
      kinds = {"u": "bytes", "f": "float"}
      raise self.error(
        name,
        f"is a {kinds[values.dtype.kind]} list, expected a"
        f" {kinds[np.dtype(dtype).kind]} list",
      )
    if values.size != math.prod(shape):
      times = "x".join(map(str, shape))
      raise self.error(
        name, f"{values.size} values, expected {math.prod(shape)} ({times})"
      )
    if values.dtype.kind == "f" and not np.isfinite(values).all():
      raise self.error(name, "holds values that are not finite")
    return values.reshape(shape)

  def error(self, name: str, message: str) -> UserError:
    """Returns the UserError that names file, record and feature."""
    return UserError(f"{self.where}, feature {name!r}: {message}")


def read_examples(
  path: str | os.PathLike, *, progress: Callable[[int], object] | None = None
) -> Iterator[Example]:
  """Yields the parsed records of a GZIP TFRecord, one in memory at a time.

  Args:
    path: the file.
    progress: called with the number of compressed bytes read since last time.

  Yields:
    Examples in file order.

  Raises:
    UserError: naming file, record number (from 0) and what is wrong.
  """
  for number, record in enumerate(read_records(path, progress=progress)):
    where = f"{path}: record {number}"
    try:
      features = parse_example(record)
    except (IndexError, ValueError, struct.error) as error:
      raise UserError(f"{where} is no tf.train.Example: {error}") from error
    yield Example(where, features)


def read_records(
  path: str | os.PathLike, *, progress: Callable[[int], object] | None = None
) -> Iterator[bytes]:
  """Yields the raw records of a GZIP TFRecord, one in memory at a time.

  Args:
    path: the file.
    progress: called with the number of compressed bytes read since last time.

  Yields:
    The records' bytes in file order.

  Raises:
    UserError: no such file, not gzip, truncated, damaged, or empty; names the
      file and the record number (from 0).
  """
  number = 0
  try:
    with open(path, "rb") as raw:
      if raw.read(2) != b"\x1f\x8b":
        state = "is no GZIP file" if os.path.getsize(path) else "is empty"
        raise UserError(f"{path} {state}; expected a GZIP TFRecord")
      raw.seek(0)
      source = raw if progress is None else _Metered(raw, progress)
      with gzip.open(source, "rb") as stream:
        while record := _read_record(stream, f"{path}: record {number}"):
          yield record
          number += 1
  except EOFError as error:
    raise UserError(
      f"{path}: record {number}: the GZIP stream is truncated; copy or download"
      " the file again"
    ) from error
  except (gzip.BadGzipFile, zlib.error) as error:
    raise UserError(
      f"{path}: record {number}: damaged GZIP stream ({error})"
    ) from error
  except OSError as error:
    raise UserError(f"{path}: cannot be read: {error.strerror}") from error
  if not number:
    raise UserError(f"{path} holds no record; expected a GZIP TFRecord")


def parse_example(record: bytes) -> dict[str, np.ndarray]:
  """Parses a serialised tf.train.Example.

  Args:
    record: the protobuf message.

  Returns:
    Flat arrays by feature name: uint8 [n] for a bytes feature (its strings
    concatenated), float32 [n] for a float feature.

  Raises:
    ValueError, IndexError, struct.error: the bytes are no such message, or a
      feature is of another kind.
  """
  features = {}
  for number, feature_map in _fields(memoryview(record)):
    if number != 1:
      raise ValueError(f"unexpected field {number}")
    for _, entry in _fields(feature_map):
      name = value = memoryview(b"")
      for key, payload in _fields(entry):
        name = payload if key == 1 else name
        value = payload if key == 2 else value
      name = bytes(name).decode()
      features[name] = _parse_feature(name, value)
  return features


def _parse_feature(name: str, message: memoryview) -> np.ndarray:
  kinds = list(itertools.islice(_fields(message), 2))
  if len(kinds) != 1:
    count = "several lists" if kinds else "no list"
    raise ValueError(f"feature {name!r} holds {count}, expected one")
  ((kind, values),) = kinds
  if kind == _BYTES_LIST:
    return _bytes_list(values)
  if kind == _FLOAT_LIST:
    return _float_list(values)
  raise ValueError(f"feature {name!r} is neither a bytes nor a float list")


def _bytes_list(message: memoryview) -> np.ndarray:
  """Concatenates repeated `bytes value = 1`."""
  raw = np.frombuffer(message, np.uint8)
  if raw.size % 3 == 0:
    triples = raw.reshape(-1, 3)
    # Tag 0x0a (field 1, length-delimited) and length 1 before every value.
    if (triples[:, 0] == 0x0A).all() and (triples[:, 1] == 1).all():
      return triples[:, 2]
  return np.frombuffer(_joined(message), np.uint8)


def _float_list(message: memoryview) -> np.ndarray:
  """Reads repeated `float value = 1`, packed (the usual form) or not."""
  return np.frombuffer(_joined(message), "<f4")


def _joined(message: memoryview) -> bytes:
  # Not b"".join, which first lists the pieces: 180 bytes for each, and a
  # hostile record holds millions of empty ones.
  joined = bytearray()
  for number, (_, value) in enumerate(_fields(message)):
    if number == _MAX_STRINGS:
      raise ValueError(f"a list of more than {_MAX_STRINGS} values")
    joined += value
  return bytes(joined)


def _fields(message: memoryview) -> Iterator[tuple[int, memoryview]]:
  """Yields (field number, payload) of every field of a protobuf message."""
  at = 0
  while at < len(message):
    tag, at = _varint(message, at)
    wire = tag & 7
    if wire == _LENGTH:
      size, at = _varint(message, at)
    elif wire in (_FIXED32, _FIXED64):
      size = 4 if wire == _FIXED32 else 8
    elif wire == _VARINT:
      size = _varint(message, at)[1] - at
    else:
      raise ValueError(f"protobuf wire type {wire}")
    if at + size > len(message):
      raise ValueError("a field runs past the end of its message")
    yield tag >> 3, message[at : at + size]
    at += size


def _varint(message: memoryview, at: int) -> tuple[int, int]:
  value = 0
  for place in range(_MAX_VARINT):
    byte = message[at + place]
    value |= (byte & 0x7F) << 7 * place
    if byte < 0x80:
      return value, at + place + 1
  raise ValueError("a number is longer than 64 bits")


def _read_record(stream: BinaryIO, where: str) -> bytes:
  """Reads one frame; nothing (no record is empty) at the end of the stream."""
  head = stream.read(12)
  if not head:
    return b""
  if len(head) < 12:
    raise UserError(f"{where}: the file ends within the record's length")
  length, crc = struct.unpack("<QI", head)
  if crc != masked_crc32c(head[:8]):
    raise UserError(f"{where}: the checksum of the record's length is wrong")
  if not 0 < length <= MAX_RECORD:
    raise UserError(f"{where}: length {length} is not in 1..{MAX_RECORD}")
  body = stream.read(length + 4)
  if len(body) < length + 4:
    raise UserError(
      f"{where}: the file ends after {len(body)} of {length + 4} bytes"
    )
  return body[:length]


class _Metered(io.RawIOBase):
  """A binary file that reports how many bytes were read from it."""

  def __init__(self, raw: BinaryIO, progress: Callable[[int], object]):
    self._raw, self._progress = raw, progress

  def readable(self) -> bool:
    return True

  def read(self, size: int = -1) -> bytes:
    data = self._raw.read(size)
    self._progress(len(data))
    return data
