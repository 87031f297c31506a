"""Writes TFRecords in the public form, through protobuf's own encoder."""

import gzip
import pathlib
import struct

import numpy as np
from tensorflow_datasets.proto import tf_example_generated_pb2 as pb

from spectraldiffusion_jax.data.tfrecord import masked_crc32c

ENTRIES, HEIGHT, WIDTH = 11, 240, 320


def frame(record: bytes) -> bytes:
  """One TFRecord frame; the reader leaves the record's CRC to gzip."""
  length = struct.pack("<Q", len(record))
  crc = struct.pack("<I", masked_crc32c(length))
  return length + crc + record + bytes(4)


def write(path: pathlib.Path, records: list[bytes]) -> pathlib.Path:
  """Writes a GZIP TFRecord."""
  payload = b"".join(frame(record) for record in records)
  path.write_bytes(gzip.compress(payload, 1))
  return path


def encode(features: dict[str, np.ndarray], *, spelled: bool = False) -> bytes:
  """A tf.train.Example; spelled puts every byte in a string of its own."""
  example = pb.Example()
  for name, values in features.items():
    feature = example.features.feature[name]
    if values.dtype != np.uint8:
      feature.float_list.value.extend(values.ravel().tolist())
    elif spelled:
      feature.bytes_list.value.extend(bytes([v]) for v in values.tobytes())
    else:
      feature.bytes_list.value.append(values.tobytes())
  return example.SerializeToString()


def scene(seed: int, *, objects: int = 3) -> dict[str, np.ndarray]:
  """A CLEVR-like record: noise, and rectangles cut out of the background."""
  rng = np.random.default_rng(seed)
  ids = np.zeros((HEIGHT, WIDTH), np.uint8)
  for number in range(1, objects + 1):
    top, left = rng.integers(0, 200), rng.integers(0, 280)
    ids[top : top + 40, left : left + 40] = number
  coarse = rng.integers(0, 256, (HEIGHT // 8, WIDTH // 8, 3), np.uint8)
  there = np.arange(ENTRIES) <= objects
  features = {
    "image": coarse.repeat(8, axis=0).repeat(8, axis=1),
    "mask": (ids == np.arange(ENTRIES)[:, None, None]) * np.uint8(255),
    "visibility": there.astype(np.float32),
    "pixel_coords": rng.random((ENTRIES, 3), np.float32),
  }
  for name in ("size", "material", "shape", "color"):
    features[name] = rng.integers(1, 3, ENTRIES, np.uint8) * there
  for name in ("x", "y", "z", "rotation"):
    features[name] = rng.normal(size=ENTRIES).astype(np.float32)
  return features
