"""What a configuration must satisfy, and how two differ."""

import json

import pytest

from configs import (
  bdd100k,
  cityscapes,
  clevr,
  default,
  kitti,
  procedural,
)
from spectraldiffusion_jax import config as config_lib
from spectraldiffusion_jax import segmenter
from spectraldiffusion_jax.errors import UserError


def changed(name, value):
  config = default.get_config()
  section, field = name.split(".")
  with config.unlocked():
    config[section][field] = value
  return config


def test_the_default_and_every_variant_are_valid_and_locked():
  plain = (default, cityscapes, kitti, bdd100k)
  configs = [module.get_config() for module in plain]
  configs += [procedural.get_config(v) for v in procedural.VARIANTS]
  configs += [clevr.get_config(v) for v in clevr.VARIANTS]
  for config in configs:
    config_lib.validate(config)
    with pytest.raises(AttributeError):
      config.training.learning_rat = 1.0


@pytest.mark.parametrize(
  ("name", "value", "words"),
  [
    ("model.encoder", "unett", "model.encoder.*did you mean 'unet'"),
    ("model.image_size", 100, "image_size=100 cannot be tiled.*example 96"),
    ("model.num_slots", 0, "model.num_slots=0 has to be greater"),
    ("model.num_slots", 1, "model.num_slots=1 is the background alone"),
    ("model.dinov2_model", "dinov2_vitb16", "did you mean 'dinov[23]_vitb1"),
    ("model.backbone_features", "values", "not one of tokens, keys"),
    ("model.backbone_trainable", -1, "must not be negative"),
    ("model.token_stride", 16, "token_stride=16"),
    ("training.learning_rate", float("nan"), "learning_rate=nan"),
    ("training.grad_clip", -1.0, "grad_clip=-1.0 must not be negative"),
    ("loss_weights.diffusion", -1.0, "loss_weights.diffusion"),
    ("data.crop", (5, 2, 0, 3), "data.crop"),
    ("logging.save_interval", 0, "logging.save_interval"),
  ],
)
def test_a_wrong_value_is_named_in_one_line(name, value, words):
  with pytest.raises(UserError, match=words) as error:
    config_lib.validate(changed(name, value))
  assert "\n" not in str(error.value)


def test_dense_eigenvectors_are_for_the_graph_of_votes_alone():
  config = procedural.get_config("baseline").copy_and_resolve_references()
  config.spectral.use_power_iteration = False
  with pytest.raises(UserError, match="use_power_iteration=False"):
    config_lib.validate(config)


def test_a_run_of_no_steps_is_refused():
  config = changed("training.num_epochs", 0)
  with pytest.raises(UserError, match="both 0"):
    config_lib.validate(config)


def test_saved_and_loaded_configs_are_equal(tmp_path):
  config = default.get_config()
  config_lib.save(config, tmp_path / "c.json")
  loaded = config_lib.load(tmp_path / "c.json")
  assert loaded.to_dict() == config.to_dict()
  assert isinstance(loaded.spectral.scales, tuple) and loaded.is_locked


def test_differences_name_fields_and_spare_those_that_only_say_where():
  old, new = default.get_config(), changed("model.width", 7)
  with new.unlocked():
    new.data.data_root = "elsewhere"
    new.logging.log_interval = 99
    new.mesh.fsdp = 2
  found = config_lib.differences(json.loads(new.to_json()), old.to_dict())
  assert found == ["model.width: 7 -> 24"]


@pytest.mark.parametrize("text", [None, "{", ""])
def test_a_workdir_without_a_readable_config_is_refused(tmp_path, text):
  path = tmp_path / "config.json"
  if text is not None:
    path.write_text(text)
  with pytest.raises(UserError, match="workdir"):
    config_lib.load(path)


@pytest.mark.parametrize(
  "module", [procedural, clevr, default, cityscapes, kitti, bdd100k]
)
def test_an_unknown_variant_is_refused(module):
  with pytest.raises(ValueError, match="no variant 'nonsense'"):
    module.get_config("nonsense")


def test_the_published_checkpoint_lacks_no_field():
  loaded = config_lib.load(segmenter.PRETRAINED / "clevr" / "config.json")
  names = {name for name, _ in config_lib.flatten(default.get_config())}
  assert {name for name, _ in config_lib.flatten(loaded)} == names


def test_fields_are_set_by_name_and_type():
  config = config_lib.override(
    default.get_config(),
    ["spectral.count=eigengap", "model.num_slots=7", "data.cache=false"],
  )
  assert config.spectral.count == "eigengap" and config.model.num_slots == 7
  assert config.data.cache is False


@pytest.mark.parametrize(
  ("text", "words"),
  [
    ("spectral.count", "section.field=value"),
    ("spectral.cuont=fixed", "section.field=value"),
    ("spectral.scales=8", "section.field=value"),
    ("model.num_slots=many", "model.num_slots is a int"),
    ("data.cache=1", "data.cache is a bool"),
    ("spectral.count=all", "spectral.count"),
  ],
)
def test_a_wrong_setting_is_refused(text, words):
  with pytest.raises(UserError, match=words):
    config_lib.override(default.get_config(), [text])
