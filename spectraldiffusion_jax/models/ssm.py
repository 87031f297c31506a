"""Selective state-space modules: token mixing and the slot update.

One parameterisation, `SelectiveSSM`, is used twice: over the tokens of an
image, where the sequence is long and known (`SelectiveScan2D`), and one step
at a time over the rounds of refinement, where the input of a round depends
on the state of the last (models/slot_update.py).
"""

import functools
import math

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from spectraldiffusion_jax.errors import UserError
from spectraldiffusion_jax.ops import scan


def _log_uniform(low, high):
  def init(key, shape):
    log = jax.random.uniform(
      key, shape, minval=math.log(low), maxval=math.log(high)
    )
    return jnp.exp(log)

  return init


def _dt_bias(low, high):
  """Initial bias such that softplus(bias) is log-uniform in [low, high]."""

  def init(key, shape):
    dt = jnp.maximum(_log_uniform(low, high)(key, shape), 1e-4)
    return dt + jnp.log(-jnp.expm1(-dt))

  return init


def _log_rate(low, high):
  """Initial log(-A) with -A uniform in [low, high]."""

  def init(key, shape):
    return jnp.log(jax.random.uniform(key, shape, minval=low, maxval=high))

  return init


class SelectiveSSM(nn.Module):
  """Input-dependent z, x, B, C, dt and the recurrence over x.

  z is the gate, left to the caller; y = C h + skip * x. The recurrence is
  that of ops/scan.py with one rate per head. Its parameters a_log, dt_bias
  and skip, and all it computes from them, are float32.
  """

  num_heads: int = 4  # M
  head_dim: int = 16  # P, channels of a head
  d_state: int = 64  # S
  rate_range: tuple[float, float] = (1.0, 16.0)  # of -A at initialisation
  dt_range: tuple[float, float] = (1e-3, 0.1)  # of dt at initialisation
  activate: bool = True  # SiLU on x, B and C
  bidirectional: bool = False  # the second half of the heads runs backwards
  rule: str = "zoh"
  method: str = "chunked"
  dtype: DTypeLike = jnp.float32

  def setup(self):
    """Creates one projection for z, x, B, C and dt, and the rates."""
    inner, heads = self.num_heads * self.head_dim, self.num_heads
    if self.bidirectional and heads % 2:
      raise UserError(f"num_heads={heads}: needs to be even if bidirectional")
    self.in_proj = nn.Dense(
      2 * inner + 2 * self.d_state + heads, use_bias=False, dtype=self.dtype
    )
    self.a_log = self.param("a_log", _log_rate(*self.rate_range), (heads,))
    self.dt_bias = self.param("dt_bias", _dt_bias(*self.dt_range), (heads,))
    self.skip = self.param("skip", nn.initializers.ones, (heads,))

  def _project(self, inputs):
    """Gate z, and the arguments x, dt, B, C of the recurrence."""
    inner, state = self.num_heads * self.head_dim, self.d_state
    splits = (inner, 2 * inner, 2 * inner + state, 2 * (inner + state))
    z, x, b, c, dt = jnp.split(self.in_proj(inputs), splits, axis=-1)
    if self.activate:
      x, b, c = nn.silu(x), nn.silu(b), nn.silu(c)
    bias = self.dt_bias.reshape((1,) * (dt.ndim - 1) + (-1,))
    dt = jax.nn.softplus(dt.astype(jnp.float32) + bias)
    return z, x.reshape(*x.shape[:-1], -1, self.head_dim), dt, b, c

  def _read_out(self, y, x):
    """Adds the skip connection and joins the heads."""
    skip = self.skip.astype(x.dtype).reshape((1,) * (x.ndim - 2) + (-1, 1))
    return (y + skip * x).reshape(*x.shape[:-2], -1)

  def __call__(
    self, inputs: Float[Array, "B L D"]
  ) -> tuple[Float[Array, "B L E"], Float[Array, "B L E"]]:
    """Runs over whole sequences: (y, z), both M * P wide."""
    z, x, dt, b, c = self._project(inputs)
    rate = -jnp.exp(self.a_log)[:, None]

    def run(heads, reverse):
      def one(x, dt, b, c):
        y, _ = scan.selective_scan(
          x[:, heads],
          dt[:, heads],
          rate[heads],
          b,
          c,
          reverse=reverse,
          method=self.method,
          rule=self.rule,
        )
        return y

      return jax.vmap(one)(x, dt, b, c)

    if self.bidirectional:
      half = self.num_heads // 2
      forward, backward = slice(None, half), slice(half, None)
      y = jnp.concatenate([run(forward, False), run(backward, True)], axis=2)
    else:
      y = run(slice(None), False)
    return self._read_out(y, x), z

  def step(
    self, inputs: Float[Array, "B D"], state: Float[Array, "B M P S"]
  ) -> tuple[Float[Array, "B E"], Float[Array, "B E"], Float[Array, "B M P S"]]:
    """One element of the sequence: (y, z, new state)."""
    z, x, dt, b, c = self._project(inputs)
    rate = -jnp.exp(self.a_log)[:, None]
    y, state = jax.vmap(
      lambda h, *token: scan.step(
        h, *token[:2], rate, *token[2:], rule=self.rule
      )
    )(state, x, dt, b, c)
    return self._read_out(y, x), z, state


