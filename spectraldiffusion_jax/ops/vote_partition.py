"""The spectral step on a learned instance field.

Foreground tokens are joined by how close their votes for an object's centre
are, and their chroma. The graph is then nearly block-diagonal, one block an
object, so that the number of eigenvalues near 1 counts the objects (the
multiplicity of 1 is the number of components: von Luxburg 2007, proposition 4)
and no cluster has to be merged or split afterwards.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from spectraldiffusion_jax.errors import choose
from spectraldiffusion_jax.ops import clustering, spectral
from spectraldiffusion_jax.ops.affinity import DenseGraph, squared_distance
from spectraldiffusion_jax.ops.partition import Partition

LEAST = 0.3
"""Chance of being foreground from which a token takes part."""


def vote_graph(
  features: Float[Array, "*grid C"], *, sigma: float, chroma_sigma: float = 0.0
) -> DenseGraph:
  """W_nm = sqrt(p_n p_m) exp(-|x_n - x_m|^2 / 2) on the foreground.

  A heat kernel between weights: positive semi-definite, so that no shift is
  needed (Schoenberg 1938). Tokens x are votes over `sigma`, beside chroma over
  `chroma_sigma`: a small object of another colour whose votes stray to its
  neighbour's centre keeps a block of its own.

  Args:
    features: chance p of being foreground, mean vote (2 channels) and chroma
      (2 channels, not read if `chroma_sigma` is 0) of each token.
    sigma: in the units of the votes.
    chroma_sigma: in the units of the chroma; 0 = votes alone.
  """
  tokens = features.reshape(-1, features.shape[-1])
  chance = jnp.where(tokens[:, 0] > LEAST, tokens[:, 0], 0.0)
  root = jnp.sqrt(chance)
  place = tokens[:, 1:3] / sigma
  if chroma_sigma:
    place = jnp.concatenate([place, tokens[:, 3:] / chroma_sigma], axis=1)
  kernel = jnp.exp(-0.5 * squared_distance(place))
  return DenseGraph(kernel * root[:, None] * root[None])


def _sample(chance: Float[Array, " N"], limit: int) -> Int[Array, " M"]:
  """At most `limit` tokens, all of the foreground if it is no larger.

  A larger foreground is thinned out evenly: one draw, the same every time.
  """
  size = chance.shape[0]
  draw = np.random.RandomState(0).random_sample(size).astype(np.float32)
  score = jnp.where(chance > LEAST, 1 + draw, chance)
  return jax.lax.top_k(score, min(limit, size))[1]


def _operator(graph: DenseGraph) -> tuple[spectral.Matvec, Float[Array, " N"]]:
  """The operator D^-1/2 W D^-1/2 and its first eigenvector.

  Background tokens are mapped to 0, where they belong to no component. Every
  other token has a loop (its weight with itself), so that its degree is at
  least LEAST.
  """
  degree = graph.degree()
  present = degree > 0
  inverse = jnp.where(present, jax.lax.rsqrt(jnp.maximum(degree, LEAST)), 0.0)

  def matvec(x):
    return inverse[:, None] * graph.matvec(inverse[:, None] * x)

  # All-zero only for an image without foreground; any unit vector will do.
  lead = jnp.where(present.any(), jnp.sqrt(degree), 1.0)
  return matvec, lead / jnp.linalg.norm(lead)


def vote_partition(
  features: Float[Array, "h w C"],
  *,
  num_slots: int,
  sigma: float = 0.22,
  chroma_sigma: float = 0.0,
  threshold: float = 0.85,
  count_rule: str = "threshold",
  limit: int = 512,
  rounds: int = 2,
  degree: int = 8,
  dense: bool = False,
) -> Partition:
  """Shares tokens out: slot 0 the background, one slot a counted object.

  Args:
    features: see `vote_graph`.
    num_slots: K; at most K - 1 objects are told apart.
    sigma: distance of votes, in their units, at which affinity fades.
    chroma_sigma: the same of chroma; 0 = votes alone.
    threshold: eigenvalues above it count objects.
    count_rule: "threshold", "eigengap" (largest gap between eigenvalues, at
      most K - 2 objects) or "fixed" (always K - 1 objects).
    limit: most tokens in the graph. What is left of a larger foreground
      belongs to no slot yet; the first E-step shares it out.
    rounds: of the filtered block iteration.
    degree: of its Chebyshev filter.
    dense: diagonalise the whole matrix instead, the oracle of the iteration.
  """
  features = jnp.nan_to_num(jax.lax.stop_gradient(features))
  tokens = features.reshape(-1, features.shape[-1])
  chosen = _sample(tokens[:, 0], limit)
  graph = vote_graph(tokens[chosen], sigma=sigma, chroma_sigma=chroma_sigma)
  matvec, lead = _operator(graph)
  wanted = max(1, min(num_slots - 1, chosen.shape[0]))
  if dense:
    pairs = spectral.rayleigh_ritz(matvec, jnp.eye(chosen.shape[0]))
    pairs = jax.tree.map(lambda x: x[..., :wanted], pairs)
  else:
    pairs = spectral.leading_eigenpairs(
      matvec, lead, count=wanted, rounds=rounds, degree=degree, low=0.0
    )
  rules = {
    "threshold": lambda: jnp.sum(pairs.value > threshold),
    "eigengap": lambda: clustering.eigengap_count(pairs.value, low=1),
    "fixed": lambda: wanted,
  }
  count = jnp.maximum(choose("count_rule", count_rule, rules)(), 1)
  share = clustering.cpqr(pairs.vector, count=count)
  chance = jnp.where(tokens[:, :1] > LEAST, tokens[:, :1], 0.0)
  objects = jnp.zeros((tokens.shape[0], wanted)).at[chosen].set(share)
  objects = jnp.pad(objects * chance, ((0, 0), (0, num_slots - 1 - wanted)))
  assignment = jnp.concatenate([1 - chance, objects], axis=1)
  active = jnp.arange(num_slots) <= count
  return Partition(assignment[:, :num_slots], active, 1 + count)
