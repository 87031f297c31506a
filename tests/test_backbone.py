"""Backbones by name: sizes, preprocessing, weights, refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from spectraldiffusion_jax import backbone as backbones
from spectraldiffusion_jax import weights as weight_files
from spectraldiffusion_jax.backbone import load_backbone
from spectraldiffusion_jax.errors import UserError
from spectraldiffusion_jax.models.vit_input import input_size


@pytest.fixture(scope="module")
def tiny():
  return load_backbone("vit_tiny", "random", depth=2)


def images(b=2, height=16, width=24, seed=0):
  rng = np.random.default_rng(seed)
  return jnp.asarray(rng.random((b, height, width, 3), np.float32))


@pytest.mark.parametrize(
  ("size", "patch", "longest", "wanted"),
  [
    ((128, 128), 14, 0, (126, 126)),  # 9.14 patches
    ((512, 512), 14, 0, (518, 518)),  # 36.57
    ((504, 1008), 14, 0, (504, 1008)),
    ((7, 3), 14, 0, (14, 14)),  # half a patch goes up; never none
    ((21, 35), 14, 0, (28, 42)),  # 1.5 and 2.5: ties go up
    ((1024, 2048), 14, 518, (266, 518)),  # 259 rows: 18.5
    ((128, 128), 14, 224, (224, 224)),
    ((375, 1242), 16, 0, (368, 1248)),
  ],
)
def test_input_size(size, patch, longest, wanted):
  assert input_size(*size, patch=patch, longest=longest) == wanted


def test_features_are_those_of_the_normalised_image(tiny):
  image = images()
  mean = np.asarray([0.485, 0.456, 0.406], np.float32)
  std = np.asarray([0.229, 0.224, 0.225], np.float32)
  normal = (np.asarray(image) - mean) / std
  wanted = jax.jit(tiny.model.apply)({"params": tiny.params}, normal)
  features = tiny(image)
  assert features.shape == (2, 2, 3, 192) and features.dtype == jnp.float32
  np.testing.assert_allclose(features, wanted.tokens, atol=2e-5)
  keys = tiny.replace(features="keys")(image)
  np.testing.assert_allclose(keys, wanted.keys, atol=2e-5)
  assert jnp.abs(keys - features).max() > 0.1


@pytest.mark.parametrize(("size", "longest"), [((19, 30), 0), ((24, 36), 24)])
def test_resizing_equals_pil(tiny, size, longest):
  image = np.random.default_rng(0).integers(0, 2, (*size, 3)).astype("f4")
  height, width = input_size(*size, patch=8, longest=longest)
  resized = np.stack(
    [
      Image.fromarray(channel).resize((width, height), Image.Resampling.BICUBIC)
      for channel in np.moveaxis(image, -1, 0)
    ],
    axis=-1,
  )
  assert resized.min() < 0 or resized.max() > 1  # there is something to cut
  wanted = tiny(jnp.asarray(resized[None].clip(0, 1)))
  ours = tiny.replace(size=longest)(jnp.asarray(image[None]))
  np.testing.assert_allclose(ours, wanted, atol=2e-4)


def test_each_image_of_a_batch_is_by_itself(tiny):
  image = images()
  np.testing.assert_allclose(tiny(image)[1:], tiny(image[1:]), atol=2e-5)


def test_can_be_passed_into_jit_and_compiles_once(tiny):
  image = images(1, 8, 8, seed=3)
  inside = jax.jit(lambda backbone, x: backbone(x) * 2)(tiny, image)
  np.testing.assert_allclose(inside, tiny(image) * 2, atol=1e-4)
  before = backbones._features._cache_size()
  tiny(image + 0.1)
  load_backbone("vit_tiny", "random", depth=2, seed=1)(image)
  assert backbones._features._cache_size() == before


def test_random_weights_are_those_of_the_seed(tiny):
  again, other = (
    load_backbone("vit_tiny", "random", depth=2, seed=s) for s in (0, 1)
  )
  kernel = [x.params["patch_embed"]["kernel"] for x in (tiny, again, other)]
  np.testing.assert_array_equal(kernel[0], kernel[1])
  assert jnp.abs(kernel[0] - kernel[2]).max() > 0.01


def test_bfloat16_gives_float32_features_nearby(tiny):
  half = load_backbone("vit_tiny", "random", depth=2, dtype="bfloat16")
  assert half.params["norm"]["scale"].dtype == jnp.float32
  a, b = tiny(images()), half(images())
  assert b.dtype == jnp.float32
  assert 1e-5 < jnp.linalg.norm(a - b) / jnp.linalg.norm(a) < 2e-2


def test_loads_a_saved_file(tmp_path):
  source = load_backbone("vit_tiny", "random", depth=2, seed=5)
  path = tmp_path / "deep" / "tiny.safetensors"
  weight_files.save_weights(path, "vit_tiny", source.params)
  plain = load_backbone("vit_tiny", path, depth=2)
  image = images(1, 8, 16)
  np.testing.assert_array_equal(plain(image), source(image))
  scanned = load_backbone("vit_tiny", path, depth=2, scan=True)
  np.testing.assert_allclose(scanned(image), source(image), atol=1e-5)
  assert [p.name for p in path.parent.iterdir()] == ["tiny.safetensors"]


# ---- refusals ---------------------------------------------------------------


def test_without_weights_it_says_how_to_get_them():
  with pytest.raises(UserError) as error:
    load_backbone("dinov2_vitb14")
  message = str(error.value)
  assert "launch/convert.py --source=facebook/dinov2-base" in message
  assert "weights='random'" in message and "\n" not in message


@pytest.mark.parametrize(
  ("image", "message"),
  [
    (np.zeros((1, 8, 8, 3), np.uint8), "uint8.*255"),
    (np.zeros((8, 8, 3), np.float32), r"\[B, H, W, 3\]"),
    (np.zeros((1, 3, 8, 8), np.float32), r"\[B, H, W, 3\]"),
    (np.zeros((0, 8, 8, 3), np.float32), r"\[B, H, W, 3\]"),
  ],
)
def test_wrong_images_are_refused(tiny, image, message):
  with pytest.raises(UserError, match=message):
    tiny(image)


def test_wrong_options_are_refused():
  with pytest.raises(UserError, match="choose tokens or keys"):
    load_backbone("vit_tiny", "random", features="values")
  with pytest.raises(UserError, match="dinov2_vitb14"):
    load_backbone("dinov2", "random")
  with pytest.raises(UserError, match="no weights file at nowhere"):
    load_backbone("vit_tiny", "nowhere")


def test_weights_of_another_model_are_refused(tmp_path, tiny):
  path = tmp_path / "a.safetensors"
  weight_files.save_weights(path, "vit_tiny", tiny.params)
  with pytest.raises(UserError, match="of vit_tiny, not of dinov2_vits14"):
    load_backbone("dinov2_vits14", path)
  with pytest.raises(UserError, match=r"missing \(block_2/attn/key/bias, "):
    load_backbone("vit_tiny", path)  # the file has two blocks of six


def test_changed_bytes_are_refused(tmp_path, tiny):
  path = tmp_path / "a.safetensors"
  weight_files.save_weights(path, "vit_tiny", tiny.params)
  data = bytearray(path.read_bytes())
  data[-5] ^= 1
  path.write_bytes(data)
  with pytest.raises(UserError, match="checksum"):
    load_backbone("vit_tiny", path, depth=2)


def test_unconverted_files_are_refused(tmp_path):
  import safetensors.numpy

  path = tmp_path / "a.safetensors"
  safetensors.numpy.save_file({"cls_token": np.zeros(3)}, path)
  with pytest.raises(UserError, match="launch/convert.py"):
    load_backbone("vit_tiny", path)
