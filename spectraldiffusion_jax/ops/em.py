"""Tempered MAP-EM of a diagonal Gaussian mixture: the core of slot updates.

Tokens x_n in R^E are keys; slot k is a component (mean mu_k, variance s_k,
weight pi_k). With temperature tau, pseudo-count nu on a prior variance s_0
and Dirichlet parameter alpha on the weights, one round is

  E   l_nk = log pi_k + (1/tau) log N(x_n; mu_k, s_k),  A_n = softmax_k l_nk
  M   mu_k <- mu_k + g_k (m_k - mu_k),   m_k = sum_n A_nk x_n / n_k
      s_k  <- max((sum_n A_nk (x_n - mu_k)^2 + nu s_0) / (n_k + nu), floor)
      pi_k <- (n_k + alpha - 1) / (N + K (alpha - 1)),   n_k = sum_n A_nk

where g in [0, 2] is a gate and the variance uses the new mean. No round
lowers `free_energy` (docs/theory.md, theorem 2), and g = 1, tau = 1, nu = 0,
alpha = 1 is plain EM (Dempster et al. 1977). Slots that are not `active`
take no token. One image; batch with jax.vmap.
"""

import functools
import math
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

# TPUs and GPUs round the inputs of float32 products unless told not to.
_einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
Scalar: TypeAlias = float | Float[Array, ""]
_MASKED = -1e30
_EPSILON = 1e-8
"""Pseudo-count that keeps empty slots where they are."""
_LEAST_VARIANCE = 1e-6
_LEAST_WEIGHT = 1e-30


class Mixture(NamedTuple):
  """A diagonal Gaussian mixture."""

  mean: Float[Array, "K E"]
  variance: Float[Array, "K E"]
  weight: Float[Array, " K"]


def _float32(*arrays):
  """Half precision raised to float32; float64 kept."""
  return tuple(
    x.astype(jnp.promote_types(x.dtype, jnp.float32)) for x in arrays
  )


def prior_variance(keys: Float[Array, "N E"]) -> Float[Array, " E"]:
  """Variance s_0 of each key dimension over the image, without gradient.

  At least 1e-6, so that constant images have finite likelihoods.
  """
  (keys,) = _float32(keys)
  variance = jnp.maximum(jnp.var(keys, axis=0), _LEAST_VARIANCE)
  return jax.lax.stop_gradient(variance)


def _log_density(keys, mean, variance):
  """Log-density log N(x_n; mu_k, s_k), [K N], from two matrix products.

  x^2/s - 2 x mu/s + mu^2/s cancels when the keys lie far from 0, so they are
  centred first: the density only sees differences.
  """
  centre = jax.lax.stop_gradient(jnp.mean(keys, axis=0, keepdims=True))
  x, mean = keys - centre, mean - centre
  precision = 1 / variance
  distance = (
    _einsum("KE,NE->KN", precision, x**2)
    - 2 * _einsum("KE,NE->KN", precision * mean, x)
    + jnp.sum(precision * mean**2, axis=1, keepdims=True)
  )
  volume = jnp.sum(jnp.log(variance), axis=1, keepdims=True)
  constant = keys.shape[1] * math.log(2 * math.pi)
  return -0.5 * (jnp.maximum(distance, 0.0) + volume + constant)


def e_step(
  keys: Float[Array, "N E"],
  mean: Float[Array, "K E"],
  variance: Float[Array, "K E"],
  weight: Float[Array, " K"],
  active: Bool[Array, " K"],
  *,
  tau: Scalar = 2.0,
) -> tuple[Float[Array, "K N"], Float[Array, ""]]:
  """Responsibilities of slots for tokens.

  Args:
    keys: tokens x.
    mean: mu.
    variance: s > 0.
    weight: pi; 0 is allowed.
    active: False for slots that take no token.
    tau: temperature >= 1; log-likelihood gaps grow with E, so 1 makes
      responsibilities one-hot from the first round.

  Returns:
    A [K N], columns summing to 1 over active slots (all 0 if none is), and
    the mean over tokens of log sum_k exp l_nk: at tau = 1 the log-likelihood.
  """
  keys, mean, variance, weight = _float32(keys, mean, variance, weight)
  log_weight = jnp.log(jnp.maximum(weight, _LEAST_WEIGHT))[:, None]
  logits = log_weight + _log_density(keys, mean, variance) / tau
  logits = jnp.where(active[:, None], logits, _MASKED)
  attention = jax.nn.softmax(logits, axis=0) * active[:, None]
  return attention, jnp.mean(jax.nn.logsumexp(logits, axis=0))


