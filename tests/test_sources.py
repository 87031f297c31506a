"""Opening data sets by name: values, split algebra, counts and messages."""

import pickle
import shutil
import sys

import numpy as np
import pytest
import toy_scenes
from PIL import Image

from spectraldiffusion_jax.data import prepared, sources
from spectraldiffusion_jax.errors import UserError


@pytest.fixture(scope="module")
def root(tmp_path_factory):
  folder = tmp_path_factory.mktemp("data")
  toy_scenes.prepare(folder, toy_scenes.UncountedScenes)
  return toy_scenes.prepare(folder)


def test_examples_are_the_stored_arrays_in_order(root):
  source = sources.load("toy_scenes", "test", data_root=root)
  assert len(source) == 7
  for number in range(7):
    expected = toy_scenes.scene("test", number)
    example = source[number]
    assert example.keys() == {"image", "segmentation"}
    for name, values in example.items():
      np.testing.assert_array_equal(values, expected[name], strict=True)
  assert "tensorflow" not in sys.modules


@pytest.mark.parametrize(
  ("split", "expected"),
  [
    ("train", [("train", i) for i in range(23)]),
    ("train[:10]", [("train", i) for i in range(10)]),
    ("train[-3:]", [("train", i) for i in (20, 21, 22)]),
    ("train[50%:60%]", [("train", i) for i in (12, 13)]),
    ("train[90%:]", [("train", 21), ("train", 22)]),
    ("test[6:]+train[:2]", [("test", 6), ("train", 0), ("train", 1)]),
  ],
)
def test_split_algebra(root, split, expected):
  source = sources.load("toy_scenes", split, data_root=root)
  assert len(source) == len(expected)
  for index, (name, number) in enumerate(expected):
    stored = toy_scenes.scene(name, number)
    np.testing.assert_array_equal(source[index]["image"], stored["image"])
  counts = [1 + number % 4 for _, number in expected]
  assert source.num_objects().tolist() == counts


def test_halves_part_the_split(root):
  parts = [
    sources.load("toy_scenes", split, data_root=root)
    for split in ("train[:50%]", "train[50%:]", "train")
  ]
  assert len(parts[0]) + len(parts[1]) == len(parts[2])


def test_counts_are_kept_and_damage_is_mended(root, monkeypatch):
  source = sources.load("toy_scenes", "train", data_root=root)
  expected = source.num_objects()
  assert expected.tolist() == [1 + n % 4 for n in range(23)]
  folder = root / "toy_scenes" / "1.0.0"
  kept = folder / "num_objects-train.npy"
  assert np.load(kept).tolist() == expected.tolist()

  with monkeypatch.context() as patch:
    patch.setattr(sources.TfdsSource, "_count", None)  # not called again
    assert source.num_objects().tolist() == expected.tolist()
  for damage in (b"", b"\x93NUMPY", kept.read_bytes()[:-7]):
    kept.write_bytes(damage)
    assert source.num_objects().tolist() == expected.tolist()
  np.save(kept, np.zeros(3, np.int32))  # of another data set
  assert source.num_objects().tolist() == expected.tolist()
  assert not list(folder.glob("tmp*"))


def test_counts_without_the_feature_come_from_the_segmentation(root):
  source = sources.load("uncounted_scenes", "test", data_root=root)
  assert source.num_objects().tolist() == [1 + n % 4 for n in range(7)]


def test_counting_decodes_no_image(root, monkeypatch):
  monkeypatch.setattr(sources, "read_rgb", None)
  shutil.rmtree(root / "copy", ignore_errors=True)
  shutil.copytree(root / "toy_scenes" / "1.0.0", root / "copy" / "1.0.0")
  for counts in (root / "copy" / "1.0.0").glob("*.npy"):
    counts.unlink()
  source = sources.load("copy", "train", data_root=root)
  assert source.num_objects().sum() > 0
  shutil.rmtree(root / "copy")


