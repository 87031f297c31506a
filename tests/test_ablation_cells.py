"""The cells of the ablation: valid, different, buildable, chosen by name."""

import jax
import numpy as np
import pytest

from configs import clevr, default, procedural
from spectraldiffusion_jax import build, train_state
from spectraldiffusion_jax import config as config_lib
from spectraldiffusion_jax.ablation import cells, trained
from spectraldiffusion_jax.errors import UserError


@pytest.mark.parametrize(
  "config",
  [default.get_config(), procedural.get_config("hard"), clevr.get_config()],
  ids=["default", "procedural", "clevr"],
)
@pytest.mark.parametrize("name", cells.CELLS)
def test_every_cell_is_a_valid_config_that_differs_as_listed(config, name):
  cell = cells.CELLS[name]
  made = cells.configure(config, cell, 7)
  config_lib.validate(made)
  changed = {
    line.partition(":")[0]
    for line in config_lib.differences(config.to_dict(), made.to_dict())
  }
  assert changed - {"seed"} <= cell.fields.keys()
  assert made.seed == 7 and config.seed == 0
  if name not in ("full", *(f"phase{i}" for i in range(1, 5))):
    assert changed - {"seed"}, "the switch is off already"


@pytest.mark.parametrize("name", ["no_gmm_prior", "phase3", "phase4"])
def test_cells_without_a_field_or_a_mixture_can_be_trained(name):
  config = cells.configure(procedural.get_config(), cells.CELLS[name], 0)
  model = build.make_model(config)
  shapes = jax.eval_shape(
    lambda image, labels: model.init_with_output(
      train_state.stream_keys(0, 0), image, labels, label_slots=4, train=True
    )[0],
    jax.ShapeDtypeStruct((2, 64, 64, 3), np.float32),
    jax.ShapeDtypeStruct((2, 64, 64), np.int32),
  )
  assert shapes.masks.shape == (2, 4, 64, 64)


def test_a_wrong_name_is_refused_and_the_right_one_proposed():
  with pytest.raises(UserError, match="did you mean 'no_grey'"):
    cells.choose_cells(["full", "nogrey"])
  assert [c.name for c in cells.choose_cells(["no_grey", "full"])] == [
    "full",
    "no_grey",
  ]


def test_a_cell_that_would_train_the_full_model_again_is_left_out():
  easy, every = procedural.get_config(), set(cells.CELLS)
  names = {cell.name for cell in cells.choose_changes(easy, [])}
  assert every - names == {"no_grey", "one_round"}
  assert names == {c.name for c in cells.choose_changes(easy, sorted(names))}
  hard = cells.choose_changes(procedural.get_config("hard"), [])
  assert {cell.name for cell in hard} == every
  with pytest.raises(UserError, match="the config has composite.rounds=1"):
    cells.choose_changes(easy, ["full", "one_round"])


def test_without_training_only_cells_that_keep_the_parameters_are_left():
  names = [cell.name for cell in trained.choose([])]
  assert names[0] == "full" and "no_spectral_init" in names
  assert not {"gru_update", "no_composites", "phase1"} & set(names)
  with pytest.raises(UserError, match="gru_update has to be trained"):
    trained.choose(["full", "gru_update"])
