"""Reading GZIP TFRecords: values against protobuf, and every kind of damage."""

import gzip
import struct
import tracemalloc

import clevr_files
import numpy as np
import pytest
from tensorflow_datasets.proto import tf_example_generated_pb2 as pb

from spectraldiffusion_jax.data import tfrecord
from spectraldiffusion_jax.errors import UserError

REAL = "clevr_with_masks/clevr_with_masks_train.tfrecords"


def small_example(seed=0):
  rng = np.random.default_rng(seed)
  return {
    "code": rng.integers(0, 256, 11, np.uint8),
    "pose": rng.normal(size=7).astype(np.float32),
  }


def read(path):
  return list(tfrecord.read_examples(path))


def by_protobuf(record):
  """What protobuf's own parser makes of a record."""
  features = {}
  for name, feature in pb.Example.FromString(record).features.feature.items():
    if feature.WhichOneof("kind") == "bytes_list":
      joined = b"".join(feature.bytes_list.value)
      features[name] = np.frombuffer(joined, np.uint8)
    else:
      features[name] = np.array(feature.float_list.value, np.float32)
  return features


def assert_same(ours, expected):
  assert ours.keys() == expected.keys()
  for name, values in expected.items():
    assert ours[name].dtype == values.dtype
    np.testing.assert_array_equal(ours[name], values)


def test_crc32c_of_the_check_string():
  # CRC-32C of "123456789" is 0xE3069283 (RFC 3720, B.4 polynomial).
  crc = 0xE3069283
  masked = ((crc >> 15 | crc << 17) + 0xA282EAD8) % 2**32
  assert tfrecord.masked_crc32c(b"123456789") == masked


@pytest.mark.parametrize(
  "values",
  [
    [b"\x00", b"\x01", b"\n", b"\xff"],  # one byte a string
    [b"\x0a\x01\x07"],  # one string that looks like the form above
    [b"\xaa\x0a\xbb\xcc"],  # one string with a tag at every third byte
    [bytes(range(256)) * 600],  # one string, length of three varint bytes
    [b"a", b"bc", b"d"],  # neither
    [b"a", b"", b"d"],
    [b"\x05"],
    [],
  ],
  ids=lambda values: f"{len(values)}x{len(b''.join(values))}",
)
def test_every_spelling_of_bytes_parses_as_protobuf_does(values):
  example = pb.Example()
  example.features.feature["b"].bytes_list.value.extend(values)
  example.features.feature["é"].float_list.value.extend([0.5, -2.0, 1e30])
  record = example.SerializeToString()
  assert_same(tfrecord.parse_example(record), by_protobuf(record))


def test_unpacked_floats_parse():
  floats = b"".join(b"\x0d" + struct.pack("<f", v) for v in (1.5, -2.0))
  wrap = lambda tag, body: bytes([tag, len(body)]) + body  # noqa: E731
  feature = wrap(0x12, floats)  # Feature.float_list
  entry = wrap(0x0A, b"x") + wrap(0x12, feature)
  record = wrap(0x0A, wrap(0x0A, entry))
  expected = by_protobuf(record)
  assert expected["x"].tolist() == [1.5, -2.0]
  assert_same(tfrecord.parse_example(record), expected)


def test_records_come_in_order_and_progress_counts_every_byte(tmp_path):
  examples = [small_example(seed) for seed in range(5)]
  records = [
    clevr_files.encode(example, spelled=number % 2 == 0)
    for number, example in enumerate(examples)
  ]
  path = clevr_files.write(tmp_path / "a.tfrecords", records)
  steps = []
  found = list(tfrecord.read_examples(path, progress=steps.append))
  assert sum(steps) == path.stat().st_size
  for number, (example, expected) in enumerate(
    zip(found, examples, strict=True)
  ):
    assert f"record {number}" in example.where
    assert_same(example.features, expected)


def test_memory_is_bounded_by_one_record(tmp_path):
  rng = np.random.default_rng(0)
  records = [
    clevr_files.encode({"image": rng.integers(0, 256, 1 << 20, np.uint8)})
    for _ in range(12)
  ]
  path = clevr_files.write(tmp_path / "a.tfrecords", records)
  del records
  tracemalloc.start()
  total = sum(
    example.get("image", (1 << 20,), np.uint8).size
    for example in tfrecord.read_examples(path)
  )
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert total == 12 << 20
  assert peak < 5 << 20