def test_a_source_survives_pickling_with_its_name(root):
  source = sources.load("toy_scenes", "train[:5]", data_root=root)
  again = pickle.loads(pickle.dumps(source))
  assert repr(again) == repr(source)
  assert repr(source) == "TfdsSource(toy_scenes/1.0.0, split='train[:5]', n=5)"
  np.testing.assert_array_equal(again[3]["image"], source[3]["image"])
  assert again.num_objects().tolist() == source.num_objects().tolist()


def test_the_newest_version_is_opened(root, tmp_path):
  for version in ("1.0.0", "1.10.0", "1.9.0"):
    shutil.copytree(
      root / "toy_scenes" / "1.0.0", tmp_path / "toy_scenes" / version
    )
  folder = prepared.folder_of("toy_scenes", tmp_path)
  assert folder.name == "1.10.0"


@pytest.mark.parametrize(
  ("dataset", "split", "message"),
  [
    ("toy_scenes", "tset", r"^split='tset' .* train \(23 examples\), test \(7"),
    ("toy_scenes", "train[:x%]", r"^split='train\[:x%\]' selects nothing"),
    ("toy_scenes", "train[:0]", r"^split='train\[:0\]' selects nothing"),
    ("toy_scenes", "train[:500]", "selects nothing"),
    ("toy_scenes", "test+tset", "selects nothing"),
    ("toy_scenes", "", "selects nothing"),
    (
      "clevr_with_masks",
      "train",
      r"not prepared under .* \(toy_scenes, unc.*prepare.py --dataset=clevr",
    ),
    ("toys", "train", r"^dataset='toys' is not prepared .* any other"),
    ("", "train", "^dataset='' is not prepared"),
  ],
)
def test_a_wrong_name_says_what_there_is(root, dataset, split, message):
  with pytest.raises(UserError, match=message) as caught:
    sources.load(dataset, split, data_root=root)
  assert "\n" not in str(caught.value)


def test_a_missing_or_empty_root_says_so(tmp_path):
  for folder, held in (
    (tmp_path / "no", "no such folder"),
    (tmp_path, "no pre"),
  ):
    with pytest.raises(UserError, match=rf"data_root=.* \({held}.*prepare.py"):
      sources.load("clevr_with_masks", "train", data_root=folder)


@pytest.fixture
def images(tmp_path):
  (tmp_path / "deep").mkdir()
  for name, colour in (("a.png", 10), ("deep/b.JPG", 20), ("c.bmp", 30)):
    pixels = np.full((6, 8), colour, np.uint8)
    form = "JPEG" if name.endswith("JPG") else None
    Image.fromarray(pixels).save(tmp_path / name, form)
  (tmp_path / "notes.txt").write_text("no image")
  return tmp_path


def test_a_folder_of_images(images):
  source = sources.load("images", "train", data_root=images)
  assert [source[i]["image"][0, 0, 0] for i in range(len(source))] == [
    10,
    30,
    20,
  ]
  assert source[0]["image"].shape == (6, 8, 3)
  part = sources.load("images", "train[1:]", data_root=images)
  assert [path.name for path in part.files] == ["c.bmp", "b.JPG"]
  with pytest.raises(UserError, match="max_objects"):
    source.num_objects()


def test_a_bad_folder_of_images(images):
  with pytest.raises(UserError, match=r"split='test' .* train \(3 examples"):
    sources.load("images", "test", data_root=images)
  with pytest.raises(UserError, match="is no folder"):
    sources.load("images", "train", data_root=images / "a.png")
  (images / "empty").mkdir()
  with pytest.raises(UserError, match="holds no image"):
    sources.load("images", "train", data_root=images / "empty")
  (images / "a.png").write_bytes(b"\x89PNG broken")
  source = sources.load("images", "train", data_root=images)
  with pytest.raises(UserError, match="a.png is no image of PNG"):
    source[0]
