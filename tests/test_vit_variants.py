"""The table of published sizes, and what is tuned."""

import jax
import jax.numpy as jnp
import pytest

from spectraldiffusion_jax.errors import UserError
from spectraldiffusion_jax.models.vit_variants import (
  abstract_params,
  make_vit,
  tunable_mask,
)


@pytest.mark.parametrize(
  ("name", "millions"),
  # Counted from transformers' models on torch's meta device, without the mask
  # token and the pooler; vit_tiny by hand: 6 (12 F^2 + 13 F) + 193 F
  # (patches) + 257 F (positions) + 3 F (class token, norm), F = 192.
  [
    ("dinov2_vits14", 22.056192),
    ("dinov2_vitb14", 86.579712),
    ("dinov2_vitl14", 304.367616),
    ("dinov2_vitg14", 1136.479232),
    ("dinov2_vits14_reg", 22.057728),
    ("dinov2_vitb14_reg", 86.582784),
    ("dinov2_vitl14_reg", 304.371712),
    ("dinov2_vitg14_reg", 1136.485376),
    ("dino_vits8", 21.670272),
    ("dino_vits16", 21.665664),
    ("dino_vitb8", 85.807872),
    ("dino_vitb16", 85.798656),
    ("dinov3_vits16", 21.59616),
    ("dinov3_vitb16", 85.659648),
    ("dinov3_vitl16", 303.128576),
    ("vit_tiny", 2.756160),
  ],
)
def test_sizes(name, millions):
  model = make_vit(name, dtype=jnp.bfloat16, scan=True)  # traces one block
  p = model.patch
  image = jax.ShapeDtypeStruct((2, 3 * p, 5 * p, 3), jnp.float32)
  out, params = jax.eval_shape(model.init_with_output, jax.random.key(0), image)
  assert sum(x.size for x in jax.tree.leaves(params)) == round(millions * 1e6)
  assert out.tokens.shape == out.keys.shape == (2, 3, 5, model.width)
  assert out.cls.shape == (2, model.width)
  assert {x.dtype for x in jax.tree.leaves(out)} == {jnp.dtype("float32")}


def test_unknown_name_is_refused():
  with pytest.raises(UserError, match="dinov2_vitb14"):
    make_vit("dinov2_vitb16")


def test_tunable_mask():
  params = abstract_params(make_vit("dinov2_vits14"))
  total = len(jax.tree.leaves(params))
  count = {
    n: sum(jax.tree.leaves(tunable_mask(params, last_blocks=n)))
    for n in (0, 1, 3, 12)
  }
  block = len(jax.tree.leaves(params["block_0"]))
  assert count == {0: 0, 1: block + 2, 3: 3 * block + 2, 12: total}
  mask = tunable_mask(params, last_blocks=1)
  assert all(jax.tree.leaves(mask["block_11"]))
  assert not any(jax.tree.leaves(mask["block_10"]))
  with pytest.raises(UserError, match="scan=False"):
    tunable_mask({"blocks": {}}, last_blocks=1)
  stacked = {"blocks": {"kernel": 1}, "cls": 2}
  frozen = {"blocks": {"kernel": False}, "cls": False}
  assert tunable_mask(stacked, last_blocks=0) == frozen
