"""Schedules, conversions, weights and samplers on closed-form data."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spectraldiffusion_jax.errors import UserError
from spectraldiffusion_jax.ops import draws, noise

SCHEDULES = [
  noise.cosine,
  functools.partial(noise.cosine, kappa=-2.0),
  noise.linear,
]
# Data ~ N(MEAN, SPREAD^2): the best denoiser and the exact map are known.
MEAN, SPREAD = 0.7, 0.5


def gaussian_denoiser(x, t):
  alpha, sigma = (v.reshape(-1, 1) for v in noise.cosine(t))
  top = MEAN * sigma**2 + SPREAD**2 * alpha * x
  return top / (alpha**2 * SPREAD**2 + sigma**2)


def exact_map(x, start, end):
  """Where the probability-flow ODE carries x between two times."""

  def level(t):
    alpha, sigma = noise.cosine(jnp.asarray(t, x.dtype))
    return alpha * MEAN, jnp.sqrt((alpha * SPREAD) ** 2 + sigma**2)

  (mean, scale), (mean_to, scale_to) = level(start), level(end)
  return mean_to + scale_to * (x - mean) / scale


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedule_ends_and_falls(schedule):
  t = jnp.linspace(0.0, 1.0, 51)
  alpha, sigma = schedule(t)
  np.testing.assert_allclose(alpha**2 + sigma**2, 1.0, rtol=1e-6)
  assert (float(alpha[0]), float(sigma[0])) == (1.0, 0.0)
  assert (float(alpha[-1]), float(sigma[-1])) == (0.0, 1.0)
  assert bool((jnp.diff(alpha) < 0).all() & (jnp.diff(sigma) > 0).all())
  slopes = jax.vmap(jax.grad(lambda t: sum(schedule(t))))(t)
  assert bool(jnp.isfinite(slopes).all())


@pytest.mark.parametrize("shape", [(8,), (3, 5), (4, 7, 3, 2)])
def test_rows_hold_the_draws_of_the_whole(shape):
  key = jax.random.key(3)
  np.testing.assert_array_equal(
    draws.normal(key, shape), jax.random.normal(key, shape)
  )


def test_cosine_is_a_cosine():
  # log SNR = -2 log tan(pi t / 2) means alpha = cos(pi t / 2).
  t = jnp.linspace(0.05, 0.95, 19)
  alpha, sigma = noise.cosine(t)
  np.testing.assert_allclose(alpha, np.cos(np.pi * t / 2), rtol=1e-5)
  np.testing.assert_allclose(sigma, np.sin(np.pi * t / 2), rtol=1e-5)
  shifted, _ = noise.cosine(t, kappa=-1.0)
  assert bool((shifted < alpha).all())


def test_linear_reaches_noise_in_few_steps():
  # Ho et al.'s betas unscaled over 50 steps leave alpha^2 = 0.60.
  betas = np.linspace(1e-4, 0.02, 50)
  assert 0.59 < np.prod(1 - betas) < 0.61
  alpha, _ = noise.linear(jnp.array([1 / 50, 49 / 50]))
  np.testing.assert_allclose(alpha[0], np.sqrt(1 - 1e-4 * 20), rtol=1e-5)
  assert alpha[1] < 0.02


@pytest.mark.parametrize("kind", ["x0", "eps", "v"])
def test_conversions_invert(kind):
  keys = jax.random.split(jax.random.key(0))
  x0, eps = (jax.random.normal(k, (9, 4, 3)) for k in keys)
  alpha, sigma = noise.cosine(jnp.linspace(0.1, 0.9, 9))
  x = noise.add_noise(x0, eps, alpha, sigma)
  value = noise.target(x0, eps, alpha, sigma, kind=kind)
  back = noise.to_x0(value, x, alpha, sigma, kind=kind)
  np.testing.assert_allclose(back, x0, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(
    noise.to_eps(back, x, alpha, sigma), eps, rtol=1e-4, atol=1e-4
  )


@pytest.mark.parametrize("kind", ["x0", "eps", "v"])
def test_conversions_are_finite_at_both_ends(kind):
  x = jnp.ones((2, 3))
  alpha, sigma = noise.cosine(jnp.array([0.0, 1.0]))
  for value in (
    noise.to_x0(x, x, alpha, sigma, kind=kind),
    noise.to_eps(x, x, alpha, sigma),
    noise.loss_weight(alpha, sigma, kind=kind),
  ):
    assert bool(jnp.isfinite(value).all())


def test_v_is_the_derivative_along_the_circle():
  # x(phi) = cos(phi) x0 + sin(phi) eps, v = dx/dphi (Salimans & Ho 2022).
  phi = jnp.array([0.3, 1.0])
  x0, eps = jnp.array([[1.0], [2.0]]), jnp.array([[-0.5], [0.7]])

  def path(phi):
    return noise.add_noise(x0, eps, jnp.cos(phi), jnp.sin(phi))

  _, slope = jax.jvp(path, (phi,), (jnp.ones_like(phi),))
  v = noise.target(x0, eps, jnp.cos(phi), jnp.sin(phi), kind="v")
  np.testing.assert_allclose(v, slope, rtol=1e-6)


@pytest.mark.parametrize("weighting", list(noise.WEIGHTINGS))
@pytest.mark.parametrize("kind", ["eps", "v"])
def test_weights_measure_the_same_error(weighting, kind):
  # One wrong x_0, seen as an error of eps or of v, costs the same.
  alpha, sigma = noise.cosine(jnp.linspace(0.05, 0.95, 19))
  x0, eps = jnp.full((19, 1), 0.4), jnp.full((19, 1), -0.3)
  x = noise.add_noise(x0, eps, alpha, sigma)
  wrong = x0 + 0.1

  def cost(kind):
    truth = noise.target(x0, eps, alpha, sigma, kind=kind)
    noisy = noise.to_eps(wrong, x, alpha, sigma)
    guess = noise.target(wrong, noisy, alpha, sigma, kind=kind)
    weight = noise.loss_weight(alpha, sigma, weighting=weighting, kind=kind)
    return weight * (guess - truth)[:, 0] ** 2

  np.testing.assert_allclose(cost(kind), cost("x0"), rtol=2e-3)


def test_weight_values():
  # SNR 0, 1/4, 3, 100: by hand.
  snr = jnp.array([0.0, 0.25, 3.0, 100.0])
  alpha, sigma = jnp.sqrt(snr / (1 + snr)), jnp.sqrt(1 / (1 + snr))
  weight = functools.partial(noise.loss_weight, alpha, sigma)
  np.testing.assert_allclose(weight(), [1, 1, 3, 5], rtol=1e-5)
  np.testing.assert_allclose(
    weight(weighting="min_snr"), [0, 0.25, 3, 5], rtol=1e-5
  )
  np.testing.assert_allclose(
    weight(weighting="min_snr", kind="v"), [0, 0.2, 0.75, 5 / 101], rtol=1e-5
  )


def test_trailing_grid():
  grid = noise.trailing_grid(10, num_timesteps=50)
  np.testing.assert_allclose(grid, np.arange(50, -1, -5) / 50)
  odd = noise.trailing_grid(7, num_timesteps=50)
  assert odd[0] == 1 and odd[-1] == 0 and (np.diff(odd) < 0).all()
  np.testing.assert_allclose(odd * 50, np.round(odd * 50), atol=1e-12)
  for bad in (0, 51):
    with pytest.raises(UserError, match="num_steps"):
      noise.trailing_grid(bad, num_timesteps=50)


def largest_error(method, steps, start, end):
  """Distance to the exact map over a fixed set of starts, float64."""
  with jax.enable_x64(True):
    x = jnp.linspace(-2.0, 2.0, 9, dtype=jnp.float64)[:, None]
    times = np.linspace(start, end, steps + 1)
    run = jax.jit(
      lambda x: noise.integrate(gaussian_denoiser, x, times, method=method)
    )
    return float(jnp.abs(run(x) - exact_map(x, start, end)).max())


@pytest.mark.parametrize("method, ratio", [("ddim", 2), ("dpm2m", 4)])
def test_order_of_convergence(method, ratio):
  # Theorem 4: where log(alpha / sigma) is finite at both ends, doubling the
  # steps divides the error by 2 (first order) or 4 (second order).
  coarse, fine = (largest_error(method, n, 0.9, 0.1) for n in (80, 160))
  assert abs(coarse / fine / ratio - 1) < 0.08


def test_errors_from_noise_to_data():
  # Through the infinite first and last steps DDIM keeps its order (16-fold in
  # four doublings) and 2M, a little below its own, stays far ahead.
  few = {m: largest_error(m, 10, 1.0, 0.0) for m in ("ddim", "dpm2m")}
  many = {m: largest_error(m, 160, 1.0, 0.0) for m in ("ddim", "dpm2m")}
  assert few["ddim"] < 0.16 and few["dpm2m"] < 0.05
  assert 14 < few["ddim"] / many["ddim"] < 18
  assert many["dpm2m"] < 1e-3 < many["ddim"] / 9


def test_one_evaluation_at_pure_noise_gives_the_mean():
  def denoise(x, t):
    np.testing.assert_equal(t.shape, (4,))
    return gaussian_denoiser(x, t)

  for method in ("ddim", "dpm2m"):
    out = noise.sample(
      denoise, jax.random.key(0), (4, 3), num_steps=1, method=method
    )
    np.testing.assert_allclose(out, MEAN, rtol=1e-5)


@pytest.mark.parametrize(
  "method, eta, tolerance",
  [("ddim", 0.0, 0.04), ("ddim", 1.0, 0.08), ("dpm2m", 0.0, 0.02)],
)
def test_samples_have_the_moments_of_the_data(method, eta, tolerance):
  sample = jax.jit(
    lambda key: noise.sample(
      gaussian_denoiser, key, (20_000, 1), num_steps=50, method=method, eta=eta
    )
  )
  x = np.asarray(sample(jax.random.key(0)))
  assert x.dtype == np.float32
  assert abs(x.mean() - MEAN) < 0.015
  assert abs(x.std() / SPREAD - 1) < tolerance


def test_leading_grid_is_biased():
  # Negative control: the last leading time is 45 / 50, where x_t still holds
  # a share of the data that a start of pure noise lacks.
  x = jax.random.normal(jax.random.key(0), (20_000, 1))
  leading = np.append(np.arange(45, -1, -5), 0)[:10] / 50
  trailing = noise.trailing_grid(10)
  bias = [
    float(jnp.mean(noise.integrate(gaussian_denoiser, x, grid))) - MEAN
    for grid in (leading, trailing)
  ]
  assert abs(bias[0]) > 0.02 > 0.01 > abs(bias[1])


def test_stochastic_steps_are_fresh_and_reproducible():
  @functools.partial(jax.jit, static_argnums=1)
  def draw(key, eta):
    return noise.sample(gaussian_denoiser, key, (8, 1), num_steps=5, eta=eta)

  a, b = jax.random.key(0), jax.random.key(1)
  np.testing.assert_array_equal(draw(a, 1.0), draw(a, 1.0))
  assert not np.allclose(draw(a, 1.0), draw(a, 0.0))
  assert not np.allclose(draw(a, 1.0), draw(b, 1.0))


def test_denoising_error_grows_with_time():
  # Theorem 4: the error of the best denoiser increases in t.
  keys = jax.random.split(jax.random.key(0))
  x0 = MEAN + SPREAD * jax.random.normal(keys[0], (50_000, 1))
  eps = jax.random.normal(keys[1], x0.shape)
  error = []
  for t in np.linspace(0.1, 1.0, 10):
    alpha, sigma = noise.cosine(jnp.full((50_000,), t, jnp.float32))
    x = noise.add_noise(x0, eps, alpha, sigma)
    guess = gaussian_denoiser(x, jnp.full((50_000,), t, jnp.float32))
    error.append(float(jnp.mean((guess - x0) ** 2)))
  assert (np.diff(error) > 0).all()
  np.testing.assert_allclose(error[-1], SPREAD**2, rtol=0.02)


def test_refuses_unknown_options():
  x, ones = jnp.ones((2, 1)), jnp.ones(2)
  integrate = functools.partial(noise.integrate, gaussian_denoiser, x)
  with pytest.raises(UserError, match="method"):
    integrate(noise.trailing_grid(2), method="heun")
  with pytest.raises(UserError, match="eta"):
    integrate(noise.trailing_grid(2), eta=1.0)
  with pytest.raises(UserError, match="kind"):
    noise.target(x, x, ones, ones, kind="score")
  with pytest.raises(UserError, match="weighting"):
    noise.loss_weight(ones, ones, weighting="p2")
