"""Losses against loops; permuted slots and degenerate inputs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spectraldiffusion_jax import losses
from spectraldiffusion_jax.errors import UserError
from spectraldiffusion_jax.ops import graph as graphs
from spectraldiffusion_jax.ops import noise

B, K, N, E, J = 2, 4, 12, 3, 5


def attention(seed=0, shape=(B, K, N), *, concentration=1.0):
  rng = np.random.default_rng(seed)
  raw = rng.gamma(concentration, size=shape)
  return raw / raw.sum(-2, keepdims=True)


def blocks(sizes=(4, 4, 4), inside=1.0, between=0.01):
  """Weights of a graph of dense blocks, zero diagonal."""
  label = np.repeat(np.arange(len(sizes)), sizes)
  weight = np.where(label[:, None] == label[None], inside, between)
  np.fill_diagonal(weight, 0.0)
  return weight, label


def dense(weight, batch=1):
  return graphs.DenseGraph(jnp.float32(np.stack([weight] * batch)))


def prior(seed=0):
  rng = np.random.default_rng(seed)
  return {
    "prior_mean": jnp.float32(rng.normal(size=(J, E))),
    "prior_log_variance": jnp.float32(rng.normal(size=(J, E))),
    "prior_logits": jnp.float32(rng.normal(size=J)),
  }


def posteriors(seed=1):
  rng = np.random.default_rng(seed)
  return tuple(
    jnp.float32(x)
    for x in (
      rng.normal(size=(B, K, E)),
      rng.uniform(0.1, 2.0, size=(B, K, E)),
      rng.dirichlet(np.ones(K), size=B),
    )
  )


def test_diffusion_weighs_examples():
  prediction = jnp.stack([jnp.zeros((N, 2)), jnp.ones((N, 2))])
  target = jnp.full((B, N, 2), 2.0)
  # Squared errors 4 and 1, weights 1 and 5: the mean of 4 and 5.
  value = losses.diffusion(prediction, target, jnp.array([1.0, 5.0]))
  np.testing.assert_allclose(value, 4.5)
  half = losses.diffusion(prediction.astype(jnp.bfloat16), target, jnp.ones(2))
  assert half.dtype == jnp.float32
  # The mixture decoder's plain error is the same with all weights 1.
  plain = losses.diffusion(prediction, target, jnp.ones(2))
  np.testing.assert_allclose(plain, 2.5)


def test_diffusion_agrees_with_v_loss():
  # The default weight, written for x_0, is clip(SNR, 1, 5) / (1 + SNR) on v.
  keys = jax.random.split(jax.random.key(0), 3)
  x0, eps, wrong = (jax.random.normal(k, (B, N, 2)) for k in keys)
  alpha, sigma = noise.cosine(jnp.array([0.2, 0.7]))
  x = noise.add_noise(x0, eps, alpha, sigma)
  value = losses.diffusion(
    noise.to_x0(wrong, x, alpha, sigma),
    x0,
    noise.loss_weight(alpha, sigma),
  )
  v = noise.target(x0, eps, alpha, sigma)
  weight = noise.loss_weight(alpha, sigma, kind="v")
  expected = jnp.mean(weight * jnp.mean((wrong - v) ** 2, axis=(1, 2)))
  np.testing.assert_allclose(value, expected, rtol=1e-5)


def test_gmm_prior_matches_loops():
  mean, variance, weight = posteriors()
  p = {name: np.float64(x) for name, x in prior().items()}
  w = np.exp(p["prior_logits"]) / np.exp(p["prior_logits"]).sum()
  expected = 0.0
  for i in range(B):
    for k in range(K):
      inner = 0.0
      for j in range(J):
        tau = np.maximum(np.exp(p["prior_log_variance"][j]), 0.01)
        shift = (np.float64(mean[i, k]) - p["prior_mean"][j]) ** 2
        ratio = np.float64(variance[i, k]) / tau
        kl = 0.5 * np.sum(ratio + shift / tau - 1 - np.log(ratio))
        inner += w[j] * np.exp(-kl)
      expected -= float(weight[i, k]) * np.log(inner) / E / B
  value = losses.gmm_prior(mean, variance, weight, **prior())
  np.testing.assert_allclose(value, expected, rtol=1e-5)


def test_gmm_prior_bounds_the_divergence():
  # Against a Monte-Carlo estimate of sum_k pi_k KL(q_k || p) / E.
  rng = np.random.default_rng(0)
  mean, variance, weight = (np.float64(x) for x in posteriors())
  p = {name: np.float64(x) for name, x in prior().items()}
  log_w = p["prior_logits"] - np.log(np.exp(p["prior_logits"]).sum())
  noise_ = rng.normal(size=(4000, B, K, E))
  x = mean + np.sqrt(variance) * noise_
  log_q = -0.5 * np.sum(noise_**2 + np.log(2 * np.pi * variance), -1)
  tau = np.exp(p["prior_log_variance"])
  shift = (x[..., None, :] - p["prior_mean"]) ** 2 / tau
  log_p = log_w - 0.5 * np.sum(shift + np.log(2 * np.pi * tau), -1)
  log_p = np.log(np.exp(log_p).sum(-1))
  exact = np.mean(np.sum(weight * (log_q - log_p).mean(0), -1)) / E
  bound = float(losses.gmm_prior(*posteriors(), **prior()))
  assert exact - 0.01 < bound < exact + 0.5


def test_gmm_prior_is_zero_on_its_own_component():
  p = prior() | {"prior_logits": jnp.array([0.0, -40, -40, -40, -40])}
  mean = jnp.broadcast_to(p["prior_mean"][0], (1, 1, E))
  variance = jnp.broadcast_to(jnp.exp(p["prior_log_variance"][0]), (1, 1, E))
  value = losses.gmm_prior(mean, variance, jnp.ones((1, 1)), **p)
  np.testing.assert_allclose(value, 0.0, atol=1e-6)


def test_modularity_matches_newman():
  # Hard partition: Q = sum_c (in_c / 2m - (vol_c / 2m)^2).
  weight, _ = blocks((5, 3, 4))
  label = np.random.default_rng(0).integers(3, size=N)
  mass = weight.sum()
  expected = sum(
    weight[np.ix_(label == c, label == c)].sum() / mass
    - (weight[label == c].sum() / mass) ** 2
    for c in range(3)
  )
  hard = jnp.float32(np.arange(K)[:, None] == label)[None]
  value = losses.spectral_consistency(hard, dense(weight))
  np.testing.assert_allclose(value, -expected, rtol=1e-5)


def test_modularity_prefers_the_truth():
  # Three blocks, six slots: neither one slot for all nor split blocks win.
  weight, label = blocks()
  graph = dense(weight)

  def loss(labels):
    hard = jnp.float32(np.arange(6)[:, None] == labels)[None]
    return float(losses.spectral_consistency(hard, graph))

  split = 2 * label + np.arange(N) % 2
  assert loss(label) < loss(split) < loss(np.zeros(N))
  assert abs(loss(np.zeros(N))) < 1e-6


def test_landmark_graph_equals_its_dense_matrix():
  factor = np.random.default_rng(0).uniform(size=(1, N, 3))
  factor /= np.sqrt(factor @ factor.sum(1)[..., None])  # row sums of order 1
  weight = factor[0] @ factor[0].T
  soft = jnp.float32(attention(shape=(1, K, N)))
  part = graphs.Landmarks(
    index=jnp.broadcast_to(jnp.arange(3), (1, N, 3)),
    weight=jnp.float32(factor),
    total=jnp.float32(factor.sum(1)),
  )
  landmark = graphs.LandmarkGraph((part,))
  for graph in (landmark, dense(weight)):
    value = losses.spectral_consistency(soft, graph, gamma=1.5)
    a = np.float64(soft[0])
    mass = weight.sum()
    volume = a @ weight.sum(1)
    q = (np.trace(a @ weight @ a.T) - 1.5 * volume @ volume / mass) / mass
    np.testing.assert_allclose(value, -q, rtol=1e-5)


def test_modularity_gradient_is_exact_and_spares_the_graph():
  weight, _ = blocks()
  weight = jnp.float32(weight)
  soft = jnp.float32(attention(shape=(1, K, N)))

  def plain(a, w):
    mass = jnp.sum(w)
    volume = a[0] @ jnp.sum(w, 1)
    return -(jnp.trace(a[0] @ w @ a[0].T) - volume @ volume / mass) / mass

  def ours(a, w):
    return losses.spectral_consistency(a, graphs.DenseGraph(w[None]))

  expected = jax.grad(plain)(soft, weight)
  got, graph = jax.grad(ours, argnums=(0, 1))(soft, weight)
  np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-6)
  assert float(jnp.abs(graph).max()) == 0
  assert float(jnp.abs(jax.grad(plain, argnums=1)(soft, weight)).max()) > 0


def test_anchor_is_least_at_the_clusters():
  label = np.random.default_rng(0).integers(K, size=(B, N))
  hard = jnp.float32(np.arange(K)[:, None] == label[:, None])
  soft = jnp.float32(attention())
  assert losses.anchor(hard, hard) < 1e-5 < losses.anchor(soft, hard)
  expected = -np.mean(
    [np.log(soft[i, label[i, n], n]) for i in range(B) for n in range(N)]
  )
  np.testing.assert_allclose(losses.anchor(soft, hard), expected, rtol=1e-4)


def test_diversity_values():
  # Pairs: equal (cos 1), orthogonal (0), and equal but inactive.
  slots = jnp.array([[[2.0, 0], [3.0, 0], [0, 1.0], [2.0, 0]]])
  weight = jnp.array([[0.25, 0.25, 0.5, 0.0]])
  active = jnp.array([[True, True, True, False]])
  value = losses.diversity(slots, weight, active)
  # One pair of three is above the margin: sqrt(.25 * .25) * (1 - .3) / 3.
  np.testing.assert_allclose(value, 0.25 * 0.7 / 3, rtol=1e-5)
  far = jnp.eye(4)[None]
  assert losses.diversity(far, weight, active) == 0


SLOT_LOSSES = {
  "gmm_prior": lambda a, m, v, w: losses.gmm_prior(m, v, w, **prior()),
  "spectral_consistency": lambda a, m, v, w: losses.spectral_consistency(
    a, dense(blocks()[0], batch=B)
  ),
  "anchor": lambda a, m, v, w: losses.anchor(a, a**2),
  "diversity": lambda a, m, v, w: losses.diversity(m, w, w > 0),
}


@pytest.mark.parametrize("name", SLOT_LOSSES)
def test_slots_permute(name):
  arrays = (jnp.float32(attention()), *posteriors())
  order = jnp.array([2, 0, 3, 1])
  moved = (x[:, order] for x in arrays)
  expected = SLOT_LOSSES[name](*arrays)
  np.testing.assert_allclose(SLOT_LOSSES[name](*moved), expected, rtol=1e-5)
  assert expected.shape == () and expected.dtype == jnp.float32


def degenerate(case):
  mean, variance, weight = posteriors()
  a = jnp.float32(attention())
  first = jnp.zeros((B, K)).at[:, 0].set(1.0)
  if case == "one-hot":
    a = jnp.float32(np.arange(K)[:, None] == np.arange(N) % K)
    a = jnp.broadcast_to(a, (B, K, N))
  elif case == "empty slots":
    a = jnp.broadcast_to(first[:, :, None], (B, K, N))
    weight = first
  elif case == "constant image":
    a, mean = jnp.full((B, K, N), 1 / K), jnp.zeros((B, K, E))
    variance = jnp.full((B, K, E), 1e-6)
  return a, mean, variance, weight


@pytest.mark.parametrize("case", ["one-hot", "empty slots", "constant image"])
@pytest.mark.parametrize("name", SLOT_LOSSES)
def test_degenerate_inputs_have_finite_gradients(case, name):
  value, grads = jax.value_and_grad(SLOT_LOSSES[name], argnums=(0, 1, 2, 3))(
    *degenerate(case)
  )
  assert bool(jnp.isfinite(value))
  assert all(bool(jnp.isfinite(g).all()) for g in grads)


def test_graph_without_edges():
  value, grad = jax.value_and_grad(losses.spectral_consistency)(
    jnp.float32(attention(shape=(1, K, N))), dense(np.zeros((N, N)))
  )
  assert float(value) == 0 and bool(jnp.isfinite(grad).all())


def test_total_weighs_and_logs_unweighted():
  terms = {"diffusion": jnp.array(2.0), "gmm_prior": jnp.array(3.0)}
  weights = {"diffusion": 1.0, "gmm_prior": 0.01, "diversity": 0.0}
  loss, log = losses.total(terms, weights)
  np.testing.assert_allclose(loss, 2.03, rtol=1e-6)
  assert log == terms
  # Weight 0 switches a term off altogether.
  broken = terms | {"diversity": jnp.array(jnp.nan)}
  np.testing.assert_allclose(losses.total(broken, weights)[0], 2.03, rtol=1e-6)


def test_total_refuses_bad_names():
  one = {"diffusion": jnp.array(2.0)}
  total = functools.partial(losses.total, one)
  with pytest.raises(UserError, match="loss_weights.diffusion is missing"):
    total({})
  with pytest.raises(UserError, match="loss_weights.difusion"):
    total({"diffusion": 1.0, "difusion": 1.0})
  with pytest.raises(UserError, match="named 'loss'"):
    losses.total({"loss": jnp.array(1.0)}, {"loss": 1.0})
  with pytest.raises(UserError, match="two losses are named 'diffusion'"):
    losses.merge(one, one)
  assert losses.merge(one, {"b": jnp.array(1.0)}).keys() == {"diffusion", "b"}
