"""How hard XLA works: less where it does not pay, and never against JAX."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spectraldiffusion_jax import effort

SWITCH = "jax_disable_most_optimizations"
CPU = jax.devices("cpu")[0]


@pytest.fixture
def optimised():
  before = jax.config.read(SWITCH)
  jax.config.update(SWITCH, False)
  yield
  jax.config.update(SWITCH, before)


@pytest.mark.parametrize("level", [0, 1])
def test_xla_takes_the_option_and_computes_the_same(optimised, level):
  x = jnp.linspace(-2.0, 2.0, 101)

  def run(x):
    return jnp.tanh(x) @ jnp.sin(x)

  options = effort.on_cpu(level, CPU)
  assert options
  less = jax.jit(run, compiler_options=options)(x)
  np.testing.assert_allclose(less, jax.jit(run)(x), rtol=1e-5)


def test_an_unknown_option_would_be_refused(optimised):
  with pytest.raises(Exception, match="No such compile option"):
    jax.jit(jnp.sin, compiler_options={"xla_no_such": 1})(1.0)


def test_other_devices_are_left_to_jax(optimised):
  assert effort.on_cpu(1, types.SimpleNamespace(platform="tpu")) is None


def test_jax_own_switch_comes_first(optimised):
  assert effort.on_cpu(1, CPU) is not None
  jax.config.update(SWITCH, True)
  assert effort.on_cpu(1, CPU) is None
