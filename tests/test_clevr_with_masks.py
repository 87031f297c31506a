"""The clevr_with_masks builder: values, splits, checks, and what it keeps."""

import hashlib
import io
import itertools
import pathlib
import shutil

import clevr_files
import numpy as np
import pytest
from PIL import Image

from spectraldiffusion_jax.data import clevr_with_masks, tfrecord
from spectraldiffusion_jax.errors import UserError

REAL = "clevr_with_masks/clevr_with_masks_train.tfrecords"
ALL = clevr_with_masks.CODES + clevr_with_masks.SCALARS + ("pixel_coords",)


def as_example(features):
  return tfrecord.Example(
    "f: record 7", {k: v.ravel() for k, v in features.items()}
  )


def write(folder, name, seeds, *, spelled=False):
  records = [
    clevr_files.encode(
      clevr_files.scene(seed, objects=3 + seed % 3), spelled=spelled
    )
    for seed in seeds
  ]
  return clevr_files.write(folder / name, records)


def segmentation_of(features):
  """Independent of the builder's own merge: the mask that is set."""
  return (features["mask"] == 255).argmax(axis=0)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
  folder = tmp_path_factory.mktemp("source")
  write(folder, "clevr_with_masks_train.tfrecords", range(5))
  write(folder, "clevr_with_masks_test.tfrecords", [9], spelled=True)
  (folder / "README.md").write_text("not a source")
  return folder


@pytest.fixture(scope="module")
def builder(source, tmp_path_factory):
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(clevr_with_masks, "SHARD", 2)
    return clevr_with_masks.prepare(source, tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize(
  ("split", "seeds"), [("train", range(5)), ("test", [9])]
)
def test_values_and_order_survive(builder, split, seeds):
  rows = builder.as_data_source(split)
  assert len(rows) == len(seeds)
  for row, seed in zip(rows, seeds, strict=True):
    features = clevr_files.scene(seed, objects=3 + seed % 3)
    np.testing.assert_array_equal(row["image"], features["image"])
    np.testing.assert_array_equal(
      row["segmentation"][..., 0], segmentation_of(features)
    )
    assert row["num_objects"] == 3 + seed % 3
    for name in ALL:
      assert row[name].dtype == features[name].dtype
      np.testing.assert_array_equal(row[name], features[name])


def test_shards_are_cut_from_one_stream(builder):
  assert builder.info.splits["train"].shard_lengths == [2, 2, 1]


def test_metadata_holds_counts_and_checksums(builder, source):
  root = pathlib.Path(builder.data_dir).parent.parent
  again = clevr_with_masks.ClevrWithMasks(data_dir=root)
  train = again.info.metadata["train"]
  assert train["records"] == 5
  assert train["objects"] == {"3": 2, "4": 2, "5": 1}
  (entry,) = train["sources"]
  path = source / "clevr_with_masks_train.tfrecords"
  assert entry["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
  assert (entry["name"], entry["records"]) == (path.name, 5)


def test_split_follows_the_file_name(tmp_path):
  for name in ("train", "validation", "test", "test-2", "old"):
    (tmp_path / f"clevr_with_masks_{name}.tfrecords").touch()
  (tmp_path / "other_test.tfrecords").touch()
  found = {
    split: [path.stem.removeprefix("clevr_with_masks_") for path in paths]
    for split, paths in clevr_with_masks.find_sources(tmp_path).items()
  }
  assert found == {
    "train": ["old", "train"],
    "validation": ["validation"],
    "test": ["test-2", "test"],
  }


@pytest.mark.parametrize("path", [None, "", "nowhere", "."])
def test_no_source_is_one_line(tmp_path, path):
  source = tmp_path / path if path else path
  with pytest.raises(UserError, match="^source=.*clevr_with_masks"):
    clevr_with_masks.prepare(source, tmp_path / "data")
  assert not (tmp_path / "data").exists()


def spoil(name, where, value):
  def change(features):
    features[name] = features[name].copy()
    features[name][where] = value

  return change


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (lambda f: f.pop("mask"), "'mask': missing"),
    (lambda f: f.pop("pixel_coords"), "'pixel_coords': missing"),
    (
      lambda f: f.update(image=f["image"][:-1]),
      r"'image': 229440 values, expected 230400 \(240x320x3\)",
    ),
    (lambda f: f.update(mask=f["mask"][:10]), "768000 values, expected 844800"),
    (lambda f: f.update(x=f["x"].astype(np.uint8)), "'x': is a bytes list"),
    (spoil("mask", (0, 5, 6), 254), "'mask': holds the value 254"),
    (
      spoil("mask", (slice(None), 5, 6), 0),
      "0 masks are 255 at row 5, col",
    ),
    (
      spoil("mask", (slice(2), 5, 6), 255),
      "2 masks are 255 at row 5, col",
    ),
    (spoil("visibility", 3, 0), "object 3 has pixels, but visibility counts 2"),
    (spoil("rotation", 2, np.nan), "'rotation': holds values that are not fin"),
  ],
)
def test_a_bad_record_names_itself_and_the_feature(change, message):
  features = clevr_files.scene(0)
  clevr_with_masks.to_example(
    as_example(features)
  )  # it is the change that fails
  change(features)
  with pytest.raises(UserError, match="^f: record 7, feature .*" + message):
    clevr_with_masks.to_example(as_example(features))


