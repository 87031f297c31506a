"""Training losses: each a pure function to one float32 scalar.

All are invariant to the order of slots and have finite values and gradients
on constant images, one-hot attention and empty slots.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from spectraldiffusion_jax.errors import UserError
from spectraldiffusion_jax.ops.graph import Graph

LEAST_PRIOR_VARIANCE = 1e-2
_EPSILON = 1e-6


def diffusion(
  prediction: Float[Array, "B *x"],
  target: Float[Array, "B *x"],
  weight: Float[Array, " B"],
) -> Float[Array, ""]:
  """Denoising error: mean over examples of weight * mean squared error.

  Args:
    prediction: of the clean latents x_0.
    target: clean latents x_0, scaled to unit variance.
    weight: see `ops.noise.loss_weight`; 1 gives the plain error.
  """
  error = prediction.astype(jnp.float32) - target.astype(jnp.float32)
  axes = tuple(range(1, error.ndim))
  return jnp.mean(weight.astype(jnp.float32) * jnp.mean(error**2, axis=axes))


def gmm_prior(
  mean: Float[Array, "B K E"],
  variance: Float[Array, "B K E"],
  weight: Float[Array, "B K"],
  *,
  prior_mean: Float[Array, "J E"],
  prior_log_variance: Float[Array, "J E"],
  prior_logits: Float[Array, " J"],
) -> Float[Array, ""]:
  """Distance of the slots' Gaussians q_k to one learned mixture p of all slots.

    1/B sum_ik pi_ik (1/E) (-log sum_j w_j exp(-KL(q_ik || p_j)))

  bounds sum_k pi_k KL(q_k || p) / E from above (Hershey & Olsen 2007, sec. 7),
  and minimising it over p fits p to the aggregate posterior of Kori et al.
  (NeurIPS 2024). The loss is a choice made here: that paper trains none.

  Args:
    mean: mu of each slot.
    variance: s of each slot, > 0.
    weight: pi of each slot; 0 for empty slots.
    prior_mean: means of the J components of p.
    prior_log_variance: their log-variances; variances are kept >= 0.01.
    prior_logits: their log-weights, up to a constant.
  """
  q_mean, q_variance = (
    x.astype(jnp.float32)[:, :, None] for x in (mean, variance)
  )
  p_mean = prior_mean[None, None]
  p_variance = jnp.exp(prior_log_variance)[None, None]
  p_variance = jnp.maximum(p_variance, LEAST_PRIOR_VARIANCE)
  ratio = q_variance / p_variance
  shift = (q_mean - p_mean) ** 2 / p_variance
  kl = 0.5 * jnp.sum(ratio - 1 - jnp.log(ratio) + shift, axis=-1)
  log_weight = jax.nn.log_softmax(prior_logits)[None, None]
  bound = -jax.nn.logsumexp(log_weight - kl, axis=-1) / mean.shape[-1]
  return jnp.mean(jnp.sum(weight.astype(jnp.float32) * bound, axis=1))


def modularity(
  attention: Float[Array, "K N"],
  matvec: Callable[[Array], Array],
  degree: Float[Array, " N"],
  *,
  gamma: float = 1.0,
) -> Float[Array, ""]:
  """Modularity Q of a soft partition (Tsitsulin et al. JMLR 2023, eq. 4).

    Q = (tr(A W A^T) - gamma |A d|^2 / 2m) / 2m,   2m = sum_n d_n

  At most 1, and 0 if all tokens share a slot. Unused slots cost nothing,
  unlike in the soft normalised cut and MinCutPool, whose optima split or
  merge everything. gamma > 1 favours smaller segments.

  Args:
    attention: A; columns sum to 1.
    matvec: x [N R] -> W x for a symmetric W >= 0, of which no gradient is
      taken.
    degree: d = W 1.
    gamma: resolution.
  """
  attention = attention.astype(jnp.float32)
  degree = jax.lax.stop_gradient(degree.astype(jnp.float32))
  mass = jnp.maximum(jnp.sum(degree), _EPSILON)
  # W is symmetric: d tr(A W A^T) = 2 <dA, A W>, so one product serves the
  # value and the gradient, and none leaks into W.
  spread = jax.lax.stop_gradient(matvec(jax.lax.stop_gradient(attention.T)).T)
  doubled = 2 * jnp.sum(attention * spread)
  inside = doubled - jax.lax.stop_gradient(doubled / 2)
  volume = jnp.sum(attention * degree[None], axis=1)
  return (inside - gamma * jnp.sum(volume**2) / mass) / mass


def spectral_consistency(
  attention: Float[Array, "B K N"], graph: Graph, *, gamma: float = 1.0
) -> Float[Array, ""]:
  """Minus the mean modularity of attention on the images' token graphs.

  Args:
    attention: responsibilities; columns sum to 1 over slots.
    graph: of `ops.graph`, every leaf with a leading batch axis B.
    gamma: resolution, see `modularity`.
  """

  def quality(attention, graph):
    return modularity(attention, graph.matvec, graph.degree(), gamma=gamma)

  return -jnp.mean(jax.vmap(quality)(attention, graph))


def anchor(
  attention: Float[Array, "B K N"], initial: Float[Array, "B K N"]
) -> Float[Array, ""]:
  """Cross-entropy of attention to the spectral clusters it started from.

  Slot k is tied to cluster k: for the first epochs only, decay it to 0.
  """
  initial = jax.lax.stop_gradient(initial.astype(jnp.float32))
  log_attention = jnp.log(attention.astype(jnp.float32) + _EPSILON)
  return -jnp.mean(jnp.sum(initial * log_attention, axis=1))


def diversity(
  slots: Float[Array, "B K D"],
  weight: Float[Array, "B K"],
  active: Bool[Array, "B K"],
  *,
  margin: float = 0.3,
) -> Float[Array, ""]:
  """Hinge on the cosine of slots, against collapse; in [0, 1 - margin].

  Mean over pairs k < l of active slots of sqrt(pi_k pi_l) max(0, cos(s_k,
  s_l) - margin). Bounded, where minus the variance of slots is not. The
  mixing weights only weigh: no gradient goes to them.
  """
  slots = slots.astype(jnp.float32)
  norm = jnp.sqrt(jnp.sum(slots**2, axis=-1, keepdims=True) + _EPSILON)
  cosine = jnp.einsum("BKD,BLD->BKL", slots / norm, slots / norm)
  present = active.astype(jnp.float32)
  root = jnp.sqrt(jax.lax.stop_gradient(weight.astype(jnp.float32))) * present
  above = jnp.triu(jnp.ones((slots.shape[1],) * 2), 1)[None]
  weighted = above * root[:, :, None] * root[:, None]
  pairs = jnp.sum(above * present[:, :, None] * present[:, None], axis=(1, 2))
  hinge = jnp.sum(weighted * jnp.maximum(cosine - margin, 0.0), axis=(1, 2))
  return jnp.mean(hinge / jnp.maximum(pairs, 1.0))


def merge(*groups: Mapping[str, Array]) -> dict[str, Array]:
  """One dict of terms; UserError if two groups share a name."""
  merged = {}
  for group in groups:
    for name, value in group.items():
      if name in merged:
        raise UserError(f"two losses are named {name!r}: rename one")
      merged[name] = value
  return merged


def total(
  terms: Mapping[str, Float[Array, ""]], weights: Mapping[str, float]
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
  """Weighted sum of the terms, and the terms themselves for the log.

  A term of weight 0 is logged but takes no part, even if it is not finite.

  Args:
    terms: unweighted values by name.
    weights: one weight for each term; a weight without a term must be 0.

  Raises:
    UserError: on a term without a weight, a weight without a term, or a term
      named "loss", under which the sum itself is logged.
  """
  if "loss" in terms:
    raise UserError("a term is named 'loss', as the sum is: rename it")
  if missing := sorted(set(terms) - set(weights)):
    raise UserError(
      f"loss_weights.{missing[0]} is missing: set it, or 0 to log it only"
    )
  unknown = sorted(name for name in set(weights) - set(terms) if weights[name])
  if unknown:
    raise UserError(
      f"loss_weights.{unknown[0]}: no loss has this name; set it to 0 or use "
      f"one of {', '.join(sorted(terms))}"
    )
  loss = jnp.zeros((), jnp.float32)
  for name, value in terms.items():
    if weights[name]:
      loss += weights[name] * value
  return loss, dict(terms)
