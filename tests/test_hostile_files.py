"""Weights, records, data sets and configs that were refused badly once."""

import gzip
import struct

import clevr_files
import fuzz_records
import fuzz_weights
import numpy as np
import pytest
import safetensors.numpy
import toy_scenes
from test_fuzz import parse

from configs import default
from spectraldiffusion_jax import config as config_lib
from spectraldiffusion_jax import convert, rounds, weights
from spectraldiffusion_jax.config_kinds import KINDS
from spectraldiffusion_jax.data import prepared, sources, tfrecord
from spectraldiffusion_jax.errors import UserError
from spectraldiffusion_jax.pth import read_pth

# ---- weights ----------------------------------------------------------------


def pth(path, program: bytes):
  path.write_bytes(fuzz_weights.zipped(program))
  return path


@pytest.mark.parametrize(
  ("program", "words"),
  [
    # Python's unpickler takes 32 GB for the first and 2**50 steps for the next.
    (b"]K\x00r\xff\xff\xff\x7f0.", "no plain state dict"),
    (b"}K\x00" + b"q\x00h\x00\x86" * 50 + b"K\x00s.", "a key is neither"),
    (b"K\x00\x85\x81.", "takes the step NEWOBJ"),
    (b"N" * (1 << 18) + b".", "longer than 262144 bytes"),
    (b"K\x01K\x02\x85R.", "calls what is no function"),
  ],
  ids=["memo", "hash", "step", "long", "call"],
)
def test_a_pickle_cannot_take_memory_or_time(tmp_path, program, words):
  with pytest.raises(UserError, match=words):
    read_pth(pth(tmp_path / "a.pth", program))


@pytest.mark.parametrize("count", [1, 9])
def test_tensors_of_one_storage_stay_below_the_files_size(tmp_path, count):
  tensor = (
    b"ctorch._utils\n_rebuild_tensor_v2\n((U\x07storagectorch\nFloatStorage\n"
    b"U\x010U\x03cpuK\x04tQK\x00M\xa8\x61\x85K\x01\x85\x89}tR"
  )
  program = b"}" + b"".join(b"K%c" % n + tensor + b"s" for n in range(count))
  path = tmp_path / "a.pth"
  path.write_bytes(fuzz_weights.zipped(program + b".", storage=bytes(100_000)))
  words = "together larger than the file" if count > 1 else "no plain state"
  with pytest.raises(UserError, match=words):  # keys are numbers, not names
    read_pth(path)


def test_a_conversion_never_replaces_its_source(tmp_path):
  path = tmp_path / "a.safetensors"
  path.write_bytes(fuzz_weights.good("safetensors"))
  for source, output in ((path, path), (tmp_path, path), (path, tmp_path)):
    with pytest.raises(UserError, match="a folder or the source itself"):
      convert.convert_file(str(source), str(output))
  assert path.read_bytes() == fuzz_weights.good("safetensors")


def test_a_place_that_cannot_be_written_is_one_line(tmp_path):
  (tmp_path / "file").touch()
  with pytest.raises(UserError, match="cannot be written"):
    weights.save_weights(tmp_path / "file" / "x", "vit", {"a": np.zeros(1)})


def test_an_empty_patch_embedding_is_no_model():
  empty = {"patch_embed.proj.weight": np.zeros((0, 3, 2, 2), np.float32)}
  with pytest.raises(UserError, match="proj.weight is .*: it holds nothing"):
    convert.convert_tensors(empty)


@pytest.mark.parametrize(
  "flat",
  [
    {"a": np.zeros(1, np.float32), "a/b": np.zeros(1, np.float32)},
    {"a": np.zeros(1, np.int64)},
  ],
  ids=["nested", "type"],
)
def test_a_right_checksum_is_not_enough(tmp_path, flat):
  path = tmp_path / "a.safetensors"
  metadata = {
    "format": weights.FORMAT,
    "name": "vit",
    "sha256": weights.checksum("vit", flat),
  }
  safetensors.numpy.save_file(flat, path, metadata=metadata)
  with pytest.raises(UserError, match="is no float32 tensor"):
    weights.load_weights(path)


@pytest.mark.parametrize(
  "header",
  [
    {f"a{i}": fuzz_weights.entry("F32", (0,), (0, 0)) for i in range(20_000)},
    {"/" * 10_000: fuzz_weights.entry("F32", (16,), (0, 64))},
  ],
  ids=["many", "long"],
)
def test_headers_are_bounded(tmp_path, header):
  path = tmp_path / "a.safetensors"
  path.write_bytes(fuzz_weights.headed(header))
  with pytest.raises(UserError, match="a header of|a name of more"):
    weights.read_safetensors(path)


# ---- records ----------------------------------------------------------------


@pytest.mark.parametrize(
  ("record", "words"),
  [
    (fuzz_records.feature(b"x", b"\x0a\0" * 200_000), "more than 100000"),
    (fuzz_records.feature(b"x", b"\x0a" + b"\xff" * 99), "longer than 64"),
    (
      fuzz_records.field(
        1, fuzz_records.field(1, fuzz_records.field(2, b"\x0a\0" * 9))
      ),
      "several lists",
    ),
  ],
  ids=["empty strings", "number", "lists"],
)
def test_a_record_cannot_take_memory_or_time(tmp_path, record, words):
  path = clevr_files.write(tmp_path / "a.tfrecords", [record])
  with pytest.raises(UserError, match=words):
    list(tfrecord.read_examples(path))