def test_get_names_file_record_and_feature(tmp_path):
  record = clevr_files.encode(
    {"code": np.zeros(11, np.uint8), "pose": np.float32([1, np.inf])}
  )
  path = clevr_files.write(tmp_path / "a.tfrecords", [record, record])
  example = read(path)[1]
  assert example.get("code", (11, 1), np.uint8).shape == (11, 1)
  for name, shape, dtype, message in (
    ("mask", (11,), np.uint8, "missing .the record holds: code, pose"),
    ("code", (3, 4), np.uint8, r"11 values, expected 12 \(3x4\)"),
    ("code", (11,), np.float32, "is a bytes list, expected a float list"),
    ("pose", (2,), np.float32, "not finite"),
  ):
    where = rf"a\.tfrecords: record 1, feature '{name}': .*"
    with pytest.raises(UserError, match=where + message):
      example.get(name, shape, dtype)


@pytest.mark.parametrize(
  ("content", "message"),
  [
    (None, "No such file"),
    (b"", "is empty"),
    (b"\x89PNG\r\n", "is no GZIP file"),
    (clevr_files.frame(b"abc"), "is no GZIP file"),  # uncompressed TFRecord
    (gzip.compress(b""), "holds no record"),
    (gzip.compress(b"1234567"), "record 0: the file ends within"),
    (gzip.compress(clevr_files.frame(b"")), "record 0: length 0 is not"),
    (gzip.compress(bytes(12)), "checksum of the record's length"),
    (
      gzip.compress(
        clevr_files.frame(b"")[:0] + clevr_files.frame(b"abc")[:-5]
      ),
      "record 0: the file ends after 2 of 7 bytes",
    ),
    (gzip.compress(clevr_files.frame(b"abc")), "is no tf.train.Example"),
    (gzip.compress(clevr_files.frame(bytes(100))), "is no tf.train.Example"),
  ],
  # Compressed bytes hold the time of day: no part of a test's name.
  ids=lambda value: value if isinstance(value, str) else "file",
)
def test_a_file_that_is_none(tmp_path, content, message):
  path = tmp_path / "a.tfrecords"
  if content is not None:
    path.write_bytes(content)
  with pytest.raises(UserError, match=message) as caught:
    read(path)
  assert "a.tfrecords" in str(caught.value)
  assert "\n" not in str(caught.value)


def test_a_length_is_bounded_before_anything_is_allocated(tmp_path):
  length = struct.pack("<Q", 1 << 40)
  head = length + struct.pack("<I", tfrecord.masked_crc32c(length))
  path = tmp_path / "a.tfrecords"
  path.write_bytes(gzip.compress(head + bytes(100)))
  with pytest.raises(UserError, match="record 0: length 1099511627776"):
    read(path)


def test_integers_are_refused_by_name(tmp_path):
  example = pb.Example()
  example.features.feature["label"].int64_list.value.append(3)
  path = clevr_files.write(tmp_path / "a", [example.SerializeToString()])
  with pytest.raises(UserError, match="'label' is neither a bytes nor a float"):
    read(path)


def test_every_truncation_is_reported(tmp_path):
  records = [clevr_files.encode(small_example(seed)) for seed in range(3)]
  path = clevr_files.write(tmp_path / "a.tfrecords", records)
  whole = path.read_bytes()
  assert len(read(path)) == 3
  for length in range(2, len(whole)):
    path.write_bytes(whole[:length])
    with pytest.raises(UserError, match="record [0-3]: .* is truncated"):
      read(path)


def test_every_flipped_bit_is_reported_or_changes_nothing(tmp_path):
  records = [clevr_files.encode(small_example(seed)) for seed in range(2)]
  path = clevr_files.write(tmp_path / "a.tfrecords", records)
  whole = path.read_bytes()
  reported = 0
  for position in range(10, len(whole)):  # behind the header, which has no sum
    damaged = bytearray(whole)
    damaged[position] ^= 0x10
    path.write_bytes(damaged)
    try:
      found = read(path)
    except UserError:
      reported += 1
      continue
    # Two spellings of one text: a match may copy it from either of two places.
    for example, record in zip(found, records, strict=True):
      assert_same(example.features, by_protobuf(record))
  assert reported >= len(whole) - 12


def test_first_real_records_parse_as_protobuf_does(shared_data):
  records = tfrecord.read_records(shared_data / REAL)
  for _ in range(2):
    record = next(records)
    ours = tfrecord.parse_example(record)
    assert_same(ours, by_protobuf(record))
    assert ours["mask"].size == 11 * 240 * 320
  records.close()


@pytest.mark.slow
def test_all_real_records_are_counted(shared_data):
  assert sum(1 for _ in tfrecord.read_records(shared_data / REAL)) == 1000
