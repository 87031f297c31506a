import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.mixture import GaussianMixture

from spectraldiffusion_jax.ops import em

N, K, E = 120, 5, 6
ACTIVE = jnp.ones(K, bool)


def tokens(seed=0, *, clusters=3, spread=1.0, shape=(N, E)):
  """Overlapping Gaussian clusters with unequal spreads."""
  rng = np.random.default_rng(seed)
  centres = 2 * rng.normal(size=(clusters, shape[1]))
  scales = spread * rng.uniform(0.5, 1.5, size=(clusters, shape[1]))
  label = rng.integers(clusters, size=shape[0])
  return centres[label] + scales[label] * rng.normal(size=shape)


def start(seed=0, *, slots=K, width=E):
  rng = np.random.default_rng(seed + 100)
  return em.Mixture(
    mean=2 * rng.normal(size=(slots, width)),
    variance=rng.uniform(0.5, 2.0, size=(slots, width)),
    weight=rng.dirichlet(np.full(slots, 5.0)),
  )


def reference_e_step(keys, mixture, tau):
  """Responsibilities and log-likelihood by float64 loops over slots."""
  logits = np.stack(
    [
      np.log(w)
      - 0.5 * np.sum((keys - m) ** 2 / v + np.log(2 * np.pi * v), 1) / tau
      for m, v, w in zip(*mixture, strict=True)
    ]
  )
  top = logits.max(0)
  total = np.exp(logits - top).sum(0)
  return np.exp(logits - top) / total, np.mean(top + np.log(total))


e_step = jax.jit(em.e_step)
m_step = jax.jit(em.m_step, static_argnames=("alpha", "floor"))
prior_variance = jax.jit(em.prior_variance)


@functools.partial(jax.jit, static_argnames=("alpha", "rounds"))
def refine(keys, mixture, gates, untie, *, tau, nu, alpha, rounds=8):
  """F after every round; `untie` maps means before they meet the keys."""
  prior = em.prior_variance(keys)
  active = jnp.ones(mixture.weight.shape, bool)
  energies = []
  for t in range(rounds):
    query = mixture.mean @ untie
    attention, _ = em.e_step(keys, query, *mixture[1:], active, tau=tau)
    options = {"prior": prior, "nu": nu, "alpha": alpha}
    if t:
      energies.append(
        em.free_energy(keys, attention, mixture, active, tau=tau, **options)
      )
    mixture = em.m_step(
      keys, attention, mixture.mean, active, gate=gates[t], **options
    )
  return jnp.stack(energies)


@pytest.mark.parametrize("tau", [1.0, 2.0])
@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_e_step_matches_float64_loop(tau, offset):
  # Keys far from 0 are where the expanded square loses its digits.
  keys, mixture = np.float32(tokens() + offset), start()
  mixture = mixture._replace(mean=np.float32(mixture.mean + offset))
  expected, likelihood = reference_e_step(np.float64(keys), mixture, tau)
  attention, value = e_step(
    jnp.asarray(keys), *map(jnp.float32, mixture), ACTIVE, tau=tau
  )
  # A float32 near 1000 carries 6e-5, which the mean of keys inherits.
  tolerance = 2e-3 if offset else 1e-5
  np.testing.assert_allclose(attention, expected, atol=tolerance)
  np.testing.assert_allclose(value, likelihood, rtol=tolerance)
  np.testing.assert_allclose(jnp.sum(attention, 0), 1.0, rtol=1e-5)


