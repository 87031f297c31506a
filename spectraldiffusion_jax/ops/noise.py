"""Noise schedules, diffusion targets, loss weights and samplers.

  x_t = alpha_t x_0 + sigma_t eps,   alpha^2 + sigma^2 = 1,   t in [0, 1]

t = 0 is the data (sigma = 0), t = 1 pure noise (alpha = 0: zero terminal
signal-to-noise ratio, Lin et al. WACV 2024). A schedule is any function
t -> (alpha, sigma); bind its options with functools.partial.
"""

import math
from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from spectraldiffusion_jax.errors import UserError, choose
from spectraldiffusion_jax.ops import draws

Schedule: TypeAlias = Callable[[Array], tuple[Array, Array]]
Denoiser: TypeAlias = Callable[[Array, Array], Array]
"""(x_t [B ...], t [B]) -> prediction of x_0, shaped as x_t."""

MAX_LOG_SNR = 20.0
_TINY = math.exp(-MAX_LOG_SNR)


def cosine(
  t: Float[Array, "*t"], *, kappa: float = 0.0
) -> tuple[Float[Array, "*t"], Float[Array, "*t"]]:
  """Cosine schedule: log SNR(t) = -2 log tan(pi t / 2) + kappa.

  kappa = 0 is Nichol & Dhariwal 2021 without their offset; kappa < 0 adds
  noise (Hoogeboom et al. 2023). The log SNR is kept within +-20.

  Returns:
    alpha and sigma, exactly (1, 0) at t <= 0 and (0, 1) at t >= 1.
  """
  inside = jnp.clip(t, 1e-6, 1 - 1e-6)
  log_snr = kappa - 2 * jnp.log(jnp.tan(0.5 * math.pi * inside))
  log_snr = jnp.clip(log_snr, -MAX_LOG_SNR, MAX_LOG_SNR)
  return _pinned(t, jax.nn.sigmoid(log_snr), jax.nn.sigmoid(-log_snr))


def linear(
  t: Float[Array, "*t"],
  *,
  num_timesteps: int = 50,
  beta: tuple[float, float] = (1e-4, 0.02),
) -> tuple[Float[Array, "*t"], Float[Array, "*t"]]:
  """DDPM's linear beta schedule (Ho et al. 2020), made fit for few steps.

  The betas are meant for 1,000 steps: with 50 they would end at alpha^2 =
  0.60. So they are multiplied by 1000 / num_timesteps (at most 0.999), and
  alpha is then shifted and scaled to end at exactly 0 while its first value
  is kept (Lin et al. WACV 2024, algorithm 1). Between the steps i /
  num_timesteps alpha is interpolated. Returns as `cosine` does.
  """
  betas = np.linspace(*beta, num_timesteps) * 1000 / num_timesteps
  alpha = np.sqrt(np.cumprod(1 - np.minimum(betas, 0.999)))
  alpha = (alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])
  alpha = np.concatenate([[1.0], alpha]).astype(np.dtype(t.dtype))
  grid = np.linspace(0.0, 1.0, num_timesteps + 1).astype(np.dtype(t.dtype))
  squared = jnp.interp(t, grid, alpha) ** 2
  return _pinned(t, squared, 1 - squared)


SCHEDULES = {"cosine": cosine, "linear": linear}


def _pinned(t, alpha_squared, sigma_squared):
  """(alpha, sigma) with both ends exact."""

  def root(squared, zero):
    # The inner where keeps the gradient finite at the pinned end.
    return jnp.where(zero, 0.0, jnp.sqrt(jnp.where(zero, 1.0, squared)))

  alpha, sigma = root(alpha_squared, t >= 1), root(sigma_squared, t <= 0)
  return jnp.where(t <= 0, 1.0, alpha), jnp.where(t >= 1, 1.0, sigma)


def _like(coefficient, x):
  """Appends axes so that a coefficient of each example multiplies x."""
  return coefficient.reshape(
    coefficient.shape + (1,) * (x.ndim - coefficient.ndim)
  )


def add_noise(
  x0: Float[Array, "B *x"],
  eps: Float[Array, "B *x"],
  alpha: Float[Array, " B"],
  sigma: Float[Array, " B"],
) -> Float[Array, "B *x"]:
  """x_t = alpha x_0 + sigma eps."""
  return _like(alpha, x0) * x0 + _like(sigma, x0) * eps


