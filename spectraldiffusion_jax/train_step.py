"""One optimiser step and one evaluation step: pure, jitted by the loop."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jaxtyping import Array, Bool, Float

from spectraldiffusion_jax.train_state import TrainState, stream_keys
from spectraldiffusion_jax.types import ModelOutput

Metrics = dict[str, Array]
LossFn = Callable[..., tuple[Array, Metrics]]
"""(params, batch, rngs) -> scalar loss and scalar metrics."""


def accumulate(
  loss_fn: LossFn, params: dict, batch: dict, rngs: dict, parts: int
) -> tuple[Metrics, dict]:
  """Mean metrics and gradient over `parts` slices of the batch, by scan."""
  grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
  if parts == 1:
    (loss, metrics), grads = grad_fn(params, batch, rngs)
    return {"loss": loss, **metrics}, grads

  def body(total, part):
    index, rows = part
    keys = {name: jax.random.fold_in(k, index) for name, k in rngs.items()}
    (loss, metrics), grads = grad_fn(params, rows, keys)
    return jax.tree.map(jnp.add, total, ({"loss": loss, **metrics}, grads)), ()

  # Row i goes to part i % parts: every device keeps an equal share of each.
  rows = jax.tree.map(
    lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), batch
  )
  first = jax.tree.map(lambda x: x[0], rows)
  shapes = jax.eval_shape(grad_fn, params, first, rngs)
  (loss, metrics), grads = shapes
  zero = jax.tree.map(
    lambda s: jnp.zeros(s.shape, s.dtype), ({"loss": loss, **metrics}, grads)
  )
  total, _ = jax.lax.scan(body, zero, (jnp.arange(parts), rows))
  return jax.tree.map(lambda x: x / parts, total)


def explodes(
  now: Float[Array, " 2"], recent: Float[Array, "2 window"], ratio: float
) -> Bool[Array, ""]:
  """Whether |loss| or gradient norm exceed `ratio` times their medians.

  Never if `ratio` is 0, nor until the window is full: its median is NaN
  before, which nothing exceeds.
  """
  limit = ratio * jnp.median(recent, axis=1)
  return (now > limit).any() & (ratio > 0)


def make_train_step(
  loss_fn: LossFn,
  optimizer: optax.GradientTransformation,
  *,
  schedule: optax.Schedule,
  seed: int,
  accumulation: int = 1,
  max_loss_ratio: float = 0.0,
) -> Callable[[TrainState, dict], tuple[TrainState, Metrics]]:
  """The step (state, batch) -> (state, metrics).

  A step whose loss, gradient or update is not finite, or explodes, leaves
  parameters and optimiser as they were and reports `accepted` = 0: the loop
  decides what to do about it, and no good state is ever lost.

  Args:
    loss_fn: what is minimised.
    optimizer: what makes updates of gradients.
    schedule: learning rate, for the metrics.
    seed: of the random streams.
    accumulation: slices of the batch, one after the other.
    max_loss_ratio: a step explodes if |loss| or the gradient norm exceeds
      this many times its median over the last WINDOW accepted steps; 0 for
      no such limit.
  """

  def train_step(state: TrainState, batch: dict):
    rngs = stream_keys(seed, state.step)
    metrics, grads = accumulate(
      loss_fn, state.params, batch, rngs, accumulation
    )
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    norm = optax.tree.norm(updates)
    finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(norm)
    layers = jnp.stack([optax.tree.norm(g) for g in jax.tree.leaves(grads)])
    now = jnp.stack([jnp.abs(metrics["loss"]), optax.tree.norm(layers)])
    accepted = finite & ~explodes(now, state.recent, max_loss_ratio)
    new = TrainState(
      step=state.step + 1,
      params=optax.apply_updates(state.params, updates),
      opt_state=opt_state,
      recent=jnp.concatenate([state.recent[:, 1:], now[:, None]], axis=1),
    )
    kept = state.replace(step=state.step + 1)
    new = jax.tree.map(lambda a, b: jnp.where(accepted, a, b), new, kept)
    metrics |= {
      "grad_norm": now[1],
      "layer_grad_norms": layers,
      "update_norm": norm,
      "param_norm": optax.tree.norm(new.params),
      "learning_rate": jnp.asarray(schedule(state.step), jnp.float32),
      "finite": finite.astype(jnp.float32),
      "accepted": accepted.astype(jnp.float32),
    }
    return new, metrics

  return train_step


def make_eval_step(
  model: nn.Module,
) -> Callable[[dict, Float[Array, "B H W 3"]], ModelOutput]:
  """The step (params, image) -> output, of whose masks the argmax counts.

  Random streams are fixed: the same image gives the same masks.
  """

  def eval_step(params: dict, image: Float[Array, "B H W 3"]) -> ModelOutput:
    return model.apply(
      {"params": params}, image, train=False, rngs=stream_keys(0, 0)
    )

  return eval_step
