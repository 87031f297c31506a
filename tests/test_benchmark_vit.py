"""The benchmark of the vision transformers: its rows and its arithmetic."""

import jax
import jax.numpy as jnp
import pytest

from spectraldiffusion_jax.benchmarks import vit as benchmark
from spectraldiffusion_jax.models.vit_variants import make_vit


@pytest.mark.slow
def test_rows():
  (row,) = benchmark.run(
    cases=[("vit_tiny", 16, 2)], repeats=2, torch=False, dtype="bfloat16"
  )
  assert row["model"] == "vit_tiny" and row["images_per_s"] > 0
  assert set(row) == {
    *("model", "size", "batch", "device", "images_per_s", "gflop_per_s")
  }


@pytest.mark.parametrize("name", ["dinov2_vits14_reg", "dinov2_vitg14"])
def test_flops_are_those_that_xla_counts(name):
  model = make_vit(name, depth=1)
  image = jax.ShapeDtypeStruct((1, 112, 112, 3), jnp.float32)
  params = jax.eval_shape(model.init, jax.random.key(0), image)
  cost = jax.jit(model.apply).lower(params, image).cost_analysis()
  # XLA also counts norms, activations and the softmax: a few per cent.
  ratio = cost["flops"] / benchmark.flops_per_image(model, 112)
  assert 1.0 <= ratio < 1.06
