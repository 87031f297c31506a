"""The embedded data set: rules, determinism, and preparing it safely."""

import itertools
import os
import pathlib
import signal
import subprocess
import sys
import time
from concurrent import futures

import numpy as np
import pytest

from spectraldiffusion_jax.data import clevr_scenes, clevr_stream
from spectraldiffusion_jax.data import procedural_clevr as data
from spectraldiffusion_jax.errors import UserError

SIZE, SEED = 32, 7
FEW = {"train": (5, 0), "validation": (2, 1), "test": (3, 2)}


@pytest.fixture(scope="module", params=["easy", "hard"])
def scenes(request):
  return request.param, data.render_scenes(request.param, SIZE, SEED, range(32))


def test_shapes_and_types(scenes):
  _, arrays = scenes
  expected = {
    "image": ((32, SIZE, SIZE, 3), np.float32),
    "segmentation": ((32, SIZE, SIZE), np.int32),
    "num_objects": ((32,), np.int32),
    **{k: ((32, 11), np.uint8) for k in ("size", "material", "shape", "color")},
  }
  assert {k: (v.shape, v.dtype) for k, v in arrays.items()} == expected
  assert arrays["image"].min() >= 0 and arrays["image"].max() <= 1


def test_ids_are_contiguous_and_every_object_is_visible(scenes):
  _, arrays = scenes
  for ids, n in zip(arrays["segmentation"], arrays["num_objects"], strict=True):
    count = np.bincount(ids.ravel())
    assert len(count) == n + 1
    # 0.3 % of 32 x 32 pixels are 3.07.
    assert count[1:].min() >= 4


def test_levels_keep_their_rules(scenes):
  level, arrays = scenes
  low, high = {"easy": (3, 6), "hard": (3, 10)}[level]
  assert arrays["num_objects"].min() >= low
  assert arrays["num_objects"].max() <= high
  assert len(set(arrays["num_objects"])) >= 3
  gray, repeats = False, False
  for colors, n in zip(arrays["color"], arrays["num_objects"], strict=True):
    gray |= clevr_scenes.GRAY in colors
    repeats |= len(set(colors[1 : n + 1])) < n
  assert (gray, repeats) == (
    (False, False) if level == "easy" else (True, True)
  )


def test_codes_are_those_of_clevr_with_masks(scenes):
  _, arrays = scenes
  for name, most in {"size": 2, "material": 2, "shape": 3, "color": 8}.items():
    for codes, n in zip(arrays[name], arrays["num_objects"], strict=True):
      assert codes[0] == 0 and not codes[n + 1 :].any()
      assert codes[1 : n + 1].min() >= 1 and codes[1 : n + 1].max() <= most
    assert len(np.unique(arrays[name])) > most - 1
  assert (list(clevr_scenes.COLORS)[0], clevr_scenes.GRAY) == ("red", 6)


def test_pixels_have_the_colour_of_their_code(scenes):
  """Rubber is lit by nearly white lamps, so hue survives."""
  _, arrays = scenes
  right = []
  for i, n in enumerate(arrays["num_objects"]):
    for k in range(1, n + 1):
      pixels = arrays["image"][i][arrays["segmentation"][i] == k]
      if arrays["material"][i, k] == 1 and len(pixels) > 25:
        light = np.median(pixels, axis=0) ** 2.2
        albedo = clevr_scenes.ALBEDO[1:]
        cosine = albedo @ light / np.linalg.norm(albedo, axis=1)
        right.append(cosine.argmax() + 1 == arrays["color"][i, k])
  assert len(right) > 10 and np.mean(right) > 0.95


def test_a_scene_depends_on_seed_and_index_alone(scenes):
  level, arrays = scenes
  some = data.render_scenes(level, SIZE, SEED, [9, 2, 9])
  for name, values in some.items():
    np.testing.assert_array_equal(values, arrays[name][[9, 2, 9]])
  other = data.render_scenes(level, SIZE, SEED + 1, [9, 2])
  assert (
    (other["segmentation"] != some["segmentation"][:2]).any(axis=(1, 2)).all()
  )


def test_objects_keep_their_distance():
  for index in range(20):
    drawn = clevr_scenes.sample_scene("hard", 0, index)
    if drawn is None:
      continue
    n = drawn.num_objects
    place = drawn.scene.center[:n]
    assert np.abs(place[:, :2]).max() <= 3
    camera = drawn.scene.camera[:2] / np.linalg.norm(drawn.scene.camera[:2])
    across = np.asarray([camera[1], -camera[0]])
    for a, b in itertools.combinations(range(n), 2):
      apart = place[a, :2] - place[b, :2]
      # Nominal radii are the heights of the middles.
      assert np.linalg.norm(apart) > place[a, 2] + place[b, 2] + 0.25
      assert min(abs(apart @ camera), abs(apart @ across)) > 0.4 - 1e-5


