"""A small prepared data set: 16x20 scenes whose pixels tell their number."""

import io

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

HEIGHT, WIDTH = 16, 20
SIZES = {"train": 23, "test": 7}


def scene(split: str, number: int) -> dict[str, np.ndarray | int]:
  """A smooth image and a segmentation of 1 to 4 objects in upright stripes."""
  rng = np.random.default_rng([number, len(split)])
  coarse = rng.integers(0, 256, (4, 5, 3), np.uint8)
  image = Image.fromarray(coarse).resize((WIDTH, HEIGHT))
  objects = 1 + number % 4
  columns = np.arange(WIDTH) * (objects + 1) // WIDTH
  return {
    "image": np.array(image),
    "segmentation": np.tile(columns, (HEIGHT, 1)).astype(np.uint8),
    "num_objects": objects,
  }


def _png(pixels: np.ndarray) -> io.BytesIO:
  file = io.BytesIO()
  Image.fromarray(pixels).save(file, "PNG")
  file.seek(0)
  return file


class ToyScenes(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """The builder `toy_scenes`."""

  VERSION = tfds.core.Version("1.0.0")
  counted = True  # whether num_objects is stored

  def _info(self):
    features = {
      "image": tfds.features.Image(shape=(HEIGHT, WIDTH, 3)),
      "segmentation": tfds.features.Image(
        shape=(HEIGHT, WIDTH, 1), encoding_format="png"
      ),
      "num_objects": tfds.features.Scalar(np.int32),
    }
    if not self.counted:
      del features["num_objects"]
    return tfds.core.DatasetInfo(
      builder=self,
      features=tfds.features.FeaturesDict(features),
      disable_shuffling=True,
    )

  def _split_generators(self, dl_manager):
    return {split: self._generate_examples(split) for split in SIZES}

  def _generate_examples(self, split):
    for number in range(SIZES[split]):
      stored = scene(split, number)
      if not self.counted:
        del stored["num_objects"]
      for name in ("image", "segmentation"):
        stored[name] = _png(stored[name])
      yield number, stored


class UncountedScenes(ToyScenes, skip_registration=True):
  """The builder `uncounted_scenes`, without the feature num_objects."""

  VERSION = tfds.core.Version("1.0.0")
  counted = False


def prepare(root, builder=ToyScenes):
  """Writes the data set under root."""
  tfds.disable_progress_bar()
  builder(data_dir=root, file_format="array_record").download_and_prepare()
  return root
