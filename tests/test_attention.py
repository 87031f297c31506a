"""Attention against float64 loops; rotary positions by their invariance."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spectraldiffusion_jax.ops import attention
from spectraldiffusion_jax.ops.attention import attend, rotary_angles, rotate


def inputs(b=2, n=7, length=9, m=3, p=4, scale=1.0):
  rng = np.random.default_rng(0)
  shapes = ((b, n, m, p), (b, length, m, p), (b, length, m, p))
  return [scale * rng.normal(size=s) for s in shapes]


def loop(q, k, v):
  """The definition, in float64."""
  wanted = np.zeros_like(q)
  for b in range(q.shape[0]):
    for m in range(q.shape[2]):
      logits = q[b, :, m] @ k[b, :, m].T / np.sqrt(q.shape[-1])
      weights = np.exp(logits - logits.max(1, keepdims=True))
      weights /= weights.sum(1, keepdims=True)
      wanted[b, :, m] = weights @ v[b, :, m]
  return wanted


def as_float32(arrays):
  return [jnp.asarray(x, jnp.float32) for x in arrays]


FORMS = {"attend": attend, "rows": attention._attend_by_rows}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("scale", [0.1, 1.0, 30.0])  # logits up to 4000
def test_equals_a_float64_loop(form, scale):
  q, k, v = inputs(scale=scale)
  ours = jax.jit(FORMS[form])(*as_float32((q, k, v)))
  np.testing.assert_allclose(ours, loop(q, k, v), atol=2e-5 * scale)


@pytest.mark.parametrize("form", FORMS)
def test_gradient_equals_that_of_xla(form):
  arrays = as_float32(inputs(n=attention.ROWS + 3))

  def loss(function, arrays):
    return jnp.sum(jnp.sin(3 * function(*arrays)))

  ours = jax.jit(jax.grad(lambda x: loss(FORMS[form], x)))(arrays)
  xla = jax.jit(jax.grad(lambda x: loss(jax.nn.dot_product_attention, x)))(
    arrays
  )
  for a, b in zip(ours, xla, strict=True):
    assert jnp.abs(b).max() > 0.1
    np.testing.assert_allclose(a, b, atol=2e-5)


@pytest.mark.parametrize("form", FORMS)
def test_bfloat16_keeps_its_type_and_stays_close(form):
  arrays = inputs()
  half = [x.astype(jnp.bfloat16) for x in as_float32(arrays)]
  ours = FORMS[form](*half)
  assert ours.dtype == jnp.bfloat16
  np.testing.assert_allclose(ours.astype("f4"), loop(*arrays), atol=0.03)


def test_a_program_has_the_form_of_its_platform():
  """Heads in turn on a CPU, rows in turn on a TPU, else neither."""
  shape = jax.ShapeDtypeStruct((1, 300, 5, 8), jnp.float32)
  text = {
    platform: jax.jit(attend)
    .trace(shape, shape, shape)
    .lower(lowering_platforms=(platform,))
    .as_text()
    for platform in ("cpu", "tpu", "cuda")
  }
  loops = {name: "while" in lines for name, lines in text.items()}
  assert loops == {"cpu": True, "tpu": True, "cuda": False}
  assert "5x1x300x8" in text["cpu"] and "3x1x128x5x8" in text["tpu"]


def test_rotary_products_depend_on_the_offset_only():
  angles = rotary_angles(4, 5, 16)
  one = np.random.default_rng(0).normal(size=(2, 16)).astype(np.float32)
  q, k = (
    np.asarray(rotate(jnp.broadcast_to(x, (1, 22, 1, 16)), angles))[0, :, 0]
    for x in one
  )
  np.testing.assert_array_equal(q[:2], np.stack([one[0]] * 2))  # the prefix
  product = (q[2:] @ k[2:].T).reshape(4, 5, 4, 5)
  np.testing.assert_allclose(
    product[0, 0, 1, 2], product[2, 2, 3, 4], rtol=1e-4
  )
  assert abs(product[0, 0, 1, 2] - product[0, 0, 2, 1]) > 1e-3
