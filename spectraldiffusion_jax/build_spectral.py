"""From a config to the spectral step, and to the graph that losses count in."""

import functools
from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from spectraldiffusion_jax import objective
from spectraldiffusion_jax.build_encoder import has_field
from spectraldiffusion_jax.models import model as model_lib
from spectraldiffusion_jax.ops import (
  affinity,
  landmarks,
  partition,
  random_partition,
  vote_partition,
)


def count_rule(config: ConfigDict, *, default: str) -> str:
  """How clusters are counted: spectral.count, or a mode's default if auto."""
  rule = config.spectral.count
  return default if rule == "auto" else rule


def make_partition(config: ConfigDict) -> model_lib.Partitioner:
  """The batched spectral step: features -> assignment [B K N], active.

  Without `model.use_spectral_init`, random tokens stand in its place.
  """
  spectral, slots = config.spectral, config.model.num_slots
  if not config.model.use_spectral_init:
    one = functools.partial(
      random_partition.random_partition,
      num_slots=slots,
      field=has_field(config),
    )
  elif has_field(config):
    one = functools.partial(
      vote_partition.vote_partition,
      num_slots=slots,
      sigma=spectral.vote_sigma,
      chroma_sigma=spectral.chroma_sigma,
      threshold=spectral.count_threshold,
      dense=not spectral.use_power_iteration,
      count_rule=count_rule(config, default="threshold"),
    )
  else:
    graph = dict(sigma=spectral.sigma, tau=spectral.merge)
    if config.model.dinov2_model:
      # Both are colour distances; a backbone's features set their own scale,
      # and regions only merge until there are no more than slots.
      graph = dict(sigma=None, tau=0.0)
    options = {
      "graph": dict(
        count_rule=count_rule(config, default="threshold"), **graph
      ),
      "fused": dict(
        scales=spectral.scales,
        knn_k=spectral.knn_k,
        count_rule=count_rule(config, default="fixed"),
      ),
      "per_scale": dict(
        scales=spectral.scales,
        knn_k=spectral.knn_k,
        k_per_scale=spectral.k_per_scale,
      ),
    }
    one = functools.partial(
      partition.spectral_partition,
      num_slots=slots,
      mode=spectral.mode,
      **options[spectral.mode],
    )

  def run(features: Float[Array, "B h w E"]):
    found = partition.over_images(one)(features)
    return found.assignment.swapaxes(1, 2), found.active

  return run


def make_graph(config: ConfigDict) -> objective.GraphFn:
  """The graph in which the consistency loss counts modularity."""
  if has_field(config):
    return functools.partial(
      vote_partition.vote_graph,
      sigma=config.spectral.vote_sigma,
      chroma_sigma=config.spectral.chroma_sigma,
    )
  if config.model.dinov2_model:
    return functools.partial(
      landmarks.fused_graph,
      scales=config.spectral.scales,
      knn_k=config.spectral.knn_k,
    )
  return functools.partial(affinity.stencil_graph, sigma=config.spectral.sigma)


def graph_source(config: ConfigDict) -> str:
  """What the token graph compares, see `model.graph_features`."""
  if config.model.dinov2_model:
    return "backbone"
  return "field" if has_field(config) else "colour"


def make_training_free(
  config: ConfigDict,
) -> Callable[[Float[Array, "B H W 3"]], Array]:
  """The untrained, colour-only segmentation: images -> labels [B H W] uint8."""
  side = config.model.image_size // config.model.token_stride

  def labels(image):
    masks, _ = partition.training_free(
      image,
      num_slots=config.model.num_slots,
      grid=(side, side),
      sigma=config.spectral.sigma,
      tau=config.spectral.merge,
    )
    return jnp.argmax(masks, axis=0).astype(jnp.uint8)

  return partition.over_images(labels)