def _second_moments(keys, attention, mean):
  """sum_n A_nk (x_n - mu_k)^2 and sum_n A_nk (x_n - mu_k), both [K E]."""
  centre = jax.lax.stop_gradient(jnp.mean(keys, axis=0, keepdims=True))
  x, mean = keys - centre, mean - centre
  count = jnp.sum(attention, axis=1, keepdims=True)
  first = _einsum("KN,NE->KE", attention, x)
  second = _einsum("KN,NE->KE", attention, x**2)
  scatter = second - 2 * first * mean + count * mean**2
  return jnp.maximum(scatter, 0.0), first - count * mean


def m_step(
  keys: Float[Array, "N E"],
  attention: Float[Array, "K N"],
  mean: Float[Array, "K E"],
  active: Bool[Array, " K"],
  *,
  prior: Float[Array, " E"],
  gate: float | Float[Array, "K E"] = 1.0,
  nu: Scalar = 10.0,
  alpha: Scalar = 1.0,
  floor: Scalar = 0.05,
) -> Mixture:
  """The gated M-step; a slot without tokens keeps its mean.

  Args:
    keys: tokens x.
    attention: responsibilities A.
    mean: mu before the step.
    active: False for slots whose weight is 0.
    prior: s_0, see `prior_variance`.
    gate: g in [0, 2]; 1 is the full step.
    nu: pseudo-count of s_0. Variances from N / K tokens are under-estimates
      without it.
    alpha: Dirichlet parameter of the weights; below 1 it removes slots with
      fewer than 1 - alpha tokens (Figueiredo & Jain 2002).
    floor: least variance, in units of s_0.

  Returns:
    The new mixture.
  """
  keys, attention, old = _float32(keys, attention, mean)
  count = jnp.sum(attention, axis=1)
  _, towards = _second_moments(keys, attention, old)
  # m_k - mu_k, so that an empty slot moves by exactly 0.
  new = old + gate * (towards / (count + _EPSILON)[:, None])
  scatter, _ = _second_moments(keys, attention, new)
  pseudo = nu + _EPSILON
  variance = (scatter + pseudo * prior[None]) / (count + pseudo)[:, None]
  variance = jnp.maximum(variance, floor * prior[None])
  weight = jnp.maximum(count + (alpha - 1), 0.0) * active
  weight = weight / jnp.maximum(jnp.sum(weight), _LEAST_WEIGHT)
  return Mixture(mean=new, variance=variance, weight=weight)


def initial_m_step(
  attention: Float[Array, "K N"],
  keys: Float[Array, "N E"],
  active: Bool[Array, " K"],
  *,
  prior: Float[Array, " E"],
  nu: Scalar = 10.0,
  alpha: Scalar = 1.0,
  floor: Scalar = 0.05,
) -> Mixture:
  """The mixture of given responsibilities, such as spectral clusters.

  A is taken without gradient; gradients reach the keys through the averages.
  Empty slots start at the mean of all tokens.
  """
  attention = jax.lax.stop_gradient(attention)
  centre = jnp.broadcast_to(
    jnp.mean(keys, axis=0), (attention.shape[0], keys.shape[1])
  )
  return m_step(
    keys,
    attention,
    centre,
    active,
    prior=prior,
    nu=nu,
    alpha=alpha,
    floor=floor,
  )


def pool(
  attention: Float[Array, "K N"], values: Float[Array, "N D"]
) -> Float[Array, "K D"]:
  """Mean value of each slot's tokens, 0 for an empty slot."""
  attention, values = _float32(attention, values)
  count = jnp.sum(attention, axis=1, keepdims=True)
  return _einsum("KN,ND->KD", attention, values) / (count + _EPSILON)


def free_energy(
  keys: Float[Array, "N E"],
  attention: Float[Array, "K N"],
  mixture: Mixture,
  active: Bool[Array, " K"],
  *,
  prior: Float[Array, " E"],
  tau: Scalar = 2.0,
  nu: Scalar = 10.0,
  alpha: Scalar = 1.0,
) -> Float[Array, ""]:
  """F(A, theta), the quantity that neither `e_step` nor `m_step` lowers.

  F = sum_nk A_nk (log pi_k + log N(x_n; mu_k, s_k) / tau - log A_nk)
      + (alpha - 1) sum_k log pi_k
      - nu / (2 tau) sum_kj (log s_kj + s_0j / s_kj)

  (Neal & Hinton 1998), over active slots.
  """
  keys, attention, mean, variance, weight = _float32(keys, attention, *mixture)
  log_weight = jnp.log(jnp.maximum(weight, _LEAST_WEIGHT))
  joint = log_weight[:, None] + _log_density(keys, mean, variance) / tau
  tokens = attention * joint + jax.scipy.special.entr(attention)
  penalty = jnp.sum(jnp.log(variance) + prior[None] / variance, axis=1)
  slots = (alpha - 1) * log_weight - (nu + _EPSILON) / (2 * tau) * penalty
  return jnp.sum(tokens) + jnp.sum(jnp.where(active, slots, 0.0))