def test_m_step_matches_float64_loop():
  keys, mixture = tokens(), start()
  attention = np.random.default_rng(1).dirichlet(np.ones(K), size=N).T
  gate = np.random.default_rng(2).uniform(size=(K, E))
  nu, alpha, floor = 3.0, 1.5, 1.0
  prior = keys.var(0)
  with jax.enable_x64(True):
    got = m_step(
      jnp.asarray(keys),
      jnp.asarray(attention),
      jnp.asarray(mixture.mean),
      ACTIVE,
      prior=jnp.asarray(prior),
      gate=jnp.asarray(gate),
      nu=nu,
      alpha=alpha,
      floor=floor,
    )
  clipped = 0
  for k in range(K):
    count = attention[k].sum()
    target = attention[k] @ keys / count
    mean = mixture.mean[k] + gate[k] * (target - mixture.mean[k])
    scatter = attention[k] @ (keys - mean) ** 2
    variance = (scatter + nu * prior) / (count + nu)
    clipped += np.sum(variance < floor * prior)
    np.testing.assert_allclose(got.mean[k], mean, rtol=1e-7, atol=1e-8)
    np.testing.assert_allclose(
      got.variance[k], np.maximum(variance, floor * prior), rtol=1e-7
    )
    weight = (count + alpha - 1) / (N + K * (alpha - 1))
    np.testing.assert_allclose(got.weight[k], weight, rtol=1e-12)
  assert 0 < clipped < K * E


