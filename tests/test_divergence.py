"""Refused steps: what is an explosion, what is said, when a run goes back."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_train_step import ROWS, batch, make

from spectraldiffusion_jax import divergence, train_state
from spectraldiffusion_jax.divergence import Verdict
from spectraldiffusion_jax.train_step import explodes


def watch(folder, **options):
  return divergence.Watch(
    folder,
    layers=["w"],
    **({"max_skips": 0, "max_rollbacks": 0} | options),
  )


def numbers(*, accepted=True, loss=1.0):
  return {
    "loss": np.float32(loss),
    "grad_norm": np.float32(loss),
    "finite": np.float32(np.isfinite(loss)),
    "accepted": np.float32(accepted),
    "layer_grad_norms": np.array([loss], np.float32),
  }


def test_an_explosion_is_relative_to_the_median_of_a_full_window():
  window = jnp.full((2, train_state.WINDOW), 2.0)
  assert explodes(jnp.array([201.0, 1.0]), window, 100.0)
  assert explodes(jnp.array([1.0, 201.0]), window, 100.0)
  assert not explodes(jnp.array([199.0, 199.0]), window, 100.0)
  # A few outliers in the window do not move its median.
  spiked = window.at[:, :5].set(1e9)
  assert explodes(jnp.array([201.0, 1.0]), spiked, 100.0)
  # Neither a young run nor one without a limit has explosions.
  young = window.at[:, 0].set(jnp.nan)
  assert not explodes(jnp.array([1e9, 1e9]), young, 100.0)
  assert not explodes(jnp.array([1e9, 1e9]), window, 0.0)


def test_an_exploding_step_is_refused_and_stays_out_of_the_window():
  state, step = make(max_loss_ratio=50.0)
  step = jax.jit(step)
  for seed in range(train_state.WINDOW):
    state, metrics = step(state, batch(seed))
    assert float(metrics["accepted"]) == 1
  bad = batch(99)
  bad["y"] = bad["y"] + 1e6
  after, metrics = step(state, bad)
  assert float(metrics["accepted"]) == 0 and float(metrics["finite"]) == 1
  for name in ("params", "opt_state", "recent"):
    jax.tree.map(
      np.testing.assert_array_equal, getattr(after, name), getattr(state, name)
    )
  _, unlimited = make()
  assert float(jax.jit(unlimited)(state, bad)[1]["accepted"]) == 1


def test_a_report_names_term_layer_and_examples(tmp_path, capsys):
  state, step = make()
  bad = batch()
  bad["y"][0] = np.inf
  look = watch(tmp_path, max_skips=1)
  for number, verdict in ((1, Verdict.GO_ON), (2, Verdict.GIVE_UP)):
    state, metrics = jax.jit(step)(state, bad)
    look.remember(number, metrics, np.arange(ROWS))
    assert look.look() is verdict
  out = capsys.readouterr().out
  assert "step 1 was skipped: fit_loss not finite in w" in out
  assert "at step 2" in out and len(out.splitlines()) == 2
  reports = json.loads((tmp_path / divergence.FILE).read_text())
  assert [r["step"] for r in reports] == [1, 2]
  assert reports[0]["terms"] == ["fit_loss"] and reports[0]["layer"] == "w"
  assert reports[0]["batch_index"] == list(range(ROWS))


def test_the_layer_is_the_first_not_finite_else_the_largest():
  metrics = numbers() | {"layer_grad_norms": np.array([1, np.nan, 9, np.inf])}
  names = ["a", "b", "c", "d"]
  report = divergence.describe(3, metrics, np.arange(2), layers=names)
  assert report["layer"] == "b"
  assert list(report["layer_grad_norms"]) == ["b", "d", "c", "a"]
  metrics["layer_grad_norms"] = np.array([1.0, 2.0, 9.0, 3.0])
  report = divergence.describe(3, metrics, np.arange(2), layers=names)
  assert report["layer"] == "c" and "max_loss_ratio" in report["cause"]


@pytest.mark.parametrize("cuts", [(), (3,), (2, 5), (1, 2, 3, 4, 5, 6, 7)])
def test_verdicts_do_not_depend_on_when_the_looks_come(tmp_path, cuts):
  # Steps 2, 4, 5 and 7 fail; one may be skipped, and it may go back once.
  options = dict(max_skips=1, max_rollbacks=1)
  look, seen, step, end = watch(tmp_path, **options), [], 1, 9
  while step <= end:
    ok = step not in (2, 4, 5, 7)
    look.remember(step, numbers(accepted=ok, loss=1 if ok else np.nan), [step])
    if step in cuts or step == end:
      verdict = look.look()
      if verdict is not Verdict.GO_ON:
        seen.append((verdict, look.failed[0]))
        step = look.failed[0]
      if verdict is Verdict.GIVE_UP:
        break
      # As after a kill: what was carried passes through JSON.
      past = json.loads(json.dumps(look.carried()))
      look = watch(tmp_path, **options, past=past)
    step += 1
  assert seen == [(Verdict.ROLL_BACK, 4), (Verdict.GIVE_UP, 7)]
  assert look.carried()["rollbacks"] == 1
