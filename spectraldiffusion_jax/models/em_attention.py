"""Probabilistic slot attention: gated MAP-EM in key space, content beside it.

Keys decide assignment, values carry content; theorem 2 of docs/theory.md
covers the key track. Slots start as one M-step from given
responsibilities; each round is an E-step, a gated M-step whose gate comes
from the slot's cell, and a content update by that cell. After Kori et al.
(NeurIPS 2024) and Kirilenko et al. (ICLR 2024), in tied key space.
"""

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float

from spectraldiffusion_jax.ops import em
from spectraldiffusion_jax.types import Mixtures, Slots


def responsibilities(
  keys: Float[Array, "B N E"],
  mixture: Mixtures,
  active: Bool[Array, "B K"],
  foreground: Float[Array, "B N"] | None,
  *,
  tau: float,
) -> Float[Array, "B K N"]:
  """One E-step; with `foreground`, slot 0 takes what is not foreground.

  The background is then not a Gaussian but the rest: A_n0 = 1 - p_n, and
  the other slots share p_n in the proportions of their posterior.
  """
  if foreground is None:
    return _e_step(keys, mixture, active, tau)
  objects = active.at[:, 0].set(False)
  share = _e_step(keys, mixture, objects, tau) * foreground[:, None]
  return share.at[:, 0].set(1 - share.sum(1))


def _e_step(keys, mixture, active, tau):
  run = jax.vmap(functools.partial(em.e_step, tau=tau))
  return run(keys, mixture.mean, mixture.variance, mixture.weight, active)[0]


def without_light_slots(
  slots: Slots, mixture: Mixtures, *, threshold: float, background: bool
) -> Slots:
  """Slots of which those with little mixing weight are no longer active.

  A slot goes if its share of the weight of all slots is below threshold / K;
  the heaviest one stays. What it held goes to the others in proportion.

  Args:
    slots: with their attention.
    mixture: their Gaussians and weights.
    threshold: in units of 1 / K.
    background: whether slot 0 is the rest of the image instead of a Gaussian:
      it then stays and its weight does not count.

  Source: Kori et al., Identifiable Object-Centric Learning (2024), with
  tau_pi = threshold / K.
  """
  weight = jnp.where(slots.active, mixture.weight, 0.0)
  if background:
    weight = weight.at[:, 0].set(0.0)
  share = weight / jnp.maximum(weight.sum(1, keepdims=True), 1e-12)
  kept = share >= threshold / share.shape[1]
  kept = kept | (share == share.max(1, keepdims=True))
  if background:
    kept = kept.at[:, 0].set(True)
  active = slots.active & kept
  attention = slots.attention * active[:, :, None]
  total = attention.sum(1, keepdims=True)
  attention = jnp.where(
    total > 1e-6,
    attention / jnp.maximum(total, 1e-6),
    active[:, :, None] / active.sum(1)[:, None, None],
  )
  return slots.replace(attention=attention, active=active)


class EMSlotAttention(nn.Module):
  """T rounds of gated MAP-EM from given responsibilities."""

  num_iterations: int
  slot_dim: int
  cell: nn.Module
  tau: float = 2.0  # temperature of assignment, >= 1
  nu: float = 10.0  # pseudo-tokens that hold a slot's variance to the prior
  spread: float = 0.0  # prior variance of keys; 0 = that of the image's keys
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(
    self,
    tokens: Float[Array, "B N F"],
    keys: Float[Array, "B N E"],
    assignment: Float[Array, "B K N"],
    active: Bool[Array, "B K"],
    *,
    foreground: Float[Array, "B N"] | None = None,
  ) -> tuple[Slots, Mixtures]:
    """Slots and their Gaussians after T rounds."""
    value = nn.Dense(self.slot_dim, dtype=self.dtype, name="value")(
      nn.LayerNorm(dtype=self.dtype)(tokens)
    )
    prior = jax.vmap(em.prior_variance)(keys)
    if self.spread:
      prior = jnp.full_like(prior, self.spread)
    pool = jax.vmap(em.pool)
    mixture = Mixtures(*jax.vmap(self._start)(assignment, keys, active, prior))
    slots = pool(jax.lax.stop_gradient(assignment), value)
    state = self.cell.initial_state(slots)
    attention = assignment
    for _ in range(self.num_iterations):
      attention = responsibilities(
        keys, mixture, active, foreground, tau=self.tau
      )
      update = pool(attention, value)
      slots, state, gate = self.cell(slots, update, state)
      mixture = Mixtures(
        *jax.vmap(self._m_step)(
          keys, attention, mixture.mean, active, prior, gate
        )
      )
    return Slots(slots=slots, attention=attention, active=active), mixture

  def _start(self, assignment, keys, active, prior):
    return em.initial_m_step(assignment, keys, active, prior=prior, nu=self.nu)

  def _m_step(self, keys, attention, mean, active, prior, gate):
    return em.m_step(
      keys, attention, mean, active, prior=prior, gate=gate, nu=self.nu
    )