def test_a_record_is_not_much_longer_than_a_scene(tmp_path):
  spelled = clevr_files.encode(clevr_files.scene(0), spelled=True)
  assert len(spelled) < tfrecord.MAX_RECORD < 1.5 * len(spelled)
  length = struct.pack("<Q", tfrecord.MAX_RECORD + 1)
  crc = struct.pack("<I", tfrecord.masked_crc32c(length))
  path = tmp_path / "a.tfrecords"
  path.write_bytes(gzip.compress(length + crc + bytes(9)))
  with pytest.raises(UserError, match="is not in 1.."):
    list(tfrecord.read_records(path))


# ---- prepared data sets, configs ------------------------------------


def test_a_data_set_imports_nothing_at_its_wish(tmp_path):
  toy_scenes.prepare(tmp_path)
  folder = prepared.folder_of("toy_scenes", tmp_path)
  path = folder / "features.json"
  text = path.read_text()
  path.write_text(text.replace("tensorflow_datasets.core.features", "this"))
  with pytest.raises(UserError, match="asks for this.*not of TFDS"):
    sources.load("toy_scenes", "train", data_root=tmp_path)
  path.write_text(text)
  (folder / "dataset_info.json").write_text("[]")
  with pytest.raises(UserError, match="no intact data set"):
    sources.load("toy_scenes", "train", data_root=tmp_path)


@pytest.mark.parametrize(
  "content",
  [b"", b"\x93NUMPY", b"PK\x05\x06" + bytes(18), b"\x80\x04N."],
  ids=["empty", "cut", "zip", "pickle"],
)
def test_damaged_labels_of_a_round_are_set_aside(tmp_path, content):
  rounds.save(tmp_path, 5, np.zeros((2, 3, 3), np.uint8))
  assert rounds.load(tmp_path, 5).shape == (2, 3, 3)
  rounds.path(tmp_path, 5).write_bytes(content)
  assert rounds.load(tmp_path, 5) is None
  assert (tmp_path / "labels" / "5.npy.damaged").read_bytes() == content


@pytest.mark.parametrize(
  "text",
  [
    "[]",
    "5",
    '{"model": {"width": "x"}}',
    '{"model": {"width": 1e999}}',
    '{"seed": 99999999999}',
    '{"data": {"crop": [1, "a", 2, 3]}}',
    '{"data": {"cache": 1}}',
    "[" * 100_000,
    "\ufeff{}",
  ],
  ids=range(9),
)
def test_a_config_of_wrong_kinds_is_refused(tmp_path, text):
  path = tmp_path / "config.json"
  path.write_text(text)
  with pytest.raises(UserError, match="workdir: .*config.json"):
    config_lib.load(path)


def test_a_model_is_not_made_of_half_a_config(tmp_path):
  path = tmp_path / "config.json"
  path.write_text('{"model": {"width": 8}}')
  with pytest.raises(UserError, match="the config has no "):
    config_lib.validate_model(config_lib.load(path))


@pytest.mark.parametrize(
  ("wrong", "words"),
  [
    ("nowhere.py", "holds no config or is no file"),
    ("configs", "holds no config or is no file"),
    ("configs/clevr.py:nonsense", "ValueError: .*has no variant 'nonsense'"),
    ("README.md", "SyntaxError"),
    ("data.crop=(1,'a',2,3)", "data.crop.*whole numbers"),
    ("data.crop=(-5,1,0,1)", "data.crop"),
    ("training.learning_rate=1e999", "learning_rate=inf .*finite"),
    ("training.num_steps=4294967296", "training.num_steps.*whole number"),
    ("seed=4294967296", "seed=4294967296 .*32 bits"),
    ("augment.flip=2", "augment.flip=2.0 is not in 0..1"),
    ("mesh.data=-2", "mesh.data=-2"),
    ("mamba_slot.key_dim=1", "mamba_slot.key_dim=1"),
    ("spectral.scales=(0,8)", "spectral.scales"),
    ("data.dataset=\x1b[2J", "data.dataset"),
    ("model={'a':1}", "the config has no model"),
  ],
)
def test_a_wrong_flag_is_one_line(root, monkeypatch, wrong, words):
  monkeypatch.chdir(root)
  arguments = [f"--config={wrong}"]
  if "=" in wrong:
    arguments = ["--config=configs/default.py", f"--config.{wrong}"]
  with pytest.raises(UserError, match=words) as error:
    config_lib.validate(parse(arguments))
  assert "Traceback" not in str(error.value)


def test_every_field_has_a_kind():
  names = [name for known, _, _ in KINDS for name in known]
  fields = [name for name, _ in config_lib.flatten(default.get_config())]
  assert sorted(names) == sorted(fields), "list it in config_kinds.py"
