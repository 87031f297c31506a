"""How well slots bind to objects: five numbers, and what to do about them.

The numbers are jnp and run inside the train step; `advice` turns them into
lines for people, on the host.
"""

import math
from collections.abc import Mapping

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from spectraldiffusion_jax import losses
from spectraldiffusion_jax.models.diffusion_decoder import SWAP
from spectraldiffusion_jax.types import Decoded

COLLAPSED = 0.7  # slot similarity above which slots are copies of each other
SEPARATE = 0.3  # and below which they are healthy
UNIFORM = 0.2  # mean max attention below which nothing is bound
CERTAIN = 0.95  # share of the largest entropy above which likewise
MASK_IDS = (3, 10)  # healthy number of segments an image
IGNORED = 0.01  # share of the diffusion loss below which slots count nothing
LEARNED = 1.0  # diffusion loss below which the decoder has learned something


def binding_diagnostics(
  slots: Float[Array, "B K D"],
  attn: Float[Array, "B K N"],
  active: Bool[Array, "B K"],
) -> dict[str, Float[Array, ""]]:
  """Health of the binding between slots and tokens, means over the batch.

  Args:
    slots: slot contents.
    attn: responsibilities, summing to 1 over K at every token.
    active: False for slots that exist only as padding.

  Returns:
    `slot_similarity`: mean cosine over the pairs of an image's active slots,
      in [-1, 1]; 1 means that slots are copies of each other.
    `attention_entropy`: entropy over slots, mean over tokens, as a share of
      the largest possible, log of the number of active slots; in [0, 1],
      1 means that no token has decided.
    `max_attention`: largest responsibility, mean over tokens, in [1/K, 1].
    `mask_ids`: distinct segments an image, slots that win a token.
  """
  f32 = jnp.float32
  slots, attn = slots.astype(f32), attn.astype(f32)
  weight = active.astype(f32)
  count = weight.sum(1)  # [B]
  norm = jnp.sqrt(jnp.maximum((slots**2).sum(-1, keepdims=True), 1e-12))
  unit = slots / norm * weight[..., None]
  # Sum over ordered pairs i != j = |sum of unit vectors|^2 - sum of squares.
  pairs = (unit.sum(1) ** 2).sum(-1) - (unit**2).sum((1, 2))
  similarity = pairs / jnp.maximum(count * (count - 1), 1)

  attn = attn * weight[..., None]
  entropy = -(attn * jnp.log(jnp.maximum(attn, 1e-12))).sum(1).mean(-1)
  entropy = entropy / jnp.log(jnp.maximum(count, 2))
  wins = attn.argmax(1)[:, None] == jnp.arange(attn.shape[1])[None, :, None]
  return {
    "slot_similarity": similarity.mean(),
    "attention_entropy": entropy.mean(),
    "max_attention": attn.max(1).mean(),
    "mask_ids": wins.any(-1).sum(1).astype(f32).mean(),
  }


def bypass(decoded: Decoded) -> dict[str, Float[Array, ""]]:
  """How much worse the decoder does with the slots of another image.

  Args:
    decoded: of a decoder in training.

  Returns:
    `bypass`: loss with swapped slots minus the loss with the own ones; 0 means
    that the decoder ignores its slots. Nothing for a decoder without a swap.
  """
  if decoded.swapped is None:
    return {}
  target, own = decoded.target[:, ::SWAP], decoded.prediction[:, ::SWAP]
  own, other = (
    losses.diffusion(prediction, target, decoded.weight)
    for prediction in (own, decoded.swapped)
  )
  return {"bypass": other - own}


def advice(values: Mapping[str, float]) -> list[str]:
  """Named problems with their remedies; an empty list is a healthy run.

  Args:
    values: any of the numbers of `binding_diagnostics` and `bypass`, `loss`
      and `diffusion_loss`; what is missing is not judged.

  Returns:
    One line a problem: what, the measured and the healthy value, the fields
    to change, most promising first.
  """
  lines = []
  loss = values.get("loss", 0.0)
  if not math.isfinite(loss):
    lines.append(
      f"loss diverged: it is {loss}; lower training.learning_rate or "
      "training.grad_clip, and set model.compute_dtype=float32"
    )
  similarity = values.get("slot_similarity", 0.0)
  if similarity > COLLAPSED:
    lines.append(
      f"slots collapsed: slot_similarity {similarity:.2f}, healthy below "
      f"{SEPARATE}, collapsed above {COLLAPSED}; set "
      "loss_weights.diversity=0.1, model.use_spectral_init=true, or raise "
      "model.num_slots by half"
    )
  largest = values.get("max_attention", 1.0)
  entropy = values.get("attention_entropy", 0.0)
  if largest < UNIFORM or entropy > CERTAIN:
    lines.append(
      f"attention is uniform: max_attention {largest:.2f}, healthy above "
      f"{UNIFORM}, attention_entropy {entropy:.2f}, healthy below {CERTAIN}; "
      "set model.use_spectral_init=true or raise model.num_iterations and "
      "training.learning_rate"
    )
  if "bypass" in values and values["diffusion_loss"] < LEARNED:
    share = values["bypass"] / max(values["diffusion_loss"], 1e-9)
    if share < IGNORED:
      lines.append(
        f"decoder ignores slots: bypass is {share:.3f} of diffusion_loss, "
        f"healthy above {IGNORED}; raise model.slot_dim or "
        "model.num_iterations, or save its time with "
        "model.use_diffusion_decoder=false model.decoder=none"
      )
  low, high = MASK_IDS
  ids = values.get("mask_ids", low)
  if ids < low:
    lines.append(
      f"too few segments: {ids:.1f} an image, healthy {low}-{high}; raise "
      "model.num_slots by half, or lower spectral.merge"
    )
  elif ids > high:
    lines.append(
      f"too many segments: {ids:.1f} an image, healthy {low}-{high}; lower "
      "model.num_slots, or raise spectral.merge"
    )
  return lines
