"""The compiled side of a run: model, optimiser and jitted steps on a mesh.

Nothing here reads data or makes an array, so the same program is built for
the devices of this machine and for those of a machine that is not there.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array
from ml_collections import ConfigDict

from spectraldiffusion_jax import (
  build,
  build_spectral,
  effort,
  evaluate,
  optim,
  rounds,
  sharding,
  train_state,
  train_step,
)


class Program:
  """The jitted functions of a validated config, with their shardings.

  Attributes:
    mesh: the devices.
    model: the module.
    optimizer: of its parameters.
    abstract_state: shapes, dtypes and shardings of a TrainState.
    abstract_batch: those of what `train_step` reads of a batch.
    init_state: () -> TrainState, born sharded.
    train_step: (state, batch) -> state, metrics; the state is donated.
    eval_step: (params, image) -> ModelOutput.
    reconstruct: (params, image, slots) -> image drawn from the slots, or None.
    training_free: image -> label maps [B H W] uint8.
  """

  def __init__(self, config: ConfigDict, mesh: Mesh, length: optim.Length):
    training = config.training
    sharding.check_batch_size(
      training.batch_size, training.gradient_accumulation, mesh
    )
    self.config, self.mesh = config, mesh
    self._device = mesh.devices.flat[0]
    self._gathered = functools.partial(sharding.gather_weights, mesh=mesh)
    self.model = build.make_model(config)
    self._schedule = optim.make_schedule(
      learning_rate=training.learning_rate,
      length=length,
      starts=rounds.starts(length.num_steps, max(config.composite.rounds, 1)),
    )
    self.optimizer = optim.make_optimizer(
      self._schedule,
      weight_decay=training.weight_decay,
      grad_clip=training.grad_clip,
      trainable=build.make_trainable(config),
    )
    self._make_state()
    self._make_train_step()
    self._make_readers()

  def _make_state(self) -> None:
    """Abstract, sharded state and batch, and what makes the first state."""
    config, mesh = self.config, self.mesh
    size, rows = config.model.image_size, sharding.batch_rows(mesh)
    image = jax.ShapeDtypeStruct((rows, size, size, 3), jnp.float32)
    create = functools.partial(
      train_state.create, self.model, self.optimizer, seed=config.seed
    )
    shapes = jax.eval_shape(create, image)
    self._at = sharding.state_sharding(shapes, mesh)
    self._rows = sharding.batch_sharding(mesh)
    self.abstract_state = jax.tree.map(
      lambda s, at: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=at),
      shapes,
      self._at,
    )
    self.init_state = jax.jit(
      lambda: create(jnp.zeros(image.shape)),
      out_shardings=self._at,
      compiler_options=effort.on_cpu(0, self._device),
    )
    batch = {"image": ((size, size, 3), jnp.float32)}
    if config.composite.rounds:
      batch["labels"] = ((size, size), jnp.uint8)
      batch["exact"] = batch["distrust"] = ((), jnp.float32)
    self.abstract_batch = {
      name: jax.ShapeDtypeStruct(
        (config.training.batch_size, *shape), dtype, sharding=self._rows
      )
      for name, (shape, dtype) in batch.items()
    }

  def _make_train_step(self) -> None:
    loss_fn = build.make_loss_fn(self.config, self.model)
    step = train_step.make_train_step(
      lambda params, *rest: loss_fn(self._gathered(params), *rest),
      self.optimizer,
      schedule=self._schedule,
      seed=self.config.seed,
      accumulation=self.config.training.gradient_accumulation,
      max_loss_ratio=self.config.training.max_loss_ratio,
    )
    self.train_step = jax.jit(
      step,
      in_shardings=(self._at, self._rows),
      out_shardings=(self._at, sharding.replicated(self.mesh)),
      donate_argnums=0,
      compiler_options=effort.on_cpu(1, self._device),
    )

  def _make_readers(self) -> None:
    """The functions that read parameters and change nothing."""
    read = train_step.make_eval_step(self.model)

    def eval_step(params, image):
      return read(self._gathered(params), image)

    reads = (self._at.params, self._rows)
    self.eval_step = jax.jit(eval_step, in_shardings=reads)
    draw = build.make_reconstruct(self.config, self.model)
    self.reconstruct = draw and jax.jit(
      lambda params, *rest: draw(self._gathered(params), *rest),
      in_shardings=(*reads, self._rows),
      out_shardings=self._rows,
    )
    self.training_free = jax.jit(
      build_spectral.make_training_free(self.config),
      in_shardings=self._rows,
      out_shardings=self._rows,
    )
    # Small functions of their own: the model is compiled once, in eval_step.
    self._labels_of = jax.jit(evaluate.labels_of, out_shardings=self._rows)
    self._cleaned = jax.jit(
      build.make_cleaner(self.config), out_shardings=self._rows
    )

  def labels(self, params: dict, image: Array) -> Array:
    """Label maps [B H W] uint8 of the model."""
    return self._labels_of(self.eval_step(params, image))

  def teach(self, params: dict | None, image: Array) -> Array:
    """Label maps [B H W] uint8 to train on.

    Of the model, or of the training-free step where there are no parameters.
    """
    if params is None:
      return self._cleaned(self.training_free(image))
    output = self.eval_step(params, image)
    return self._cleaned(self._labels_of(output), output.field)
