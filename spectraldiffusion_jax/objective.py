"""What training minimises: composites in, weighted terms out.

Where a batch carries label maps (made by the training-free step, by the
model itself or by a renderer, never by people) it is turned into copy-paste
composites, whose pasted masks are exact; the slots then start from those
labels. Without label maps the decoder's error alone trains the slots.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from spectraldiffusion_jax import diagnostics, losses
from spectraldiffusion_jax.ops import (
  composite,
  graph,
  instance_field,
  pseudo_labels,
  recolour,
)
from spectraldiffusion_jax.train_step import LossFn, Metrics
from spectraldiffusion_jax.types import ModelOutput

GRID = 16
"""Rows of tokens that the consistency loss of an instance field looks at."""
GraphFn = Callable[[Float[Array, "h w E"]], graph.Graph]
"""Features of one image's token grid -> its graph."""


def model_terms(output: ModelOutput, graph_fn: GraphFn) -> Metrics:
  """Every loss that the output has the makings of, unweighted.

  Args:
    output: of the model.
    graph_fn: builds the graph in which the slots' modularity counts.
  """
  terms = {}
  if (decoded := output.decoded) is not None:
    name = "reconstruction" if decoded.prediction.ndim == 4 else "diffusion"
    terms[name] = losses.diffusion(
      decoded.prediction, decoded.target, decoded.weight
    )
  weight = output.slots.attention.mean(-1)
  if (mixture := output.mixture) is not None and output.prior is not None:
    weight = mixture.weight
    if output.field is not None:
      # Places in the image have no reason to be alike: the prior is fitted to
      # the slots. Pulled towards it, they lost 0.005 FG-ARI (docs/results.md).
      mixture = jax.lax.stop_gradient(mixture)
    terms["gmm_prior"] = losses.gmm_prior(
      mixture.mean,
      mixture.variance,
      mixture.weight,
      prior_mean=output.prior.mean,
      prior_log_variance=output.prior.variance,
      prior_logits=output.prior.weight,
    )
  if output.affinity is not None:
    affinity, attention = output.affinity, output.slots.attention
    if output.field is not None:
      affinity, attention = thinned(affinity, attention)
    terms["spectral_consistency"] = losses.spectral_consistency(
      attention, jax.vmap(graph_fn)(jax.lax.stop_gradient(affinity))
    )
  terms["diversity"] = losses.diversity(
    output.slots.slots, weight, output.slots.active
  )
  return terms


def thinned(
  features: Float[Array, "B h w E"], attention: Float[Array, "B K N"]
) -> tuple[Float[Array, "B g v E"], Float[Array, "B K M"]]:
  """Every s-th row and column of a token grid, some `GRID` rows of it.

  Modularity is a mean over pairs of tokens. A sample of an even grid gives it
  as well where the graph joins tokens wherever they are, and 256 tokens cost
  a sixteenth of 1,024.
  """
  batch, height, width, _ = features.shape
  step = max(1, height // GRID)
  grid = attention.reshape(batch, -1, height, width)[:, :, ::step, ::step]
  return features[:, ::step, ::step], grid.reshape(*grid.shape[:2], -1)


def field_terms(
  field: Float[Array, "B H W D"],
  labels: Int[Array, "B H W"],
  exact: Float[Array, "B H W"],
  *,
  num_objects: int,
  distrust: Array,
) -> Metrics:
  """Losses of the instance field against the labels of composites.

  Args:
    field: of the encoder.
    labels: of the composites.
    exact: 1 where a label is exact because its piece was pasted.
    num_objects: largest id in `labels`.
    distrust: 1 once labels that the field contradicts strongly are ignored.
  """
  target = instance_field.targets(labels, num_objects=num_objects)
  doubt = instance_field.contradicted(field[..., 0], target, exact)
  weight = target.weight * (1 - distrust * doubt)
  return instance_field.losses(field, target, weight)


def make_composites(
  *, num_segments: int, pastes: int, paste_rate: float, grey_object: float
) -> Callable[[dict, Array], tuple[Array, Array, Array]]:
  """The function (batch, key) -> image, labels and where labels are exact.

  Args:
    num_segments: largest id of the batch's label maps.
    pastes: most pieces pasted into one image.
    paste_rate: share of images that are pasted into.
    grey_object: chance that a segment turns grey on its own.
  """

  def composites(batch: dict, key: Array) -> tuple[Array, Array, Array]:
    paste, tint = jax.random.split(key)
    made = composite.compose(
      paste,
      batch["image"],
      pseudo_labels.decode(batch["labels"]),
      num=num_segments,
      pastes=pastes,
      rate=paste_rate,
    )
    image = recolour.recolour(
      tint,
      made.images,
      made.labels,
      num=num_segments + pastes,
      grey_object=grey_object,
    )
    known = batch["exact"][:, None, None]
    return image, made.labels, jnp.maximum(made.exact, known)

  return composites


def make_loss_fn(
  model: nn.Module,
  composites: Callable[[dict, Array], tuple[Array, Array, Array]],
  *,
  weights: Mapping[str, float],
  graph_fn: GraphFn,
  largest: int,
) -> LossFn:
  """The loss (params, batch, rngs) -> scalar, metrics.

  Args:
    model: maps (image, labels) to a ModelOutput.
    composites: see `make_composites`.
    weights: weight of each term; one that the model does not produce is left
      out, one of weight 0 is logged only.
    graph_fn: see `model_terms`.
    largest: largest id in the labels of composites.
  """

  def loss_fn(params: dict, batch: dict, rngs: dict) -> tuple[Array, Metrics]:
    image, labels, exact = batch["image"], None, None
    if "labels" in batch:
      image, labels, exact = composites(batch, rngs["composite"])
    output = model.apply(
      {"params": params},
      image,
      labels,
      label_slots=largest + 1,
      train=True,
      rngs=rngs,
    )
    terms = model_terms(output, graph_fn)
    if output.field is not None and labels is not None:
      fields = field_terms(
        output.field,
        labels,
        exact,
        num_objects=largest,
        distrust=batch["distrust"][:1].mean(),
      )
      terms = losses.merge(terms, fields)
    total, terms = losses.total(terms, {n: weights[n] for n in terms})
    slots = output.slots
    health = diagnostics.binding_diagnostics(
      slots.slots, slots.attention, slots.active
    )
    if output.decoded is not None:
      health |= diagnostics.bypass(output.decoded)
    return total, {f"{n}_loss": t for n, t in terms.items()} | health

  return loss_fn