def _windows(padded, dilations):
  """The shifted views of a padded image, one for each tap of `_correlate`."""
  reach = max(dilations)
  height, width = (size - 2 * reach for size in padded.shape[1:3])
  for i, dilation in enumerate(dilations):
    for row in range(3):
      for column in range(3):
        top = reach + (row - 1) * dilation
        left = reach + (column - 1) * dilation
        view = padded[:, top : top + height, left : left + width]
        yield (i, row, column), view


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _correlate(padded, taps, dilations):
  """Sum of depthwise 3x3 correlations, without padding.

  Shifted views make one fused elementwise pass forwards and, with the taps
  flipped, one backwards; XLA's dilated depthwise convolution and its own
  gradient of the views are several times slower on CPUs.
  """
  return sum(
    taps[index][None, None, None] * view
    for index, view in _windows(padded, dilations)
  )


def _correlate_fwd(padded, taps, dilations):
  return _correlate(padded, taps, dilations), (padded, taps)


def _correlate_bwd(dilations, residual, cotangent):
  padded, taps = residual
  margin = 2 * max(dilations)
  edges = ((0, 0), (margin, margin), (margin, margin), (0, 0))
  flipped = taps[:, ::-1, ::-1]
  d_padded = _correlate(jnp.pad(cotangent, edges), flipped, dilations)
  sums = [
    jnp.sum(cotangent * view, axis=(0, 1, 2))
    for _, view in _windows(padded, dilations)
  ]
  return d_padded, jnp.stack(sums).reshape(taps.shape)


_correlate.defvjp(_correlate_fwd, _correlate_bwd)


class SpatialFusion(nn.Module):
  """Structure-aware fusion: depthwise 3x3 taps at dilations 1, 3 and 5.

  Spatial-Mamba (Xiao et al. ICLR 2025, eq. 7) on the read-out of the scan:
  sum over dilations of alpha * (3x3 kernel), replicated border. It starts as
  the identity: centre taps 1, others 0, alpha = (1, 0, 0).
  """

  dilations: tuple[int, ...] = (1, 3, 5)

  @nn.compact
  def __call__(self, x: Float[Array, "B h w D"]) -> Float[Array, "B h w D"]:
    """Fuses each channel over its neighbourhood."""
    count = len(self.dilations)

    def centre(_, shape):
      return jnp.zeros(shape).at[:, 1, 1].set(1.0)

    taps = self.param("taps", centre, (count, 3, 3, x.shape[-1]))
    alpha = self.param(
      "alpha", lambda _, shape: jnp.zeros(shape).at[0].set(1.0), (count,)
    )
    taps = (alpha[:, None, None, None] * taps).astype(x.dtype)
    reach = max(self.dilations)
    edges = ((0, 0), (reach, reach), (reach, reach), (0, 0))
    return _correlate(jnp.pad(x, edges, mode="edge"), taps, self.dilations)


def scaled_dense(features, scale, dtype):
  """Projection `out_proj` whose output starts `scale` times its usual size."""
  init = nn.initializers.variance_scaling(
    scale**2, "fan_in", "truncated_normal"
  )
  return nn.Dense(features, kernel_init=init, dtype=dtype, name="out_proj")


class SelectiveScan2D(nn.Module):
  """Mixes the tokens of a grid before slots compete for them.

  A bidirectional SSD scan over the raster (half of the heads each way),
  spatial fusion of its read-out, gate, RMSNorm, projection, residual. The
  projection is scaled by `out_scale`, so that the block starts near the
  identity.
  """

  num_heads: int = 4  # M, even
  head_dim: int = 16  # P, channels of a head
  d_state: int = 64  # S
  use_spatial_fusion: bool = True
  out_scale: float = 0.1
  method: str = "chunked"
  dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(
    self, tokens: Float[Array, "B h w D"]
  ) -> Float[Array, "B h w D"]:
    """Returns tokens of the same shape and dtype."""
    batch, height, width, features = tokens.shape
    x = nn.RMSNorm(dtype=self.dtype, name="norm")(tokens)
    y, z = SelectiveSSM(
      num_heads=self.num_heads,
      head_dim=self.head_dim,
      d_state=self.d_state,
      bidirectional=True,
      method=self.method,
      dtype=self.dtype,
      name="ssm",
    )(x.reshape(batch, height * width, features))
    y, z = (v.reshape(batch, height, width, -1) for v in (y, z))
    if self.use_spatial_fusion:
      y = SpatialFusion(name="fusion")(y)
    y = nn.RMSNorm(dtype=self.dtype, name="out_norm")(y * nn.silu(z))
    y = scaled_dense(features, self.out_scale, self.dtype)(y)
    return tokens + y.astype(tokens.dtype)