def test_the_share_of_background_is_that_of_clevr():
  """The public kind of scene has 0.78 in the same crop."""
  ids = data.render_scenes("hard", SIZE, 3, range(96))["segmentation"]
  assert abs((ids == 0).mean() - 0.78) < 0.03


def test_an_endless_stream_can_be_left():
  stream = data.stream_scenes("easy", SIZE, SEED, itertools.count())
  parts = list(itertools.islice(stream, 3))
  stream.close()
  images = np.concatenate([p["image"] for p in parts])
  expected = data.render_scenes("easy", SIZE, SEED, range(len(images)))
  np.testing.assert_array_equal(images, expected["image"])


@pytest.mark.parametrize(
  "name",
  ["medium_64", "easy64", "easy_0", "easy_8", "hard_99999", "", "easy_064"],
)
def test_an_unknown_config_is_refused(name, tmp_path):
  with pytest.raises(UserError, match="procedural_clevr"):
    data.prepare(name, tmp_path)
  assert not list(tmp_path.iterdir())


def test_any_size_has_a_config():
  config = data.builder_config("hard_48")
  assert (config.level, config.size) == ("hard", 48)
  assert data.builder_config("hard_48") is config


@pytest.fixture
def few(monkeypatch):
  monkeypatch.setattr(data, "SPLITS", FEW)


def check(builder, name="easy_32"):
  level, size = name.split("_")
  for split, (count, seed) in FEW.items():
    source = builder.as_data_source(split)
    assert len(source) == count
    expected = data.render_scenes(level, int(size), seed, range(count))
    for i in range(count):
      row = source[i]
      image = (expected["image"][i] * 255 + 0.5).astype(np.uint8)
      np.testing.assert_array_equal(row["image"], image)
      ids = expected["segmentation"][i][..., None]
      np.testing.assert_array_equal(row["segmentation"], ids)
      for key in ("num_objects", *clevr_stream.CODES):
        np.testing.assert_array_equal(row[key], expected[key][i])


def test_prepared_once_in_order_and_without_tensorflow(few, tmp_path, capfd):
  builder = data.prepare("easy_32", tmp_path)
  check(builder)
  out, err = capfd.readouterr()
  assert "images/s" in err and not out
  folder = pathlib.Path(builder.data_path)
  times = {p: p.stat().st_mtime_ns for p in folder.iterdir()}
  check(data.prepare("easy_32", tmp_path))
  assert times == {p: p.stat().st_mtime_ns for p in folder.iterdir()}
  assert "tensorflow" not in sys.modules


def test_what_a_killed_run_left_is_cleared(few, tmp_path):
  folder = tmp_path / "procedural_clevr" / "easy_32"
  leftover = folder / "incomplete.ABC123_1.0.0"
  leftover.mkdir(parents=True)
  (leftover / "procedural_clevr-train.array_record-00000-of-00001").touch()
  (folder.parent / ".easy_32.lock").touch()
  check(data.prepare("easy_32", tmp_path))
  assert [p.name for p in folder.iterdir()] == ["1.0.0"]


def test_two_at_a_time_prepare_it_once(few, tmp_path, monkeypatch):
  runs = []
  whole = data.ProceduralClevr.download_and_prepare

  def counted(self, **kwargs):
    runs.append(self)
    whole(self, **kwargs)

  monkeypatch.setattr(data.ProceduralClevr, "download_and_prepare", counted)
  with futures.ThreadPoolExecutor(2) as threads:
    builders = list(threads.map(data.prepare, ["easy_32"] * 2, [tmp_path] * 2))
  assert len(runs) == 1
  for builder in builders:
    check(builder)


def test_a_data_root_that_is_a_file_is_named(tmp_path):
  path = tmp_path / "data"
  path.write_text("")
  with pytest.raises(UserError, match="data_root"):
    data.prepare("easy_32", path)


@pytest.mark.slow
def test_killed_in_the_middle_and_started_again(few, tmp_path):
  command = (
    "from spectraldiffusion_jax.data import procedural_clevr as data;"
    f"data.prepare('easy_32', {str(tmp_path)!r})"
  )
  process = subprocess.Popen(
    [sys.executable, "-c", command],
    env={**os.environ, "JAX_PLATFORMS": "cpu"},
    stderr=subprocess.PIPE,
    text=True,
  )
  folder = tmp_path / "procedural_clevr" / "easy_32"
  deadline = time.monotonic() + 120
  while not list(folder.glob("incomplete.*")):
    assert time.monotonic() < deadline and process.poll() is None
    time.sleep(0.05)
  time.sleep(1)
  process.send_signal(signal.SIGKILL)
  process.communicate()
  assert list(folder.glob("incomplete.*"))
  check(data.prepare("easy_32", tmp_path))
  assert [p.name for p in folder.iterdir()] == ["1.0.0"]
