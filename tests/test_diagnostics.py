"""Binding diagnostics against loops, and the lines that follow from them."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import entropy

from spectraldiffusion_jax.diagnostics import advice, binding_diagnostics

measure = jax.jit(binding_diagnostics)


def test_numbers_are_the_loops():
  rng = np.random.default_rng(0)
  slots = rng.normal(size=(3, 5, 7)) + 0.5
  active = np.array([[1, 1, 1, 1, 1], [1, 1, 0, 1, 0], [1, 1, 0, 0, 0]], bool)
  attn = rng.dirichlet(np.full(5, 0.3), size=(3, 11)).transpose(0, 2, 1)
  attn = attn * active[:, :, None]
  attn = attn / attn.sum(1, keepdims=True)
  cosines, entropies, largest, ids = [], [], [], []
  for s, a, on in zip(slots, attn, active, strict=True):
    chosen = s[on] / np.linalg.norm(s[on], axis=1, keepdims=True)
    n = len(chosen)
    cosines.append((chosen @ chosen.T)[~np.eye(n, dtype=bool)].mean())
    entropies.append(entropy(a, axis=0).mean() / np.log(n))
    largest.append(a.max(0).mean())
    ids.append(len(set(a.argmax(0))))
  # What padding slots hold must not matter.
  slots[~active] = 1e3
  out = measure(
    jnp.asarray(slots, jnp.float32),
    jnp.asarray(attn, jnp.float32),
    jnp.asarray(active),
  )
  assert out["slot_similarity"] == pytest.approx(np.mean(cosines), abs=1e-5)
  assert out["attention_entropy"] == pytest.approx(np.mean(entropies), abs=1e-5)
  assert out["max_attention"] == pytest.approx(np.mean(largest), abs=1e-6)
  assert out["mask_ids"] == pytest.approx(np.mean(ids))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_extremes(dtype):
  active = jnp.ones((2, 4), bool)
  eye = jnp.tile(jnp.eye(4, dtype=dtype)[None], (2, 1, 1))
  healthy = measure(eye, eye, active)
  assert healthy["slot_similarity"] == 0
  assert healthy["attention_entropy"] == 0
  assert healthy["max_attention"] == 1
  assert healthy["mask_ids"] == 4
  same = measure(jnp.ones_like(eye), jnp.full_like(eye, 0.25), active)
  assert same["slot_similarity"] == pytest.approx(1, abs=1e-5)
  assert same["attention_entropy"] == pytest.approx(1, abs=1e-5)
  assert same["max_attention"] == 0.25
  assert same["mask_ids"] == 1


def test_zero_slots_and_single_slots_stay_finite():
  for active in (jnp.zeros((1, 3), bool), jnp.asarray([[True, False, False]])):
    slots, attn = jnp.zeros((1, 3, 2)), jnp.zeros((1, 3, 4))
    out = measure(slots, attn, active)
    assert all(np.isfinite(v) for v in out.values())
    grad = jax.grad(
      lambda s, active=active, attn=attn: binding_diagnostics(s, attn, active)[
        "slot_similarity"
      ]
    )(slots)
    assert np.isfinite(grad).all()


HEALTHY = {
  "slot_similarity": 0.1,
  "attention_entropy": 0.3,
  "max_attention": 0.6,
  "mask_ids": 6.0,
  "loss": 0.02,
}


@pytest.mark.parametrize(
  ("change", "name"),
  [
    ({}, None),
    ({"slot_similarity": 0.6}, None),
    ({"slot_similarity": 0.9}, "slots collapsed"),
    ({"max_attention": 0.1}, "attention is uniform"),
    ({"attention_entropy": 0.99}, "attention is uniform"),
    ({"mask_ids": 1.5}, "too few segments"),
    ({"mask_ids": 14.0}, "too many segments"),
    ({"loss": float("nan")}, "loss diverged"),
  ],
)
def test_each_problem_has_its_line(change, name):
  lines = advice(HEALTHY | change)
  assert [line.split(":")[0] for line in lines] == ([name] if name else [])


def test_what_is_not_measured_is_not_judged():
  assert advice({}) == []


def test_remedies_name_fields_of_the_config():
  config = importlib.import_module("configs.default").get_config()
  bad = {
    "slot_similarity": 0.9,
    "attention_entropy": 1.0,
    "max_attention": 0.1,
    "loss": float("inf"),
  }
  lines = advice(bad | {"mask_ids": 1.0}) + advice(bad | {"mask_ids": 20.0})
  words = " ".join(lines).replace(",", " ").replace(";", " ").split()
  fields = {
    w.split("=")[0] for w in words if w.count(".") == 1 and w[0].isalpha()
  }
  assert len(fields) >= 7
  for field in fields:
    section, name = field.split(".")
    assert name in config[section], field
