"""Selective state-space recurrence: one parameterisation, four evaluations.

With step sizes dt_t > 0, rates A < 0, input maps B_t and read-outs C_t,

  h_t = exp(dt_t A) h_{t-1} + gain(dt_t, A) u_t B_t,      y_t = h_t C_t

where the state h is [M P S]: M heads, P channels per head, S states. `rate`
is [M S] (diagonal A: S6, Gu & Dao 2023, with M channels and P = 1) or [M 1]
(one scalar per head: SSD, Dao & Gu 2024). The same arguments go to

  step            one token, for recurrences whose input depends on the state
  "sequential"    lax.scan over the tokens
  "associative"   lax.associative_scan in chunks (a chunk of L or more tokens
                  makes it one scan: depth O(log L), memory O(L M P S))
  "chunked"       SSD matrix products in chunks, for scalar rates only

and all agree. Nothing ever divides by a cumulative product, so any step size
and hard resets (decay 0) are safe. Batch with jax.vmap.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from spectraldiffusion_jax.errors import UserError, choose

# TPUs and GPUs round the inputs of float32 products unless told not to.
_einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


@jax.custom_jvp
def _phi(x: Float[Array, "*x"]) -> Float[Array, "*x"]:
  """(exp(x) - 1) / x with phi(0) = 1: the mean decay within one step."""
  safe = jnp.where(x == 0, 1.0, x)
  return jnp.where(x == 0, 1.0, jnp.expm1(safe) / safe)


@_phi.defjvp
def _phi_jvp(primals, tangents):
  (x,), (dx,) = primals, tangents
  value = _phi(x)
  # (exp(x) - phi) / x cancels for small x; its Taylor series does not.
  small = jnp.abs(x) < 0.05
  near = jnp.where(small, x, 0.0)
  series = jnp.full_like(x, 1 / 840)
  for coefficient in (1 / 144, 1 / 30, 1 / 8, 1 / 3, 1 / 2):
    series = series * near + coefficient
  far = jnp.where(small, 1.0, x)
  slope = jnp.where(small, series, (jnp.exp(far) - value) / far)
  return value, slope * dx


RULES = {"zoh": _phi, "euler": jnp.ones_like}


def discretise(
  dt: Float[Array, "*#x"], rate: Float[Array, "*#x"], *, rule: str = "zoh"
) -> tuple[Float[Array, "*x"], Float[Array, "*x"]]:
  """Turns h' = A h + B u into h_t = exp(log_decay) h_{t-1} + gain B u_t.

  zoh:    gain = (exp(dt A) - 1) / A     exact for input held over the step
  euler:  gain = dt                      Mamba's reference code

  Args:
    dt: step sizes, >= 0.
    rate: A < 0, of the same rank as `dt`.
    rule: "zoh" or "euler".

  Returns:
    log_decay = dt A, and gain.

  Raises:
    UserError: on an unknown rule.
  """
  log_decay = dt * rate
  return log_decay, dt * choose("rule", rule, RULES)(log_decay)


def _advance(state, u, log_decay, gain, b, c):
  """One recurrence step from discretised arguments."""
  drive = (gain[:, None] * u[..., None]) * b[None, None]
  state = jnp.exp(log_decay)[:, None] * state + drive
  return _einsum("MPS,S->MP", state, c), state


def step(
  state: Float[Array, "M P S"],
  u: Float[Array, "M P"],
  dt: Float[Array, " M"],
  rate: Float[Array, "M #S"],
  b: Float[Array, " S"],
  c: Float[Array, " S"],
  *,
  rule: str = "zoh",
) -> tuple[Float[Array, "M P"], Float[Array, "M P S"]]:
  """One token of `selective_scan`: returns its output and the new state."""
  dtype = state.dtype
  log_decay, gain = discretise(
    dt.astype(dtype)[:, None], rate.astype(dtype), rule=rule
  )
  y, state = _advance(
    state, u.astype(dtype), log_decay, gain, b.astype(dtype), c.astype(dtype)
  )
  return y.astype(u.dtype), state


def _compose(first, second):
  """Affine maps in order: first h -> a1 h + b1, then h -> a2 h + b2."""
  (a1, b1), (a2, b2) = first, second
  return a2 * a1, a2 * b1 + b2


def recurrence(
  decay: Float[Array, "L *#state"],
  drive: Float[Array, "L *state"],
  initial: Float[Array, "*state"],
) -> Float[Array, "L *state"]:
  """All states of h_t = decay_t h_{t-1} + drive_t, in O(log L) depth.

  Args:
    decay: factors in [0, 1]; axes of size 1 are shared.
    drive: inputs.
    initial: h_0.

  Returns:
    h_1 ... h_L.
  """
  drive = drive.at[0].add(decay[0] * initial)
  return jax.lax.associative_scan(_compose, (decay, drive))[1]


def _split(x, size):
  """[L ...] to [J Q ...]: J chunks of Q tokens.

  Zeros are appended to fill the last chunk: log-decay 0 and gain 0 make
  identity steps, so the final state is not touched by them.
  """
  pad = -x.shape[0] % size
  x = jnp.pad(x, ((0, pad), *((0, 0) for _ in x.shape[1:])))
  return x.reshape(-1, size, *x.shape[1:])


def _sequential(u, log_decay, gain, b, c, initial, *, chunk):
  del chunk

  def body(state, token):
    y, state = _advance(state, *token)
    return state, y

  final, y = jax.lax.scan(body, initial, (u, log_decay, gain, b, c))
  return y, final


def _associative(u, log_decay, gain, b, c, initial, *, chunk):
  """Associative scans of chunks, one after the other.

  States and the levels of the scan's tree exist for one chunk at a time; the
  gradient recomputes them from the state at the chunk's start.
  """

  def body(state, tokens):
    u, log_decay, gain, b, c = tokens
    drive = (gain[:, :, None] * u[..., None]) * b[:, None, None]
    states = recurrence(jnp.exp(log_decay)[:, :, None], drive, state)
    return states[-1], _einsum("LMPS,LS->LMP", states, c)

  size = min(chunk, u.shape[0])
  tokens = tuple(_split(x, size) for x in (u, log_decay, gain, b, c))
  body = jax.checkpoint(body, prevent_cse=False)
  final, y = jax.lax.scan(body, initial, tokens)
  return y.reshape(-1, *u.shape[1:])[: u.shape[0]], final


def segment_sums(x: Float[Array, "*c Q"]) -> Float[Array, "*c Q Q"]:
  """Entry (i, j) is x_{j+1} + ... + x_i for i >= j, -inf above the diagonal.

  Sums of masked copies, not differences of one long cumulative sum: those
  cancel, and are undefined where a reset has put -inf.
  """
  size = x.shape[-1]
  rows = jnp.broadcast_to(x[..., None], (*x.shape, size))
  lower = jnp.tril(jnp.ones((size, size), bool), -1)
  lower = jnp.broadcast_to(lower, rows.shape)
  sums = jnp.cumsum(jnp.where(lower, rows, 0.0), axis=-2)
  reached = jnp.broadcast_to(jnp.tril(jnp.ones((size, size), bool)), rows.shape)
  return jnp.where(reached, sums, -jnp.inf)


def _chunked(u, log_decay, gain, b, c, initial, *, chunk):
  """SSD (Dao & Gu 2024, section 6): quadratic in chunks, linear across."""
  length, heads, _ = u.shape
  size = min(chunk, length)
  x = _split(gain * u, size)  # [J Q M P]
  b, c = _split(b, size), _split(c, size)  # [J Q S]
  log_decay = _split(log_decay[..., 0], size).swapaxes(1, 2)  # [J M Q]
  passed = jnp.exp(segment_sums(log_decay))  # [J M Q Q]
  scores = _einsum("JIS,JQS->JIQ", c, b)
  y = _einsum("JMIQ,JQMP->JIMP", scores[:, None] * passed, x)

  written = _einsum("JMQ,JQMP,JQS->JMPS", passed[:, :, -1], x, b)
  kept = jnp.exp(jnp.sum(log_decay, axis=-1))[..., None, None]
  states = recurrence(kept, written, initial)
  before = jnp.concatenate([initial[None], states[:-1]])
  read = jnp.exp(jnp.cumsum(log_decay, axis=-1))
  y += _einsum("JIS,JMI,JMPS->JIMP", c, read, before)
  return y.reshape(-1, heads, u.shape[-1])[:length], states[-1]


METHODS = {
  "sequential": _sequential,
  "associative": _associative,
  "chunked": _chunked,
}


def selective_scan(
  u: Float[Array, "L M P"],
  dt: Float[Array, "L M"],
  rate: Float[Array, "M #S"],
  b: Float[Array, "L S"],
  c: Float[Array, "L S"],
  *,
  initial: Float[Array, "M P S"] | None = None,
  reset: Bool[Array, " L"] | None = None,
  reverse: bool = False,
  method: str = "chunked",
  rule: str = "zoh",
  chunk: int = 64,
) -> tuple[Float[Array, "L M P"], Float[Array, "M P S"]]:
  """Runs the selective recurrence of this module over a whole sequence.

  Args:
    u: inputs; the skip connection D u is left to the caller.
    dt: step sizes, >= 0.
    rate: A < 0; last axis S (diagonal) or 1 (scalar per head).
    b: input maps, shared by the heads.
    c: read-outs, shared by the heads.
    initial: h_0, zero if None.
    reset: True where a token forgets everything before it.
    reverse: run from the last token to the first.
    method: one of METHODS.
    rule: one of RULES.
    chunk: tokens per chunk; need not divide L. Ignored by "sequential".

  Returns:
    Outputs in the dtype of `u`, and the final state in float32 (float64 if
    `u` is): the state stays float32 whatever the inputs are.

  Raises:
    UserError: on an unknown method or rule, or a diagonal rate with "chunked".
  """
  evaluate = choose("method", method, METHODS)
  if method == "chunked" and rate.shape[1] != 1:
    raise UserError(
      "method='chunked' needs one rate per head; use 'associative' for a "
      f"diagonal rate of shape {rate.shape}"
    )
  dtype = jnp.promote_types(u.dtype, jnp.float32)
  sequence = tuple(x.astype(dtype) for x in (u, dt, b, c))
  if reverse:
    sequence = tuple(x[::-1] for x in sequence)
    reset = None if reset is None else reset[::-1]
  x, dt, b, c = sequence
  log_decay, gain = discretise(
    dt[..., None], rate.astype(dtype)[None], rule=rule
  )
  if reset is not None:
    log_decay = jnp.where(reset[:, None, None], -jnp.inf, log_decay)
  if initial is None:
    initial = jnp.zeros((*u.shape[1:], b.shape[-1]), dtype)
  initial = initial.astype(dtype)
  y, final = evaluate(x, log_decay, gain, b, c, initial, chunk=chunk)
  y = y[::-1] if reverse else y
  return y.astype(u.dtype), final
