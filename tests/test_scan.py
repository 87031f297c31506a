"""The selective recurrence: every form against a float64 loop; theorem 3."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.signal

from spectraldiffusion_jax.errors import UserError
from spectraldiffusion_jax.ops import scan

M, P, S = 2, 3, 4
CASES = [("scalar", m) for m in scan.METHODS] + [
  ("diagonal", m) for m in ("sequential", "associative")
]


def arguments(length, *, kind="scalar", seed=0, scale=1.0):
  rng = np.random.default_rng(seed)
  return {
    "u": rng.normal(size=(length, M, P)),
    "dt": scale * rng.exponential(size=(length, M)),
    "rate": -np.exp(rng.normal(size=(M, S if kind == "diagonal" else 1))),
    "b": rng.normal(size=(length, S)),
    "c": rng.normal(size=(length, S)),
  }


def loop(u, dt, rate, b, c, initial=None, reset=None, reverse=False):
  """The recurrence in float64, one number at a time where it matters."""
  state = np.zeros((M, P, S)) if initial is None else initial.copy()
  y = np.zeros(u.shape)
  order = range(len(u))
  for t in reversed(order) if reverse else order:
    if reset is not None and reset[t]:
      state = np.zeros_like(state)
    for m in range(M):
      for s in range(S):
        a = rate[m, s % rate.shape[1]]
        gain = np.expm1(dt[t, m] * a) / a
        state[m, :, s] *= np.exp(dt[t, m] * a)
        state[m, :, s] += gain * u[t, m] * b[t, s]
    y[t] = state @ c[t]
  return y, state


@functools.partial(
  jax.jit, static_argnames=("method", "rule", "reverse", "chunk")
)
def run(arrays, **options):
  return scan.selective_scan(**arrays, **options)


def error(value, expected):
  expected = np.asarray(expected, np.float64)
  scale = max(np.abs(expected).max(), 1e-300)
  return np.abs(np.asarray(value, np.float64) - expected).max() / scale


@pytest.mark.parametrize("length", [1, 19])
@pytest.mark.parametrize("kind, method", CASES)
def test_agrees_with_float64_loop(kind, method, length):
  args = arguments(length, kind=kind)
  initial = np.random.default_rng(1).normal(size=(M, P, S))
  reset = np.arange(length) % 11 == 5
  reverse = length == 19
  expected = loop(**args, initial=initial, reset=reset, reverse=reverse)
  args |= {"initial": initial, "reset": reset}
  options = {"method": method, "chunk": 8, "reverse": reverse}
  with jax.enable_x64(True):
    got = run(jax.tree.map(jnp.asarray, args), **options)
    assert all(error(x, e) < 1e-12 for x, e in zip(got, expected, strict=True))
  if length == 1:
    return
  single = jax.tree.map(
    lambda x: jnp.asarray(x, None if x.dtype == bool else jnp.float32), args
  )
  got = run(single, **options)
  assert all(error(x, e) < 1e-5 for x, e in zip(got, expected, strict=True))


@pytest.mark.parametrize("kind", ["scalar", "diagonal"])
def test_step_equals_scan(kind):
  args = jax.tree.map(jnp.float32, arguments(9, kind=kind))
  y, final = run(args, method="sequential")
  rate = args.pop("rate")
  state = jnp.zeros((M, P, S))
  for t in range(9):
    token = {name: x[t] for name, x in args.items()}
    out, state = scan.step(state, rate=rate, **token)
    np.testing.assert_allclose(out, y[t], rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(state, final, rtol=1e-5, atol=1e-6)


def test_matches_scipy_filter_and_discretisation():
  # With constant step, B and C the recurrence is a linear filter.
  dt, a, b, c = 0.3, -0.7, 1.3, 0.8
  system = (np.array([[a]]), np.array([[b]]), np.array([[c]]), np.zeros((1, 1)))
  decay, gain, *_ = scipy.signal.cont2discrete(system, dt, method="zoh")
  u = np.random.default_rng(0).normal(size=(50, 1, 1))
  expected = scipy.signal.lfilter(
    c * gain.ravel(), [1.0, -decay.item()], u[:, 0, 0]
  )
  full = functools.partial(jnp.full, dtype=jnp.float32)
  args = {"u": jnp.float32(u), "rate": full((1, 1), a)}
  args |= {n: full((50, 1), x) for n, x in (("dt", dt), ("b", b), ("c", c))}
  y, _ = run(args, method="chunked", chunk=16)
  np.testing.assert_allclose(y[:, 0, 0], expected, rtol=1e-5, atol=1e-6)


def test_equals_the_semiseparable_matrix():
  # SSD: y = (L o C B^T) X with L_ij = exp(sum of log-decays j+1 ... i).
  args = arguments(20)
  log_decay = args["dt"] * args["rate"][:, 0]
  gain = np.expm1(log_decay) / args["rate"][:, 0]
  total = np.cumsum(log_decay, axis=0)
  mask = np.exp(total[:, None] - total[None]) * np.tri(20)[:, :, None]
  matrix = mask * (args["c"] @ args["b"].T)[:, :, None]
  expected = np.einsum("ijm,jmp->imp", matrix, gain[:, :, None] * args["u"])
  y, _ = run(jax.tree.map(jnp.float32, args), method="chunked", chunk=8)
  assert error(y, expected) < 1e-5


def test_reset_forgets_the_past():
  args = jax.tree.map(jnp.float32, arguments(12))
  other = args | {"u": args["u"].at[:7].multiply(-3.0)}
  for method in scan.METHODS:
    for token, forgotten in ((7, True), (6, False)):
      reset = {"reset": jnp.arange(12) == token}
      y, _ = run(args | reset, method=method, chunk=4)
      changed, _ = run(other | reset, method=method, chunk=4)
      assert np.allclose(y[7:], changed[7:], atol=1e-7) == forgotten


def test_composition_is_associative():
  rng = np.random.default_rng(0)
  f, g, h = (tuple(rng.normal(size=(2, 100))) for _ in range(3))
  left = scan._compose(scan._compose(f, g), h)
  right = scan._compose(f, scan._compose(g, h))
  np.testing.assert_allclose(left, right, rtol=1e-12)
  # It is not commutative, so the order of tokens matters.
  assert not np.allclose(scan._compose(f, g)[1], scan._compose(g, f)[1])


def test_gated_leaky_integrator():
  # S = 1, A = -1, B = 1 and dt = softplus(z) is h <- (1 - g) h + g u with
  # g = sigmoid(z) (Gu & Dao 2023, theorem 1).
  z = jnp.linspace(-8.0, 8.0, 33)
  log_decay, gain = scan.discretise(jax.nn.softplus(z), -jnp.ones_like(z))
  np.testing.assert_allclose(gain, jax.nn.sigmoid(z), rtol=1e-5)
  np.testing.assert_allclose(jnp.exp(log_decay), 1 - gain, rtol=1e-4)


@pytest.mark.parametrize("kind, method", CASES)
def test_gradients_agree_with_loop(kind, method):
  args = arguments(21, kind=kind)
  args["initial"] = np.ones((M, P, S))
  probe = np.random.default_rng(5).normal(size=(21, M, P))

  def value(arrays, method):
    y, final = scan.selective_scan(**arrays, method=method, chunk=8)
    return jnp.sum(y * probe) + jnp.sum(final**2)

  with jax.enable_x64(True):
    arrays = jax.tree.map(jnp.asarray, args)
    got = jax.jit(jax.grad(functools.partial(value, method=method)))(arrays)
  rng = np.random.default_rng(6)
  for name in args:
    # Central differences of the numpy loop along one random direction.
    direction = rng.normal(size=args[name].shape)

    def shifted(h, name=name, direction=direction):
      y, final = loop(**(args | {name: args[name] + h * direction}))
      return np.sum(y * probe) + np.sum(final**2)

    expected = (shifted(1e-5) - shifted(-1e-5)) / 2e-5
    np.testing.assert_allclose(
      np.sum(np.asarray(got[name]) * direction), expected, rtol=1e-6
    )


def test_gain_is_accurate_for_tiny_and_huge_steps():
  dt = jnp.array([0.0, 1e-30, 1e-12, 1e-6, 1e-3, 0.02, 0.2, 1.0, 30.0, 1e3])
  rate = jnp.full_like(dt, -2.0)

  def gain(dt, rate):
    return scan.discretise(dt, rate)[1]

  x = np.asarray(dt, np.float64)
  np.testing.assert_allclose(gain(dt, rate), -np.expm1(-2 * x) / 2, rtol=1e-6)
  d_dt = jax.vmap(jax.grad(gain))(dt, rate)
  np.testing.assert_allclose(d_dt, np.exp(-2 * x), rtol=1e-5, atol=1e-7)
  d_rate = jax.vmap(jax.grad(gain, argnums=1))(dt, rate)
  # d/dA of (exp(dt A) - 1) / A; its leading term is dt^2 / 2.
  exact = (x * -2 * np.exp(-2 * x) - np.expm1(-2 * x)) / 4
  exact = np.where(x < 1e-3, x**2 / 2, exact)
  np.testing.assert_allclose(d_rate, exact, rtol=3e-3, atol=1e-37)


@pytest.mark.parametrize("method", scan.METHODS)
def test_any_step_size(method):
  args = arguments(19)
  args["dt"][::4] = 1e3
  args["dt"][1::4] = 1e-6
  args["dt"][2::8] = 0.0
  expected, _ = loop(**args)

  @jax.jit
  @functools.partial(jax.grad, has_aux=True)
  def gradient(arrays):
    y, _ = scan.selective_scan(**arrays, method=method, chunk=8)
    return jnp.sum(y), y

  grads, y = gradient(jax.tree.map(jnp.float32, args))
  assert error(y, expected) < 1e-5
  assert all(bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(grads))


def peak_state(rule, dt_max, *, seed=0):
  """Largest |h| reached under inputs of size 1 and adversarial signs."""
  rng = np.random.default_rng(seed)
  length, a = 400, 0.5
  dt = jnp.asarray(rng.uniform(0, dt_max, (length, 1)), jnp.float32)
  ones = jnp.ones((length, 1))
  # Constant sign is the worst input for a positive kernel; the last entries
  # flip it, which must not overshoot either.
  u = ones.at[-5:].set(-1.0)[:, :, None]
  args = {"u": u, "dt": dt, "rate": jnp.full((1, 1), -a), "b": ones, "c": ones}
  y, _ = run(args, rule=rule, method="chunked")
  return float(jnp.abs(y).max()), 1 / a


@pytest.mark.parametrize("dt_max", [1e-2, 1.0, 1e3])
def test_zoh_state_is_bounded_for_all_steps(dt_max):
  # Theorem 3 (ii): |h| <= max(|h_0|, sup |B u| / a), reached, not exceeded.
  peak, bound = peak_state("zoh", dt_max)
  assert peak <= bound * (1 + 1e-5)
  if dt_max >= 1:
    assert peak >= 0.999 * bound


def test_euler_state_is_not_uniformly_bounded():
  # Negative control: Euler's gain dt grows without limit ...
  peak, bound = peak_state("euler", 1e3)
  assert peak > 100 * bound
  # ... as far as 1 / a + dt_max.
  assert peak <= (bound + 1e3) * (1 + 1e-5)


def test_initial_states_contract():
  args = jax.tree.map(jnp.float32, arguments(30, scale=0.1))
  args["c"] = jnp.zeros_like(args["c"])
  starts = np.random.default_rng(2).normal(size=(2, M, P, S))
  finals = [
    run(args | {"initial": jnp.float32(h)}, method="chunked")[1] for h in starts
  ]
  gap = np.asarray(finals[0] - finals[1])
  decay = np.exp(np.sum(args["dt"] * args["rate"].T, axis=0))
  expected = decay[:, None, None] * (starts[0] - starts[1])
  np.testing.assert_allclose(gap, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", scan.METHODS)
def test_bf16_inputs_keep_a_float32_state(method):
  args = arguments(90, scale=1e-2)
  half = jax.tree.map(jnp.bfloat16, args)
  rounded = jax.tree.map(lambda x: np.asarray(x, np.float64), half)
  y, final = run(half, method=method, chunk=16)
  expected_y, expected_final = loop(**rounded)
  assert y.dtype == jnp.bfloat16 and final.dtype == jnp.float32
  assert error(y, expected_y) < 1e-2  # rounding of the output
  assert error(final, expected_final) < 1e-5  # none in the state


def test_chunks_save_memory():
  args = jax.tree.map(jnp.float32, arguments(128))

  def temporary(chunk):
    def value(arrays):
      y, _ = scan.selective_scan(**arrays, method="associative", chunk=chunk)
      return jnp.sum(y**2)

    compiled = jax.jit(jax.grad(value)).lower(args).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  assert temporary(8) < temporary(128) / 2


def test_refuses_unknown_options():
  args = jax.tree.map(jnp.float32, arguments(4, kind="diagonal"))
  with pytest.raises(UserError, match="method='parallel'"):
    run(args, method="parallel")
  with pytest.raises(UserError, match="rule='bilinear'"):
    run(args, method="sequential", rule="bilinear")
  with pytest.raises(UserError, match="use 'associative'"):
    run(args, method="chunked")
