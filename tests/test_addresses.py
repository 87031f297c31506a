"""Which parameters a reader gets: `W@best`, `W@latest` and `W@STEP`."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_checkpoint import damage

from configs import default
from spectraldiffusion_jax import checkpoint, segmenter, train_state, workdir
from spectraldiffusion_jax.errors import UserError

SCORES = {1: 0.2, 2: 0.9, 3: 0.4}


def make_state(step: int) -> train_state.TrainState:
  return train_state.TrainState(
    step=jnp.asarray(step, jnp.int32),
    params={"kernel": jnp.full((4, 2), float(step))},
    opt_state=(),
    recent=train_state.no_history(),
  )


@pytest.fixture
def run(tmp_path, monkeypatch):
  """A workdir of three steps whose parameters are their step."""
  config = default.get_config()
  workdir.claim(tmp_path, config)
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    for step, score in SCORES.items():
      checkpoints.save(
        step,
        make_state(step),
        config=config.to_dict(),
        metrics={"val/ari": score},
      )
  target = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
    make_state(0),
  )
  monkeypatch.setattr(segmenter.build, "abstract_state", lambda config: target)
  return tmp_path


def kernel(source):
  return float(np.asarray(segmenter.load(source).params["kernel"])[0, 0])


def test_addresses(run):
  for name, step in {"": 3, "@latest": 3, "@best": 2, "@1": 1}.items():
    assert kernel(f"{run}{name}") == step
  for name in ("@7", "@newest"):
    with pytest.raises(UserError, match=r"there are @best, \[1, 2, 3\]"):
      segmenter.load(f"{run}{name}")


def test_a_damaged_step_that_was_asked_for_is_not_replaced(run):
  (data,) = (run / "checkpoints" / "2" / "state" / "d").iterdir()
  damage(data, "truncated")
  for name in ("@2", "@best"):
    with pytest.raises(UserError, match="is damaged"):
      segmenter.load(f"{run}{name}")
  assert kernel(run) == 3


def test_a_flipped_bit_in_the_config_is_found(run):
  path = run / workdir.CONFIG_FILE
  values = json.loads(path.read_text())
  values["model"]["stickiness"] += 1
  path.write_text(json.dumps(values))
  with pytest.raises(UserError, match="model.stickiness: 0.05 -> 1.05"):
    segmenter.load(run)