def target(
  x0: Float[Array, "B *x"],
  eps: Float[Array, "B *x"],
  alpha: Float[Array, " B"],
  sigma: Float[Array, " B"],
  *,
  kind: str = "v",
) -> Float[Array, "B *x"]:
  """What the network predicts: "x0", "eps", or v = alpha eps - sigma x_0.

  v is the default (Salimans & Ho 2022): it is defined at both ends.
  """
  if kind == "v":
    return _like(alpha, x0) * eps - _like(sigma, x0) * x0
  return choose("kind", kind, {"x0": x0, "eps": eps, "v": None})


def to_x0(
  prediction: Float[Array, "B *x"],
  x: Float[Array, "B *x"],
  alpha: Float[Array, " B"],
  sigma: Float[Array, " B"],
  *,
  kind: str = "v",
) -> Float[Array, "B *x"]:
  """The x_0 that a prediction of `kind` stands for.

  "eps" says nothing about x_0 at alpha = 0; it is finite there, not useful.
  """
  alpha, sigma = _like(alpha, x), _like(sigma, x)
  if kind == "v":
    return alpha * x - sigma * prediction
  if kind == "eps":
    return (x - sigma * prediction) / jnp.maximum(alpha, _TINY**0.5)
  return choose("kind", kind, {"x0": prediction, "eps": None, "v": None})


def to_eps(
  x0: Float[Array, "B *x"],
  x: Float[Array, "B *x"],
  alpha: Float[Array, "#B"] | Float[Array, ""],
  sigma: Float[Array, "#B"] | Float[Array, ""],
) -> Float[Array, "B *x"]:
  """The noise that a prediction of x_0 stands for; finite at sigma = 0."""
  sigma = jnp.maximum(_like(sigma, x), _TINY**0.5)
  return (x - _like(alpha, x) * x0) / sigma


def signal_to_noise(
  alpha: Float[Array, "*t"], sigma: Float[Array, "*t"]
) -> Float[Array, "*t"]:
  """SNR = alpha^2 / sigma^2, at most exp(20)."""
  return alpha**2 / jnp.maximum(sigma**2, _TINY)


WEIGHTINGS = {
  "clip_snr": lambda snr, gamma: jnp.clip(snr, 1.0, gamma),
  "min_snr": lambda snr, gamma: jnp.minimum(snr, gamma),
  "uniform": lambda snr, gamma: jnp.ones_like(snr),
}


def loss_weight(
  alpha: Float[Array, " B"],
  sigma: Float[Array, " B"],
  *,
  weighting: str = "clip_snr",
  gamma: float = 5.0,
  kind: str = "x0",
) -> Float[Array, " B"]:
  """Weight of the squared error of a prediction of `kind`.

  On the error of x_0 the weight is clip(SNR, 1, gamma), min(SNR, gamma)
  (Hang et al. ICCV 2023) or 1. The lower clip keeps t -> 1 in the loss: only
  there are slots indispensable. Since |d eps|^2 = SNR |d x_0|^2 and |d v|^2 =
  (1 + SNR) |d x_0|^2, the weight is divided by those for the other kinds.
  """
  snr = signal_to_noise(alpha, sigma)
  weight = choose("weighting", weighting, WEIGHTINGS)(snr, gamma)
  error = {"x0": jnp.ones_like(snr), "eps": snr, "v": 1 + snr}
  return weight / jnp.maximum(choose("kind", kind, error), _TINY)


def trailing_grid(
  num_steps: int, *, num_timesteps: int = 50
) -> Float[np.ndarray, " T"]:
  """Times 1 = t_0 > ... > t_num_steps = 0, a subset of the training times.

  A leading grid (Song et al. 2021) never visits t = 1, pure noise, and biases
  the mean of the samples. UserError if num_steps is not 1 ... num_timesteps.
  """
  if not 1 <= num_steps <= num_timesteps:
    raise UserError(
      f"num_steps={num_steps}: choose 1 to num_timesteps={num_timesteps}"
    )
  steps = num_timesteps * np.arange(num_steps, -1, -1) / num_steps
  return np.round(steps) / num_timesteps