def test_examples_do_not_hold_their_source_record(source):
  # A byte a string is read as a strided view of the record.
  (record,) = tfrecord.read_examples(source / "clevr_with_masks_test.tfrecords")
  assert record.features["color"].base is not None
  for name, value in clevr_with_masks.to_example(record).items():
    while isinstance(value, np.ndarray) and value.base is not None:
      value = value.base
    if isinstance(value, memoryview):
      value = value.obj  # what the view keeps alive
    if isinstance(value, bytes | np.ndarray):
      assert len(value) < 1000, name


def test_nothing_is_overwritten_unasked_or_by_a_bad_source(source, tmp_path):
  root = tmp_path / "data"
  one = write(tmp_path, "clevr_with_masks_a.tfrecords", [1])
  clevr_with_masks.prepare(one, root)
  with pytest.raises(UserError, match="already prepared .*--overwrite"):
    clevr_with_masks.prepare(source, root)

  bad = shutil.copy(one, tmp_path / "clevr_with_masks_b.tfrecords")
  with open(bad, "r+b") as file:
    file.truncate(one.stat().st_size - 20)
  with pytest.raises(UserError, match="record 0: the GZIP stream is truncated"):
    clevr_with_masks.prepare(bad, root, overwrite=True)
  features = clevr_files.scene(0)
  features.pop("color")
  clevr_files.write(bad, [clevr_files.encode(features)])
  with pytest.raises(UserError, match="_b.tfrecords: record 0, .*'color'"):
    clevr_with_masks.prepare(bad, root, overwrite=True)
  kept = clevr_with_masks.ClevrWithMasks(data_dir=root)
  assert kept.info.splits["train"].num_examples == 1

  again = clevr_with_masks.prepare(source, root, overwrite=True)
  assert again.info.splits["train"].num_examples == 5
  assert [path.name for path in root.iterdir()] == ["clevr_with_masks"]


def test_first_real_records(shared_data):
  records = tfrecord.read_examples(shared_data / REAL)
  for record in itertools.islice(records, 3):
    example = clevr_with_masks.to_example(record)
    mask = record.features["mask"].reshape(11, 240, 320)
    stored = np.asarray(Image.open(example["segmentation"]))
    np.testing.assert_array_equal(stored, (mask == 255).argmax(axis=0))
    image = np.asarray(Image.open(io.BytesIO(example["image"].getvalue())))
    np.testing.assert_array_equal(
      image.ravel(), record.features["image"], strict=True
    )
    assert example["num_objects"] == stored.max()
  records.close()


@pytest.mark.slow
def test_the_real_file_has_the_counts_of_its_description(shared_data, tmp_path):
  builder = clevr_with_masks.prepare(shared_data / REAL, tmp_path)
  train = builder.info.metadata["train"]
  assert train["records"] == builder.info.splits["train"].num_examples == 1000
  counts = [train["objects"][str(n)] for n in range(3, 11)]
  assert counts == [129, 127, 126, 119, 123, 127, 130, 119]
  assert train["sources"][0]["sha256"].startswith("ed33aa7fec37019220b9a5da83")
