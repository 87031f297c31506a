"""Clustered tokens, a mixture to start from, and compiled EM steps."""

import jax
import jax.numpy as jnp
import numpy as np

from spectraldiffusion_jax.ops import em

N, K, E = 120, 5, 6
ACTIVE = jnp.ones(K, bool)

e_step = jax.jit(em.e_step)
m_step = jax.jit(em.m_step, static_argnames=("alpha", "floor"))
prior_variance = jax.jit(em.prior_variance)


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
