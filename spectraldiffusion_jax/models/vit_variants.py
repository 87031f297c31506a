"""Published vision transformers by name, and what tuning them needs."""

import re
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from spectraldiffusion_jax.errors import UserError
from spectraldiffusion_jax.models.vit import Vit

_S = {"width": 384, "depth": 12, "heads": 6, "hidden": 1536}
_B = {"width": 768, "depth": 12, "heads": 12, "hidden": 3072}
_L = {"width": 1024, "depth": 24, "heads": 16, "hidden": 4096}
_G = {"width": 1536, "depth": 40, "heads": 24, "hidden": 4096, "gated": True}

_DINO = {"layer_scale": None}  # trained at 224 px
_DINOV2 = {"patch": 14, "grid": 37}  # trained at 518 px
_REG = {"registers": 4, "pos_antialias": True}
_DINOV3 = {
  "patch": 16,
  "grid": None,
  "registers": 4,
  "key_bias": False,
  "layer_scale": 1e-5,
  "norm_eps": 1e-5,
}

VARIANTS: dict[str, dict] = {
  "dinov2_vits14": _S | _DINOV2,
  "dinov2_vitb14": _B | _DINOV2,
  "dinov2_vitl14": _L | _DINOV2,
  "dinov2_vitg14": _G | _DINOV2,
  "dinov2_vits14_reg": _S | _DINOV2 | _REG,
  "dinov2_vitb14_reg": _B | _DINOV2 | _REG,
  "dinov2_vitl14_reg": _L | _DINOV2 | _REG,
  "dinov2_vitg14_reg": _G | _DINOV2 | _REG,
  "dino_vits8": _S | _DINO | {"patch": 8, "grid": 28},
  "dino_vits16": _S | _DINO | {"patch": 16, "grid": 14},
  "dino_vitb8": _B | _DINO | {"patch": 8, "grid": 28},
  "dino_vitb16": _B | _DINO | {"patch": 16, "grid": 14},
  "dinov3_vits16": _S | _DINOV3,
  "dinov3_vitb16": _B | _DINOV3,
  "dinov3_vitl16": _L | _DINOV3,
  # Not published: small enough to train from scratch, at 128 px or nearby.
  "vit_tiny": {
    "patch": 8,
    "width": 192,
    "depth": 6,
    "heads": 3,
    "hidden": 768,
    "grid": 16,
    "layer_scale": None,
  },
}


def make_vit(name: str, **overrides) -> Vit:
  """The named vision transformer; other fields of `Vit` replace its own.

  Raises:
    UserError: no such name.
  """
  if name not in VARIANTS:
    raise UserError(
      f"no backbone is called {name!r}: choose from {', '.join(VARIANTS)}"
    )
  return Vit(**VARIANTS[name] | overrides)


def abstract_params(model: Vit) -> dict:
  """Shapes and dtypes of the model's parameters, without making any."""
  image = jax.ShapeDtypeStruct((1, model.patch, model.patch, 3), jnp.float32)
  return jax.eval_shape(model.init, jax.random.key(0), image)["params"]


def stack_blocks(params: Mapping) -> dict:
  """Parameters of the plain model -> those of the model with scan=True."""
  rest = {k: v for k, v in params.items() if not k.startswith("block_")}
  blocks = [params[f"block_{i}"] for i in range(len(params) - len(rest))]
  return rest | {"blocks": jax.tree.map(lambda *x: jnp.stack(x), *blocks)}


def unstack_blocks(params: Mapping) -> dict:
  """Inverse of `stack_blocks`."""
  rest = {k: v for k, v in params.items() if k != "blocks"}
  depth = len(jax.tree.leaves(params["blocks"])[0])
  return rest | {
    f"block_{i}": jax.tree.map(lambda x, i=i: x[i], params["blocks"])
    for i in range(depth)
  }


def tunable_mask(params: Mapping, *, last_blocks: int) -> dict:
  """True for what is tuned: the last blocks and the final norm.

  Args:
    params: of the plain model; blocks that are stacked can only be frozen.
    last_blocks: 0 freezes everything; the model's depth or more tunes
      everything, embeddings included.

  Returns:
    A tree like `params` of bools, for optax.masked or a split of the state.

  Raises:
    UserError: the blocks are stacked, so that they cannot be told apart.
  """
  if last_blocks == 0:
    return jax.tree.map(lambda _: False, dict(params))
  if "blocks" in params:
    if last_blocks == 0:
      return jax.tree.map(lambda _: False, dict(params))
    raise UserError(
      "tuning the last blocks needs the plain layout: use scan=False"
    )
  indices = [int(k[6:]) for k in params if re.fullmatch(r"block_\d+", k)]
  first = max(indices) + 1 - last_blocks

  def is_tuned(name):
    if first <= 0:
      return True
    return name == "norm" or (
      name.startswith("block_") and int(name[6:]) >= first
    )

  return {
    name: jax.tree.map(lambda _, n=name: is_tuned(n), tree)
    for name, tree in params.items()
  }