def test_plain_em_equals_sklearn():
  keys, mixture = tokens(), start(3)
  model = GaussianMixture(
    K,
    covariance_type="diag",
    tol=0,
    max_iter=15,
    reg_covar=0,
    weights_init=mixture.weight,
    means_init=mixture.mean,
    precisions_init=1 / mixture.variance,
  )
  with pytest.warns(Warning, match="did not converge"):
    model.fit(keys)
  with jax.enable_x64(True):
    x, ours = jnp.asarray(keys), em.Mixture(*map(jnp.asarray, mixture))
    prior = prior_variance(x)
    for _ in range(15):
      attention, likelihood = e_step(x, *ours, ACTIVE, tau=1.0)
      ours = m_step(
        x, attention, ours.mean, ACTIVE, prior=prior, nu=0.0, floor=1e-9
      )
    np.testing.assert_allclose(likelihood, model.lower_bound_, rtol=1e-9)
    np.testing.assert_allclose(ours.mean, model.means_, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(ours.variance, model.covariances_, rtol=1e-5)
    np.testing.assert_allclose(ours.weight, model.weights_, rtol=1e-5)
    final, _ = e_step(x, *ours, ACTIVE, tau=1.0)
    np.testing.assert_allclose(final.T, model.predict_proba(keys), atol=1e-5)


def least_rise(energies):
  """Smallest change of F from round to round, relative to |F|."""
  energies = np.asarray(energies, np.float64)
  return np.min(np.diff(energies) / np.abs(energies[1:]))


@pytest.mark.parametrize("alpha", [1.0, 2.0])
def test_free_energy_never_falls(alpha):
  # Theorem 2, with more slots than clusters and any gates in [0, 2].
  for seed in range(12):
    rng = np.random.default_rng(seed)
    keys = tokens(seed, clusters=1 + seed % 4)
    gates = rng.uniform(0, 2 if seed % 2 else 1, size=(8, K, E))
    tau = (1.0, 2.0, E**0.5)[seed % 3]
    nu = (0.0, 10.0)[seed // 3 % 2]
    for x64, tolerance in ((True, 1e-9), (False, 1e-5)):
      with jax.enable_x64(x64):
        energies = refine(
          jnp.asarray(keys),
          em.Mixture(*map(jnp.asarray, start(seed))),
          jnp.asarray(gates),
          jnp.eye(E),
          tau=tau,
          nu=nu,
          alpha=alpha,
        )
        assert least_rise(energies) >= -tolerance, (seed, x64)


def fall(untie, gate):
  """Worst step of F over seeds, with given query map and gate."""
  worst = np.inf
  with jax.enable_x64(True):
    for seed in range(6):
      energies = refine(
        jnp.asarray(tokens(seed)),
        em.Mixture(*map(jnp.asarray, start(seed))),
        jnp.full((8, K, E), gate),
        jnp.asarray(untie),
        tau=2.0,
        nu=10.0,
        alpha=1.0,
      )
      worst = min(worst, least_rise(energies))
  return worst


def test_untied_queries_and_large_gates_break_it():
  # Negative controls: the assumptions of theorem 2 are needed.
  rotation = np.linalg.qr(np.random.default_rng(0).normal(size=(E, E)))[0]
  assert fall(np.eye(E), 1.0) > -1e-9
  assert fall(rotation, 1.0) < -5e-4
  assert fall(np.eye(E), 2.6) < -1e-3


def test_free_energy_value():
  # At the responsibilities of the E-step and tau = 1, nu = 0, alpha = 1 the
  # free energy is the log-likelihood.
  keys, mixture = tokens(), start()
  with jax.enable_x64(True):
    x, ours = jnp.asarray(keys), em.Mixture(*map(jnp.asarray, mixture))
    attention, likelihood = e_step(x, *ours, ACTIVE, tau=1.0)
    value = em.free_energy(
      x, attention, ours, ACTIVE, prior=prior_variance(x), tau=1.0, nu=0.0
    )
    np.testing.assert_allclose(value, N * likelihood, rtol=1e-7)
    # A: no other responsibilities do better.
    flat = jnp.full((K, N), 1 / K)
    other = em.free_energy(
      x, flat, ours, ACTIVE, prior=prior_variance(x), tau=1.0, nu=0.0
    )
    assert other < value


def test_inactive_slots_take_nothing():
  keys, mixture = jnp.float32(tokens()), start()
  ours = em.Mixture(*map(jnp.float32, mixture))
  active = jnp.array([True, False, True, False, True])
  attention, likelihood = e_step(keys, *ours, active, tau=2.0)
  assert bool((attention[~active] == 0).all())
  # As if the others did not exist.
  few = em.Mixture(*(x[active] for x in ours))
  expected, value = em.e_step(keys, *few, jnp.ones(3, bool), tau=2.0)
  np.testing.assert_allclose(attention[active], expected, atol=1e-6)
  np.testing.assert_allclose(likelihood, value, rtol=1e-6)
  new = m_step(
    keys, attention, ours.mean, active, prior=prior_variance(keys), alpha=2.0
  )
  np.testing.assert_array_equal(new.mean[~active], ours.mean[~active])
  assert bool((new.weight[~active] == 0).all())
  np.testing.assert_allclose(jnp.sum(new.weight), 1.0, rtol=1e-6)
  nobody, value = e_step(keys, *ours, jnp.zeros(K, bool), tau=2.0)
  assert float(nobody.sum()) == 0 and bool(jnp.isfinite(value))


def test_sparse_prior_removes_small_slots():
  attention = np.zeros((3, N))
  attention[0, :80] = attention[1, 80:-2] = attention[2, -2:] = 1.0
  keys = jnp.float32(tokens())
  new = m_step(
    keys,
    jnp.float32(attention),
    jnp.zeros((3, E)),
    jnp.ones(3, bool),
    prior=prior_variance(keys),
    alpha=-4.0,
  )
  np.testing.assert_allclose(new.weight, [75 / 108, 33 / 108, 0], rtol=1e-6)


def test_slots_permute():
  keys, mixture = jnp.float32(tokens()), start()
  ours = em.Mixture(*map(jnp.float32, mixture))
  order = jnp.array([3, 1, 4, 0, 2])
  moved = em.Mixture(*(x[order] for x in ours))
  a, _ = e_step(keys, *ours, ACTIVE, tau=2.0)
  b, _ = e_step(keys, *moved, ACTIVE, tau=2.0)
  np.testing.assert_allclose(b, a[order], atol=1e-6)


def test_initial_m_step_is_the_cluster_statistics():
  keys = tokens()
  label = np.random.default_rng(0).integers(3, size=N)
  attention = np.float32(np.arange(K)[:, None] == label)  # slots 3, 4 empty
  x = jnp.float32(keys)
  got = em.initial_m_step(
    jnp.asarray(attention),
    x,
    ACTIVE,
    prior=prior_variance(x),
    nu=0.0,
    floor=0.0,
  )
  for k in range(3):
    mine = keys[label == k]
    np.testing.assert_allclose(got.mean[k], mine.mean(0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(got.variance[k], mine.var(0), rtol=1e-4)
    np.testing.assert_allclose(got.weight[k], len(mine) / N, rtol=1e-6)
    np.testing.assert_allclose(
      em.pool(jnp.asarray(attention), x)[k], mine.mean(0), rtol=1e-4, atol=1e-5
    )
  np.testing.assert_allclose(
    got.mean[3:], keys.mean(0)[None].repeat(2, 0), 1e-4
  )
  np.testing.assert_allclose(got.variance[3:], keys.var(0)[None].repeat(2, 0))
  assert float(got.weight[3:].sum()) == 0


HARD = {
  "constant image": np.ones((10, E)),
  "one token": np.ones((1, E)),
  "two distinct tokens": np.repeat(np.eye(2, E), 5, axis=0),
  "far apart": np.repeat(1e3 * np.eye(2, E), 5, axis=0),
}


@jax.jit
@functools.partial(jax.value_and_grad, has_aux=True)
def whole_refinement(keys, active):
  prior = em.prior_variance(keys)
  # Everything in slot 0, as one spectral cluster would have it.
  attention = jnp.zeros((len(active), len(keys))).at[0].set(1.0)
  mixture = em.initial_m_step(attention, keys, active, prior=prior)
  for _ in range(2):
    attention, likelihood = em.e_step(keys, *mixture, active)
    mixture = em.m_step(keys, attention, mixture.mean, active, prior=prior)
  return likelihood + jnp.sum(em.pool(attention, keys)), attention


@pytest.mark.parametrize("name", HARD)
@pytest.mark.parametrize("slots", [1, 11])
def test_degenerate_images_stay_finite(name, slots):
  active = jnp.arange(slots) < max(1, slots - 2)
  (loss, attention), grad = whole_refinement(jnp.float32(HARD[name]), active)
  assert bool(jnp.isfinite(loss)) and bool(jnp.isfinite(grad).all())
  np.testing.assert_allclose(jnp.sum(attention, 0), 1.0, rtol=1e-5)


def test_gradient_matches_finite_differences():
  keys, mixture = tokens(shape=(20, E)), start()

  def value(keys, mean, tau):
    prior = 1.5 * jnp.ones(E)
    attention, _ = em.e_step(keys, mean, *mixture[1:], ACTIVE, tau=tau)
    new = em.m_step(keys, attention, mean, ACTIVE, prior=prior, gate=0.7)
    attention, likelihood = em.e_step(keys, *new, ACTIVE, tau=tau)
    return likelihood + jnp.sum(em.pool(attention, keys) ** 2)

  with jax.enable_x64(True):
    point = [jnp.asarray(keys), jnp.asarray(mixture.mean), jnp.asarray(2.0)]
    grads = jax.jit(jax.grad(value, argnums=(0, 1, 2)))(*point)
    function = jax.jit(value)
    for i, grad in enumerate(grads):
      step = np.random.default_rng(i).normal(size=grad.shape) * 1e-6
      up, down = list(point), list(point)
      up[i], down[i] = point[i] + step, point[i] - step
      expected = (function(*up) - function(*down)) / 2
      np.testing.assert_allclose(jnp.sum(grad * step), expected, rtol=1e-5)


def test_batches_by_vmap_and_raises_bf16():
  keys = jnp.stack([jnp.bfloat16(tokens(s)) for s in range(3)])
  ours = em.Mixture(*map(jnp.float32, start()))
  attention, _ = jax.jit(jax.vmap(lambda x: em.e_step(x, *ours, ACTIVE)))(keys)
  assert attention.dtype == jnp.float32 and attention.shape == (3, K, N)
  alone, _ = e_step(keys[1].astype(jnp.float32), *ours, ACTIVE)
  np.testing.assert_allclose(attention[1], alone, atol=1e-6)


def test_large_key_width_needs_the_temperature():
  # Why tau is there: at tau = 1 wide keys are one-hot in the first round.
  keys = jnp.float32(tokens(shape=(N, 64)))
  mixture = em.Mixture(*map(jnp.float32, start(width=64)))
  sharp, soft = (
    float(jnp.mean(jnp.max(e_step(keys, *mixture, ACTIVE, tau=t)[0], 0)))
    for t in (1.0, 8.0)
  )
  assert sharp > 0.95 and soft < 0.85
