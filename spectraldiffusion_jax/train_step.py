"""One optimiser step and one evaluation step: pure, jitted by the loop."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jaxtyping import Array, Float

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


def make_train_step(
  loss_fn: LossFn,
  optimizer: optax.GradientTransformation,
  *,
  schedule: optax.Schedule,
  seed: int = 0,
  accumulation: int = 1,
) -> Callable[..., tuple[TrainState, Metrics]]:
  """The step (state, batch) or (state, batch, seed) -> (state, metrics).

  A step whose loss, gradient or update is not finite leaves parameters and
  optimiser as they were and reports `finite` = 0: the loop decides what to
  do about it, and no good state is ever lost.
  """

  def train_step(state: TrainState, batch: dict, seed: int | Array = seed):
    rngs = stream_keys(seed, state.step)
    metrics, grads = accumulate(
      loss_fn, state.params, batch, rngs, accumulation
    )
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    norm = optax.tree.norm(updates)
    finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(norm)
    new = TrainState(
      step=state.step + 1,
      params=optax.apply_updates(state.params, updates),
      opt_state=opt_state,
    )
    kept = state.replace(step=state.step + 1)
    new = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, kept)
    metrics |= {
      "grad_norm": optax.tree.norm(grads),
      "update_norm": norm,
      "param_norm": optax.tree.norm(new.params),
      "learning_rate": jnp.asarray(schedule(state.step), jnp.float32),
      "finite": finite.astype(jnp.float32),
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
