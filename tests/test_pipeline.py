"""Training batches: coverage, resume, shards, augmentation, labels, cache."""

import collections
import itertools
import subprocess
import sys

import numpy as np
import pytest
import toy_scenes

from spectraldiffusion_jax.data import pipeline
from spectraldiffusion_jax.data.transforms import fit, to_float
from spectraldiffusion_jax.errors import UserError

SIZE = (8, 10)
AUGMENT = {"flip": 0.5, "crop_scale": (0.5, 1.0), "brightness": 0.3}
COMMON = {
  "dataset": "toy_scenes",
  "image_size": SIZE,
  "crop": None,
  "max_objects": None,
  "num_threads": 0,
  "cache": False,
}
TRAIN = COMMON | {
  "split": "train",
  "augment": AUGMENT,
  "batch_size": 4,
  "seed": 3,
  "num_workers": 0,
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
  return toy_scenes.prepare(tmp_path_factory.mktemp("data"))


def take(root, count, **options):
  """The first batches of a training iterator."""
  iterator = pipeline.make_train(**(TRAIN | options), data_root=root)
  batches = list(itertools.islice(iterator, count))
  iterator.close()
  return batches


def assert_same(found, expected):
  assert len(found) == len(expected)
  for one, other in zip(found, expected, strict=True):
    assert one.keys() == other.keys()
    for name, values in other.items():
      np.testing.assert_array_equal(one[name], values, strict=True)


def indices(batches):
  return np.concatenate([batch["index"] for batch in batches])


def test_a_batch_is_what_types_says(root):
  labels = np.zeros((23, *SIZE), np.uint8)
  for options in ({}, {"augment": None}, {"labels": labels}):
    (batch,) = take(root, 1, **options)
    expected = {
      "image": ((4, *SIZE, 3), np.float32),
      "segmentation": ((4, *SIZE), np.int32),
      "mask": ((4,), np.bool_),
      "index": ((4,), np.int32),
    }
    if "labels" in options:
      expected["labels"] = ((4, *SIZE), np.uint8)
    assert {k: (v.shape, v.dtype) for k, v in batch.items()} == expected
    assert batch["mask"].all()
    assert 0 <= batch["image"].min() < batch["image"].max() <= 1


def test_rows_are_the_fitted_examples(root):
  for batch in take(root, 3, augment=None, crop=(2, 14, 4, 20)):
    for row, index in enumerate(batch["index"]):
      expected = fit(
        toy_scenes.scene("train", index), window=(2, 14, 4, 20), size=SIZE
      )
      np.testing.assert_array_equal(
        batch["image"][row], to_float(expected["image"])
      )
      np.testing.assert_array_equal(
        batch["segmentation"][row], expected["segmentation"]
      )


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_every_epoch_covers_each_index_once(root, processes):
  batches = 23  # 4 epochs of 23 examples
  shards = [
    take(root, batches, process_index=p, process_count=processes)
    for p in range(processes)
  ]
  # Global position b * 4 + r * P + p belongs to row r of process p.
  order = np.stack([indices(shard) for shard in shards], axis=1).ravel()
  epochs = order.reshape(4, 23)
  for epoch in epochs:
    assert sorted(epoch) == list(range(23))
  assert len({tuple(epoch) for epoch in epochs}) == 4  # each in its own order


def test_a_global_batch_does_not_depend_on_the_processes(root):
  whole = take(root, 7)
  for processes in (2, 4):
    parts = [
      take(root, 7, process_index=p, process_count=processes)
      for p in range(processes)
    ]
    for number, batch in enumerate(whole):
      for name, values in batch.items():
        joined = np.concatenate([part[number][name] for part in parts])
        order = np.concatenate([part[number]["index"] for part in parts])
        rows = [list(order).index(index) for index in batch["index"]]
        np.testing.assert_array_equal(joined[rows], values)


def test_seed_decides_order_and_augmentation(root):
  assert_same(take(root, 3), take(root, 3))
  other = take(root, 3, seed=4)
  assert (indices(other) != indices(take(root, 3))).any()
  assert len(set(indices(take(root, 23)[:5]))) == 20  # within one epoch


def test_augmentation_differs_between_epochs(root):
  seen = collections.defaultdict(list)
  for batch in take(root, 23):
    for row, index in enumerate(batch["index"]):
      seen[int(index)].append(batch["image"][row])
  changed = [np.ptp(np.stack(images), axis=0).max() for images in seen.values()]
  assert len(changed) == 23 and min(changed) > 0.01


@pytest.mark.parametrize("threads", [0, 2])
def test_resume_is_exact_at_every_step(root, threads):
  options = TRAIN | {"num_threads": threads}
  straight = pipeline.make_train(**options, data_root=root)
  states, batches = [], []
  for _ in range(13):  # across an epoch's end
    states.append(straight.get_state())
    batches.append(next(straight))
  straight.close()
  for step, state in enumerate(states):
    resumed = pipeline.make_train(**options, data_root=root)
    resumed.set_state(state)
    assert_same(list(itertools.islice(resumed, 13 - step)), batches[step:])
    resumed.close()


@pytest.mark.parametrize(
  "options", [{}, {"process_index": 1, "process_count": 2}]
)
def test_first_batch_skips_exactly(root, options):
  straight = take(root, 12, **options)
  for first in (1, 5, 11):
    assert_same(
      take(root, 12 - first, first_batch=first, **options), straight[first:]
    )


@pytest.mark.parametrize("options", [{"num_threads": 3}, {"cache": True}])
def test_threads_and_cache_change_nothing(root, options):
  assert_same(take(root, 14, **options), take(root, 14))


def test_the_cache_decodes_once(root, monkeypatch):
  calls = collections.Counter()
  original = pipeline.sources.TfdsSource.__getitem__

  def counted(self, index):
    calls[index] += 1
    return original(self, index)

  monkeypatch.setattr(pipeline.sources.TfdsSource, "__getitem__", counted)
  take(root, 23, cache=True)
  assert calls == dict.fromkeys(range(23), 1)
  take(root, 23)
  assert sum(calls.values()) == 23 + 1 + 4 * 23  # one to check the crop


WORKERS = """
import sys
sys.path.insert(0, "tests")
import itertools
import numpy as np
from absl import flags
import test_pipeline
if __name__ == "__main__":
  flags.FLAGS.mark_as_parsed()
  root = sys.argv[1]
  expected = test_pipeline.take(root, 9)
  options = test_pipeline.TRAIN | {"num_workers": 2}
  iterator = test_pipeline.pipeline.make_train(**options, data_root=root)
  found = list(itertools.islice(iterator, 4))
  state = iterator.get_state()
  found += list(itertools.islice(iterator, 5))
  test_pipeline.assert_same(found, expected)
  iterator.set_state(state)
  test_pipeline.assert_same(list(itertools.islice(iterator, 5)), expected[4:])
  iterator.close()
  test_pipeline.assert_same(
    test_pipeline.take(root, 4, num_workers=2, first_batch=5), expected[5:]
  )
  assert "tensorflow" not in sys.modules
"""


@pytest.mark.slow
def test_workers_change_nothing(root, tmp_path, request):
  # Workers import the main module anew, so it has to be a guarded script.
  script = tmp_path / "run.py"
  script.write_text(WORKERS)
  subprocess.run(
    [sys.executable, str(script), str(root)],
    cwd=request.config.rootpath,
    check=True,
    timeout=200,
  )


def test_labels_follow_the_image(root):
  # The labels repeat the segmentation, so they have to move as it does.
  options = COMMON | {"split": "train", "batch_size": 4}
  batches = list(pipeline.make_eval(**options, data_root=root))
  labels = np.concatenate([b["segmentation"][b["mask"]] for b in batches])
  labels = (labels + 5).astype(np.uint8)
  for batch in take(root, 8, labels=labels):
    np.testing.assert_array_equal(batch["labels"], batch["segmentation"] + 5)


def test_labels_are_counted_after_the_filter(root):
  kept = [n for n in range(23) if 1 + n % 4 <= 2]
  labels = np.stack([np.full(SIZE, n, np.uint8) for n in kept])
  for batch in take(root, 6, labels=labels, max_objects=2, augment=None):
    for row, index in enumerate(batch["index"]):
      assert (batch["labels"][row] == kept[index]).all()
      assert batch["segmentation"][row].max() == 1 + kept[index] % 4


@pytest.mark.parametrize(
  "labels",
  [
    np.zeros((22, *SIZE), np.uint8),
    np.zeros((23, *SIZE[::-1]), np.uint8),
    np.zeros((23, *SIZE), np.int32),
  ],
)
def test_labels_have_to_fit(root, labels):
  with pytest.raises(UserError, match=r"labels: .*uint8 \(23, 8, 10\)"):
    take(root, 1, labels=labels)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"batch_size": 3, "process_count": 2}, "batch_size=3 is not a positive"),
    ({"batch_size": 0}, "batch_size=0"),
    ({"image_size": (8, 0)}, "image_size="),
    ({"image_size": (8, 8, 8)}, "image_size="),
    ({"seed": -1}, "seed=-1"),
    ({"crop": (0, 17, 0, 20)}, r"crop=\(0, 17, 0, 20\).* 16x20"),
    ({"augment": {"flop": 1}}, r"augment\.flop"),
    ({"split": "val"}, "split='val'"),
    ({"dataset": "toys"}, "dataset='toys'"),
  ],
)
def test_a_wrong_field_is_named(root, options, message):
  with pytest.raises(UserError, match=message):
    take(root, 1, **options)
