"""One run at a time in a folder, one config for good."""

import os

import pytest

from configs import default
from spectraldiffusion_jax import workdir
from spectraldiffusion_jax.errors import UserError


def test_a_second_run_in_the_same_folder_is_refused(tmp_path):
  with workdir.locked(tmp_path):
    with pytest.raises(UserError, match="in use by another"):
      with workdir.locked(tmp_path):
        pass
  with workdir.locked(tmp_path):
    pass


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(UserError, match="cannot be written"):
    with workdir.locked(tmp_path / "file" / "run"):
      pass


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_named(tmp_path):
  tmp_path.chmod(0o500)
  with pytest.raises(UserError, match="cannot be written"):
    with workdir.locked(tmp_path):
      pass


def test_another_config_is_refused_and_nothing_overwritten(tmp_path):
  config = default.get_config()
  workdir.claim(tmp_path, config)
  workdir.claim(tmp_path, config)
  before = (tmp_path / workdir.CONFIG_FILE).read_bytes()
  with config.unlocked():
    config.model.width = 99
    config.seed = 3
  with pytest.raises(UserError, match="model.width: 24 -> 99; seed: 0 -> 3"):
    workdir.claim(tmp_path, config)
  assert (tmp_path / workdir.CONFIG_FILE).read_bytes() == before


def test_where_a_run_logs_may_change(tmp_path):
  config = default.get_config()
  workdir.claim(tmp_path, config)
  with config.unlocked():
    config.logging.log_interval = 1
  workdir.claim(tmp_path, config)