def _ddim(x, x0, levels, noise, eta):
  """One step of Song et al. 2021, eq. 12; eta = 0 is deterministic."""
  (alpha, sigma), (alpha_to, sigma_to) = levels
  eps = to_eps(x0, x, alpha, sigma)
  if not eta:
    return alpha_to * x0 + sigma_to * eps
  ratio = (1 - (alpha / alpha_to) ** 2) * (sigma_to / sigma) ** 2
  fresh = eta * jnp.sqrt(jnp.maximum(ratio, 0.0))
  kept = jnp.sqrt(jnp.maximum(sigma_to**2 - fresh**2, 0.0))
  return alpha_to * x0 + kept * eps + fresh * noise


def _dpm_momentum(alpha, sigma):
  """h_i / 2 h_{i-1} of DPM-Solver++(2M) for the steps of a grid.

  The widths in log(alpha / sigma) of the first step (from alpha = 0) and the
  last (to sigma = 0) are infinite; those two and the second are first order.
  """
  width = jnp.diff(jnp.log(alpha) - jnp.log(sigma))
  ratio = width[1:] / (2 * width[:-1])
  ratio = jnp.where(jnp.isfinite(width[1:]), ratio, 0.0)
  return width, jnp.concatenate([jnp.zeros_like(width[:1]), ratio])


def integrate(
  denoise_fn: Denoiser,
  x: Float[Array, "B *x"],
  times: Float[Array | np.ndarray, " T"],
  *,
  method: str = "ddim",
  schedule: Schedule = cosine,
  eta: float = 0.0,
  key: Key[Array, ""] | None = None,
) -> Float[Array, "B *x"]:
  """Carries x from times[0] down to times[-1] and returns it.

  Args:
    denoise_fn: (x_t, t [B]) -> x_0.
    x: noised data at times[0].
    times: decreasing, in [0, 1].
    method: "ddim", first order, or "dpm2m": DPM-Solver++(2M), second order
      (Lu et al. 2022, algorithm 2).
    schedule: t -> (alpha, sigma).
    eta: share of fresh noise in "ddim"; 1 is ancestral sampling.
    key: needed if eta > 0.

  Raises:
    UserError: on an unknown method, or eta > 0 without a key or in "dpm2m".
  """
  choose("method", method, {"ddim": None, "dpm2m": None})
  if eta and (key is None or method != "ddim"):
    raise UserError(f"eta={eta}: needs method='ddim' and a key; or set eta=0")
  times = jnp.asarray(times, x.dtype)
  alpha, sigma = schedule(times)
  width, momentum = _dpm_momentum(alpha, sigma)

  def step(carry, inputs):
    x, previous = carry
    i, t, here, there, width, momentum = inputs
    x0 = denoise_fn(x, jnp.full(x.shape[:1], t)).astype(x.dtype)
    if method == "ddim":
      noise = None
      if eta:
        noise = jax.random.normal(jax.random.fold_in(key, i), x.shape, x.dtype)
      return (_ddim(x, x0, (here, there), noise, eta), x0), None
    mixed = x0 + momentum * (x0 - previous)
    x = there[1] / here[1] * x - there[0] * jnp.expm1(-width) * mixed
    return (x, x0), None

  levels = (alpha[:-1], sigma[:-1]), (alpha[1:], sigma[1:])
  index = jnp.arange(len(times) - 1)
  inputs = (index, times[:-1], *levels, width, momentum)
  (x, _), _ = jax.lax.scan(step, (x, jnp.zeros_like(x)), inputs)
  return x


def sample(
  denoise_fn: Denoiser,
  key: Key[Array, ""],
  shape: tuple[int, ...],
  *,
  num_steps: int,
  method: str = "ddim",
  schedule: Schedule = cosine,
  num_timesteps: int = 50,
  eta: float = 0.0,
) -> Float[Array, "B *x"]:
  """Draws x_0 of `shape` [B ...] from noise on the trailing grid.

  Options as in `integrate`. Segmentation never calls this.
  """
  start, steps = jax.random.split(key)
  return integrate(
    denoise_fn,
    draws.normal(start, shape),
    trailing_grid(num_steps, num_timesteps=num_timesteps),
    method=method,
    schedule=schedule,
    eta=eta,
    key=steps,
  )
