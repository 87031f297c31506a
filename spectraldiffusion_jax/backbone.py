"""A frozen feature extractor, usable by itself: images in, features out."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct, traverse_util
from jaxtyping import Array, Float

from spectraldiffusion_jax import weights as weight_files
from spectraldiffusion_jax.convert import check_params
from spectraldiffusion_jax.errors import UserError
from spectraldiffusion_jax.models.vit import Vit
from spectraldiffusion_jax.models.vit_input import normalised
from spectraldiffusion_jax.models.vit_variants import make_vit, stack_blocks

# Where the published weights are; launch/convert.py takes these as --source.
HUB_IDS = {
  "dinov2_vits14": "facebook/dinov2-small",
  "dinov2_vitb14": "facebook/dinov2-base",
  "dinov2_vitl14": "facebook/dinov2-large",
  "dinov2_vitg14": "facebook/dinov2-giant",
  "dinov2_vits14_reg": "facebook/dinov2-with-registers-small",
  "dinov2_vitb14_reg": "facebook/dinov2-with-registers-base",
  "dinov2_vitl14_reg": "facebook/dinov2-with-registers-large",
  "dinov2_vitg14_reg": "facebook/dinov2-with-registers-giant",
  "dino_vits8": "facebook/dino-vits8",
  "dino_vits16": "facebook/dino-vits16",
  "dino_vitb8": "facebook/dino-vitb8",
  "dino_vitb16": "facebook/dino-vitb16",
  "dinov3_vits16": "facebook/dinov3-vits16-pretrain-lvd1689m",
  "dinov3_vitb16": "facebook/dinov3-vitb16-pretrain-lvd1689m",
  "dinov3_vitl16": "facebook/dinov3-vitl16-pretrain-lvd1689m",
}


class Backbone(struct.PyTreeNode):
  """Callable from images to features; a pytree whose leaves are the weights.

  It can be called as it is, or passed into a jitted function as an argument.
  """

  params: dict
  model: Vit = struct.field(pytree_node=False)
  name: str = struct.field(pytree_node=False)
  features: str = struct.field(pytree_node=False)  # tokens | keys
  size: int = struct.field(
    pytree_node=False
  )  # longer side, pixels; 0 = image's

  def __call__(self, image: Float[Array, "B H W 3"]) -> Float[Array, "B h w F"]:
    """Features of each patch: the last normed tokens, or the last keys.

    Args:
      image: RGB in [0, 1], any size. It is resized to `input_size` (bicubic,
        antialiased, cut to [0, 1], as PIL resizes 8-bit images) and normalised
        by ImageNet's mean and deviation.

    Returns:
      float32 features. h and w are the sides of `input_size` over the patch.

    Raises:
      UserError: not such an array; bytes in 0..255 have to be divided by 255.
    """
    shape = jnp.shape(image)
    if len(shape) != 4 or shape[-1] != 3 or 0 in shape:
      raise UserError(f"image is {shape}: give [B, H, W, 3]")
    if not jnp.issubdtype(jnp.result_type(image), jnp.floating):
      raise UserError(
        f"image is {jnp.result_type(image)}: give floats in [0, 1] "
        "(bytes divided by 255)"
      )
    return _features(self, image)


@jax.jit
def _features(backbone: Backbone, image: Array) -> Array:
  model = backbone.model
  image = normalised(image, patch=model.patch, longest=backbone.size)
  output = model.apply({"params": backbone.params}, image)
  return getattr(output, backbone.features)


def load_backbone(
  name: str,
  weights: str | pathlib.Path | None = None,
  *,
  dtype: jnp.dtype = jnp.float32,
  features: str = "tokens",
  size: int = 0,
  seed: int = 0,
  **fields,
) -> Backbone:
  """A named backbone with its weights.

  Args:
    name: key of VARIANTS, such as "dinov2_vitb14".
    weights: file made by launch/convert.py; or "random", which has to be asked
      for, as its features are those of an untrained network.
    dtype: of matrix products, float32 or bfloat16; parameters are float32.
    features: "tokens" (after the final norm) or "keys" (of the last block).
    size: pixels of the longer side to which images are scaled first; 0 takes
      them as they are (`input_size` has the whole rule).
    seed: of random weights.
    **fields: other fields of `Vit` to change, such as pos_offset=0.1.

  Raises:
    UserError: unknown name or features; no weights given (the message says
      how to get them); or the file is damaged or of another model.
  """
  if features not in ("tokens", "keys"):
    raise UserError(f"features={features!r}: choose tokens or keys")
  model = make_vit(name, dtype=jnp.dtype(dtype), **fields)
  params = read_params(name, model, weights, field="weights")
  if params is None:
    params = _random_params(model, jax.random.key(seed))
  params = jax.tree.map(jnp.asarray, params)
  return Backbone(
    params=params, model=model, name=name, features=features, size=size
  )


@functools.partial(jax.jit, static_argnums=0)
def _random_params(model: Vit, key: Array) -> dict:
  image = jnp.zeros((1, model.patch, model.patch, 3))
  return model.init(key, image)["params"]


def read_params(
  name: str, model: Vit, weights: str | pathlib.Path | None, *, field: str
) -> dict[str, dict] | None:
  """Parameters of a converted file on the host; None for "random".

  Args:
    name: key of VARIANTS.
    model: the module they are for.
    weights: the file, or "random".
    field: what the user calls `weights`.

  Raises:
    UserError: no weights given, a damaged file, or that of another model.
  """
  if weights is None or not str(weights):
    source = HUB_IDS.get(name, "FILE")
    raise UserError(
      f"no weights given for {name}: convert them once, `python launch/convert"
      f".py --source={source} --output={name}.safetensors`, and give {field}="
      f"'{name}.safetensors'; or ask for untrained ones, {field}='random'"
    )
  if str(weights) == "random":
    return None
  found, params = weight_files.load_weights(weights)
  if found != name:
    raise UserError(f"{weights} holds the weights of {found}, not of {name}")
  check_params(model, traverse_util.flatten_dict(params, sep="/"))
  return stack_blocks(params) if model.scan else params


def put_params(params: dict, onto: dict) -> dict:
  """Host arrays, placed as the arrays of the like tree `onto` are."""

  def put(array, like):
    array = np.asarray(array)
    return jax.make_array_from_callback(
      array.shape, like.sharding, lambda index: array[index]
    )

  return jax.tree.map(put, params, onto)
