"""Vision transformers equal those of transformers, and stored values."""

import jax
import numpy as np
import pytest
from vit_reference import (
  GOLDEN_MODELS,
  apply,
  golden_image,
  our_model,
  run_transformers,
  summary,
  transformers_golden,
  transformers_model,
)

from spectraldiffusion_jax import convert
from spectraldiffusion_jax.models.vit_variants import (
  VARIANTS,
  make_vit,
)

# Made with transformers 5.23.0 and torch 2.13.0 on CPU in float32 by
# `transformers_golden` in vit_reference.py; a test compares them again wherever
# both are installed. Rows: cls[:4], tokens[0, 0, :4],
# tokens[2, 6, :4], keys[1, 3, :4], then the norms of all tokens and all keys.
GOLDEN = {
  "plain": [
    *(-0.2973524, -0.10129211, 0.056916296, -0.1494333),
    *(-0.30448785, -0.1219091, -0.06673704, 0.5992457),
    *(-0.30238593, -0.11716154, 0.059591442, 0.7998715),
    *(0.20021504, 0.5085668, -0.1023342, -0.4627176),
    *(11.978096, 14.011035),
  ],
  "registers": [
    *(-0.027022339, 0.28177622, -0.12420974, -0.10281336),
    *(0.062216587, 0.18412207, 0.13988917, 0.43170041),
    *(0.00032451094, 0.12779789, -1.0818303, 0.8408584),
    *(1.1432368, -0.04709354, 1.1052343, -1.0117661),
    *(12.244445, 23.729546),
  ],
  "rotary": [
    *(0.12784162, -0.29682279, 0.27563715, 0.057661004),
    *(0.20473976, -0.25699341, 0.32481295, -0.10811401),
    *(0.2521511, -0.28054458, 0.008564149, -0.1522496),
    *(-0.43735978, 0.091911003, -0.20611383, 0.51298636),
    *(9.4048777, 13.625756),
  ],
}


@pytest.mark.parametrize("name", GOLDEN_MODELS)
def test_golden_values_come_from_transformers(name):
  np.testing.assert_allclose(transformers_golden(name), GOLDEN[name], rtol=1e-4)


@pytest.mark.parametrize("name", GOLDEN_MODELS)
def test_equals_golden_values(name):
  model, params = our_model(name)
  out = apply(model, params, golden_image())
  ours = summary(out.cls, out.tokens, out.keys)
  np.testing.assert_allclose(ours, GOLDEN[name], rtol=1e-4, atol=1e-5)


def test_golden_comparison_can_fail():
  model, params = our_model("registers")
  out = apply(model.clone(pos_antialias=False), params, golden_image())
  ours = summary(out.cls, out.tokens, out.keys)
  assert np.abs(ours - GOLDEN["registers"]).max() > 1e-3


PARITY = [
  ("dinov2_vits14", (224, 224), 0),
  ("dinov2_vits14", (224, 224), 1),
  ("dinov2_vits14", (224, 224), 2),
  ("dinov2_vits14", (336, 672), 0),
  ("dinov2_vits14_reg", (112, 224), 0),
  ("dino_vits16", (96, 160), 0),
  ("dinov3_vits16", (96, 160), 0),
]
SLOW_PARITY = [
  ("dinov2_vits14", (518, 518), 0),
  ("dinov2_vits14_reg", (518, 518), 0),
  ("dinov2_vitb14", (224, 224), 0),
  ("dinov2_vitb14", (336, 672), 0),
  ("dinov2_vitb14_reg", (224, 224), 0),
  ("dinov2_vitl14", (224, 224), 0),
]


@pytest.mark.parametrize(
  ("name", "size", "seed"),
  [*PARITY, *(pytest.param(*p, marks=pytest.mark.slow) for p in SLOW_PARITY)],
)
def test_equals_transformers(name, size, seed):
  reference = transformers_model(name, VARIANTS[name])
  import torch

  generator = torch.Generator().manual_seed(seed)
  with torch.no_grad():  # random beyond the initial ones and zeros
    for p in reference.parameters():
      p += torch.randn(p.shape, generator=generator) * (0.3 / p.ndim**2)
  image = np.random.default_rng(seed).normal(size=(1, *size, 3))
  image = image.astype(np.float32)
  theirs = run_transformers(reference, image)
  done = convert.convert_tensors(
    {k: v.numpy() for k, v in reference.state_dict().items()}
  )
  assert done.name == name
  out = jax.jit(make_vit(name).apply)({"params": done.params}, image)
  for what, ours, wanted in zip(
    ("cls", "tokens", "keys"), (out.cls, out.tokens, out.keys), theirs, strict=1
  ):
    worst = np.abs(ours - wanted).max() / np.abs(wanted).max()
    norm = np.linalg.norm(ours - wanted) / np.linalg.norm(wanted)
    print(f"{name} {size} {what}: max {worst:.1e}, norm {norm:.1e}")
    assert worst <= 1e-4 and norm <= 1e-5, what
