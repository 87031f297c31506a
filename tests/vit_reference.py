"""Small models with known weights, and transformers' models beside ours."""

import functools

import jax
import numpy as np
import pytest
from flax import traverse_util

from spectraldiffusion_jax import convert
from spectraldiffusion_jax.models import vit

SMALL = {"patch": 4, "width": 32, "depth": 2, "heads": 2, "hidden": 64}
GOLDEN_MODELS = {
  "plain": SMALL | {"grid": 5},
  "registers": SMALL
  | {"grid": 5, "registers": 4, "pos_antialias": True, "gated": True}
  | {"hidden": 88},
  "rotary": SMALL
  | {"grid": None, "registers": 4, "key_bias": False, "norm_eps": 1e-5},
}


def golden_tensors(name: str) -> dict[str, np.ndarray]:
  """Weights under the names of transformers 5, from numpy's seed 0."""
  m = GOLDEN_MODELS[name]
  f, hidden = m["width"], m["hidden"]
  shapes = {
    "embeddings.cls_token": (1, 1, f),
    "embeddings.position_embeddings": (1, 26, f),
    "embeddings.register_tokens": (1, 4, f),
    "embeddings.patch_embeddings.projection.weight": (f, 3, 4, 4),
    "embeddings.patch_embeddings.projection.bias": (f,),
    "layernorm.weight": (f,),
    "layernorm.bias": (f,),
  }
  for i in range(m["depth"]):
    block = f"encoder.layer.{i}."
    for norm in ("norm1", "norm2"):
      shapes |= {f"{block}{norm}.weight": (f,), f"{block}{norm}.bias": (f,)}
    for part in ("q_proj", "k_proj", "v_proj", "o_proj"):
      shapes[f"{block}attention.{part}.weight"] = (f, f)
      shapes[f"{block}attention.{part}.bias"] = (f,)
    up, down = "fc1", "fc2"
    if m.get("gated") or m["grid"] is None:
      up, down = "up_proj", "down_proj"
    for part in [up, "gate_proj"][: 1 + m.get("gated", False)]:
      shapes[f"{block}mlp.{part}.weight"] = (hidden, f)
      shapes[f"{block}mlp.{part}.bias"] = (hidden,)
    shapes[f"{block}mlp.{down}.weight"] = (f, hidden)
    shapes[f"{block}mlp.{down}.bias"] = (f,)
    for scale in ("layer_scale1", "layer_scale2"):
      shapes[f"{block}{scale}.lambda1"] = (f,)
  if not m.get("registers"):
    del shapes["embeddings.register_tokens"]
  if m["grid"] is None:
    del shapes["embeddings.position_embeddings"]
    shapes = {k: v for k, v in shapes.items() if "k_proj.bias" not in k}
  rng = np.random.default_rng(0)
  return {
    k: rng.normal(0, 0.3, shapes[k]).astype(np.float32) for k in sorted(shapes)
  }


def golden_image() -> np.ndarray:
  return np.random.default_rng(1).normal(size=(1, 12, 28, 3)).astype(np.float32)


def summary(cls, tokens, keys) -> np.ndarray:
  rows = (cls[0, :4], tokens[0, 0, 0, :4], tokens[0, 2, 6, :4])
  norms = (np.linalg.norm(tokens), np.linalg.norm(keys))
  return np.concatenate([*rows, keys[0, 1, 3, :4], norms])


@functools.partial(jax.jit, static_argnums=0)
def apply(model, params, image):
  return model.apply(params, image)


def our_model(name: str) -> tuple[vit.Vit, dict]:
  flat, _ = convert.flatten_tensors(golden_tensors(name))
  model = vit.Vit(**GOLDEN_MODELS[name])
  convert.check_params(model, flat)
  return model, {"params": traverse_util.unflatten_dict(flat, sep="/")}


def transformers_model(name: str, fields: dict):
  """The reference model with the same sizes, from transformers."""
  transformers = pytest.importorskip("transformers", reason="not installed")
  pytest.importorskip("torch", reason="not installed")
  common = {
    "hidden_size": fields["width"],
    "num_hidden_layers": fields["depth"],
    "num_attention_heads": fields["heads"],
    "patch_size": fields["patch"],
    "layer_norm_eps": fields.get("norm_eps", 1e-6),
  }
  if fields.get("grid", 37) is None:
    return transformers.DINOv3ViTModel(
      transformers.DINOv3ViTConfig(
        **common, intermediate_size=fields["hidden"], num_register_tokens=4
      )
    )
  common["image_size"] = fields.get("grid", 37) * fields["patch"]
  if name.startswith("dino_"):
    return transformers.ViTModel(
      transformers.ViTConfig(**common, intermediate_size=fields["hidden"])
    )
  gated = common["use_swiglu_ffn"] = fields.get("gated", False)
  # SwiGLU's hidden channels are derived there: two thirds of 4 F, rounded.
  common["mlp_ratio"] = 4 if gated else fields["hidden"] // fields["width"]
  if fields.get("registers"):
    return transformers.Dinov2WithRegistersModel(
      transformers.Dinov2WithRegistersConfig(**common)
    )
  return transformers.Dinov2Model(transformers.Dinov2Config(**common))


def run_transformers(model, image):
  """(cls, tokens, keys) of the reference, in our layout."""
  import torch

  kept = []
  key_layer = [m for n, m in model.named_modules() if n.endswith("k_proj")][-1]
  key_layer.register_forward_hook(lambda *args: kept.append(args[-1]))
  options = {}
  if type(model).__name__ == "ViTModel":
    options["interpolate_pos_encoding"] = True
  with torch.inference_mode():
    pixels = torch.from_numpy(image).permute(0, 3, 1, 2)
    tokens = model.eval()(pixels, **options).last_hidden_state.numpy()
  h, w = (side // model.config.patch_size for side in image.shape[1:3])
  grid = (len(image), h, w, -1)
  keys = kept[0].numpy()[:, -h * w :].reshape(grid)
  return tokens[:, 0], tokens[:, -h * w :].reshape(grid), keys


def transformers_golden(name: str) -> np.ndarray:
  model = transformers_model(name, GOLDEN_MODELS[name])
  import torch

  own = model.state_dict()
  tensors = {k: torch.from_numpy(v) for k, v in golden_tensors(name).items()}
  if GOLDEN_MODELS[name]["grid"] is None:
    tensors = {
      k.replace("encoder.layer", "model.layer")
      .replace("embeddings.projection", "embeddings")
      .replace("layernorm", "norm"): v
      for k, v in tensors.items()
    }
  unused = {k: v for k, v in own.items() if k.endswith("mask_token")}
  model.load_state_dict(tensors | unused, strict=True)
  return summary(*run_transformers(model, golden_image()))
