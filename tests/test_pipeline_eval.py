"""Evaluation batches: exact coverage for any batch size and process count."""

import numpy as np
import pytest
import toy_scenes
from PIL import Image

from spectraldiffusion_jax.data import pipeline
from spectraldiffusion_jax.data.transforms import fit, to_float
from spectraldiffusion_jax.errors import UserError

SIZE = (8, 10)
EVAL = {
  "dataset": "toy_scenes",
  "split": "train",
  "image_size": SIZE,
  "crop": (),
  "max_objects": None,
  "batch_size": 4,
  "num_threads": 0,
  "cache": False,
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
  return toy_scenes.prepare(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize("batch_size", [1, 4, 6, 23, 24, 40])
@pytest.mark.parametrize("split", ["train", "test"])
def test_evaluation_is_exact_for_any_batch_and_process_count(
  root, batch_size, split
):
  total = toy_scenes.SIZES[split]
  for processes in (1, 2, 4):
    if batch_size % processes:
      continue
    options = EVAL | {"split": split, "batch_size": batch_size}
    shards = [
      pipeline.make_eval(
        **options, data_root=root, process_index=p, process_count=processes
      )
      for p in range(processes)
    ]
    batches = [list(shard) for shard in shards]
    expected = -(-total // batch_size)
    assert [len(shard) for shard in shards] == [expected] * processes
    assert [len(shard) for shard in batches] == [expected] * processes
    assert all(shard.num_examples == total for shard in shards)
    rows = [batch for step in zip(*batches, strict=True) for batch in step]
    joined = {
      name: np.concatenate([batch[name] for batch in rows]) for name in rows[0]
    }
    assert joined["index"].shape == (expected * batch_size,)
    real = joined["mask"]
    assert joined["index"][real].tolist() == list(range(total))
    assert (joined["index"][~real] == -1).all()
    assert not joined["image"][~real].any()
    assert not joined["segmentation"][~real].any()
    for index in (0, total - 1):
      scene = fit(toy_scenes.scene(split, index), window=None, size=SIZE)
      np.testing.assert_array_equal(
        joined["image"][index], to_float(scene["image"])
      )
      np.testing.assert_array_equal(
        joined["segmentation"][index], scene["segmentation"]
      )


def test_evaluation_can_be_iterated_again_and_left_early(root):
  batches = pipeline.make_eval(
    **(EVAL | {"num_threads": 2, "cache": True}), data_root=root
  )
  first = list(batches)
  for _ in batches:
    break
  for batch, before in zip(batches, first, strict=True):
    for name, values in before.items():
      np.testing.assert_array_equal(batch[name], values, strict=True)


def test_max_objects_and_lengths(root):
  count = lambda most: pipeline.num_examples(  # noqa: E731
    dataset="toy_scenes", split="train", data_root=root, max_objects=most
  )
  assert [count(most) for most in (None, 0, 1, 2, 3, 4)] == [
    23,
    23,
    6,
    12,
    18,
    23,
  ]
  served = list(
    pipeline.make_eval(**(EVAL | {"max_objects": 2}), data_root=root)
  )
  assert sum(batch["mask"].sum() for batch in served) == 12
  assert max(batch["segmentation"].max() for batch in served) == 2
  with pytest.raises(UserError, match="max_objects=-1 leaves no scene"):
    count(-1)
  assert [pipeline.steps_per_epoch(23, b) for b in (1, 4, 23, 24)] == [
    23,
    6,
    1,
    1,
  ]


def test_plain_images_have_no_segmentation(tmp_path):
  for n in range(3):
    pixels = np.full((12 + n, 30, 3), 51 * n, np.uint8)
    Image.fromarray(pixels).save(tmp_path / f"{n}.png")
  options = EVAL | {"dataset": "images", "image_size": 8}
  (served,) = pipeline.make_eval(**options, data_root=tmp_path)
  assert served.keys() == {"image", "mask", "index"}
  values = served["image"][:, 0, 0, 0]
  np.testing.assert_allclose(values, [0, 0.2, 0.4, 0])


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"batch_size": 3, "process_count": 2}, "batch_size=3 is not a positive"),
    ({"crop": (0, 17, 0, 20)}, r"crop=\(0, 17, 0, 20\).* 16x20"),
    ({"split": "val"}, "split='val'"),
  ],
)
def test_a_wrong_field_is_named_before_the_first_batch(root, options, message):
  with pytest.raises(UserError, match=message):
    pipeline.make_eval(**(EVAL | options), data_root=root)
