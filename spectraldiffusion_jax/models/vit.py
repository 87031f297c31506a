"""Vision transformers of the DINO family, any resolution, any aspect ratio.

DINOv2 (Oquab et al. 2023, arXiv 2304.07193), its registers (Darcet et al.
2023, arXiv 2309.16588), DINO (Caron et al. 2021, arXiv 2104.14294) and DINOv3
(Simeoni et al. 2025, arXiv 2508.10104) are one module with other fields; the
table VARIANTS has their published sizes and a small one to train from scratch.

Parameter paths, for sharding rules and masks: `patch_embed`, `block_{i}/attn/
{query,key,value,out}`, `block_{i}/mlp/{gate,up,down}` and `norm*` hold
`kernel`, `bias` or `scale`; `block_{i}/{attn,mlp}_scale`, `cls`, `registers`
and `pos_embed` are bare arrays. With scan=True all blocks lie stacked under
`blocks`, the layer axis first.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from jaxtyping import Array, Float

from spectraldiffusion_jax.errors import UserError
from spectraldiffusion_jax.models.layers import remat, space_to_depth
from spectraldiffusion_jax.ops.attention import attend, rotary_angles, rotate
from spectraldiffusion_jax.ops.resample import resize_bicubic

_INIT = nn.initializers.truncated_normal(0.02)


class VitOutput(struct.PyTreeNode):
  """What a vision transformer sees, all in float32."""

  tokens: Array  # [B h w F] patch tokens after the final norm
  cls: Array  # [B F] class token after the final norm
  keys: Array  # [B h w F] keys of the last block, heads side by side, no rotary


class Attention(nn.Module):
  """Multi-head self-attention; hands out the keys as well."""

  heads: int
  key_bias: bool
  dtype: jnp.dtype

  @nn.compact
  def __call__(
    self, x: Float[Array, "B L F"], angles: Float[Array, "N P"] | None
  ) -> tuple[Float[Array, "B L F"], Float[Array, "B L F"]]:
    """Returns the attended tokens and the keys."""

    def project(name, inputs, *, use_bias=True):
      return nn.Dense(
        x.shape[-1],
        use_bias=use_bias,
        dtype=self.dtype,
        kernel_init=_INIT,
        name=name,
      )(inputs)

    keys = project("key", x, use_bias=self.key_bias)
    query, key, value = (
      y.reshape(*x.shape[:2], self.heads, -1)
      for y in (project("query", x), keys, project("value", x))
    )
    if angles is not None:
      query, key = rotate(query, angles), rotate(key, angles)
    y = attend(query, key, value).reshape(x.shape)
    return project("out", y), keys


class FeedForward(nn.Module):
  """GELU, or SwiGLU: down(silu(gate x) * up x)."""

  hidden: int
  gated: bool
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: Float[Array, "B L F"]) -> Float[Array, "B L F"]:
    """Acts on each token by itself."""

    def dense(name, width):
      return nn.Dense(width, dtype=self.dtype, kernel_init=_INIT, name=name)

    up = dense("up", self.hidden)(x)
    if self.gated:
      hidden = nn.silu(dense("gate", self.hidden)(x)) * up
    else:
      hidden = nn.gelu(up, approximate=False)
    return dense("down", x.shape[-1])(hidden)


class Block(nn.Module):
  """Pre-norm transformer block with LayerScale, (x, keys) in and out."""

  heads: int
  hidden: int
  gated: bool
  key_bias: bool
  layer_scale: float | None
  norm_eps: float
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, carry, angles):
    """Takes (x, keys of the block before); nn.scan wants the None."""

    def norm(name, x):
      return layer_norm(self.norm_eps, self.dtype, name)(x)

    def scaled(name, x):
      x = x.astype(jnp.float32)
      if self.layer_scale is None:
        return x
      gamma = self.param(
        name, nn.initializers.constant(self.layer_scale), x.shape[-1:]
      )
      return x * gamma[None, None]

    # The sum over blocks stays in float32 whatever the compute dtype: it
    # grows to hundreds in large models, where bfloat16 steps are above one.
    x, _ = carry
    y, keys = Attention(self.heads, self.key_bias, self.dtype, name="attn")(
      norm("norm1", x), angles
    )
    x = x + scaled("attn_scale", y)
    y = FeedForward(self.hidden, self.gated, self.dtype, name="mlp")(
      norm("norm2", x)
    )
    return (x + scaled("mlp_scale", y), keys), None


def layer_norm(eps: float, dtype: jnp.dtype, name: str) -> nn.LayerNorm:
  """LayerNorm with the two-pass variance, as torch has it."""
  return nn.LayerNorm(eps, dtype=dtype, use_fast_variance=False, name=name)


class Vit(nn.Module):
  """Image in, normed tokens, class token and last keys out.

  Position embeddings are resampled in float32 whenever the token grid is not
  the trained one. `pos_offset` is the authors' 0.1: their first models resize
  by the factor (h + 0.1) / grid, so the step between samples is off by that
  much; transformers, the default here, resizes to h exactly.

  float32 products run at JAX's default precision, which on GPUs and TPUs is
  below float32: wrap calls in jax.default_matmul_precision("float32") there
  to equal a CPU's figures.
  """

  patch: int  # pixels a side of one token
  width: int  # F
  depth: int  # blocks
  heads: int  # M, each of 64 channels in the published sizes
  hidden: int  # channels inside the feed-forward layer
  gated: bool = False  # SwiGLU instead of GELU
  registers: int = 0  # extra tokens behind the class token
  grid: int | None = 37  # side of the trained position grid; None = rotary
  pos_antialias: bool = False  # antialias where the grid shrinks
  pos_offset: float = 0.0  # tokens, see above
  key_bias: bool = True
  layer_scale: float | None = 1.0  # at initialisation; None = no LayerScale
  norm_eps: float = 1e-6
  dtype: Any = jnp.float32  # of matrix products; parameters are float32
  remat: str = "none"  # of blocks, see layers.REMAT
  scan: bool = False  # one traced block for all: compiles faster
  tuned: int | None = None  # last blocks that get a gradient; None = the whole

  @nn.compact
  def __call__(self, image: Float[Array, "B H W 3"]) -> VitOutput:
    """Takes images normalised as in training, H and W multiples of patch."""
    b, height, width, _ = image.shape
    if height % self.patch or width % self.patch or 0 in (height, width):
      raise UserError(
        f"image of {height} x {width} pixels does not tile into patches of "
        f"{self.patch}: resize to multiples (load_backbone does it)"
      )
    x = space_to_depth(image, self.patch).astype(self.dtype)
    h, w = x.shape[1:3]
    x = nn.Dense(
      self.width, dtype=self.dtype, kernel_init=_INIT, name="patch_embed"
    )(x).astype(jnp.float32)
    x = self._add_prefix(x)
    angles = None
    if self.grid is None:
      angles = jnp.asarray(rotary_angles(h, w, self.width // self.heads))
    x, keys = self._blocks(x, angles)
    x = layer_norm(self.norm_eps, jnp.float32, "norm")(x)
    start = 1 + self.registers
    if self.tuned == 0:
      x, keys = jax.lax.stop_gradient((x, keys))
    return VitOutput(
      tokens=x[:, start:].reshape(b, h, w, -1),
      cls=x[:, 0],
      keys=keys[:, start:].astype(jnp.float32).reshape(b, h, w, -1),
    )

  def _add_prefix(self, x):
    """[B h w F] -> [B L F]: positions, class token, then registers."""
    b, h, w, f = x.shape
    cls = self.param("cls", _INIT, (1, 1, f))
    if self.grid is not None:
      shape = (1, 1 + self.grid**2, f)
      table = self.param("pos_embed", _INIT, shape)
      cls = cls + table[:, :1]
      x = x + self._resample(
        table[:, 1:].reshape(1, *2 * (self.grid,), f), h, w
      )
    parts = [jnp.broadcast_to(cls, (b, 1, f))]
    if self.registers:
      tokens = self.param("registers", _INIT, (1, self.registers, f))
      parts.append(jnp.broadcast_to(tokens, (b, self.registers, f)))
    return jnp.concatenate([*parts, x.reshape(b, h * w, f)], axis=1)

  def _resample(self, table, h, w):
    if (h, w) == (self.grid, self.grid):
      return table
    step = None
    if self.pos_offset:
      step = tuple(self.grid / (n + self.pos_offset) for n in (h, w))
    return resize_bicubic(
      table, (h, w), antialias=self.pos_antialias, step=step
    )

  def _blocks(self, x, angles):
    cls = remat(Block, self.remat, prevent_cse=not self.scan)
    fields = {
      "heads": self.heads,
      "hidden": self.hidden,
      "gated": self.gated,
      "key_bias": self.key_bias,
      "layer_scale": self.layer_scale,
      "norm_eps": self.norm_eps,
      "dtype": self.dtype,
    }
    carry = (x, jnp.zeros(x.shape, self.dtype))
    first = 0 if self.tuned is None else self.depth - self.tuned
    if self.scan:
      if 0 < first < self.depth:
        raise UserError("tuning the last blocks needs scan=False")
      stack = nn.scan(
        cls,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=nn.broadcast,
        length=self.depth,
      )
      return stack(**fields, name="blocks")(carry, angles)[0]
    for i in range(self.depth):
      if 0 < i == first:
        carry = jax.lax.stop_gradient(carry)
      carry, _ = cls(**fields, name=f"block_{i}")(carry, angles)
    return carry
