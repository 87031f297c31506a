"""The parts of a run, assembled once from its config."""

import functools
import logging
from collections.abc import Iterator

import jax
import numpy as np
from ml_collections import ConfigDict

from spectraldiffusion_jax import (
  build_encoder,
  distributed,
  evaluate,
  optim,
  rounds,
  sharding,
  visualise,
)
from spectraldiffusion_jax.data import pipeline
from spectraldiffusion_jax.data.rendered import joined
from spectraldiffusion_jax.evaluate import Segment
from spectraldiffusion_jax.program import Program
from spectraldiffusion_jax.train_state import TrainState
from spectraldiffusion_jax.types import Batch


class Run:
  """Model, optimiser, jitted steps and data of one validated config.

  Nothing here changes after construction: state goes in and comes out.
  """

  def __init__(self, config: ConfigDict):
    self.config = config
    training = config.training
    self.mesh = sharding.make_mesh(**config.mesh)
    self.num_examples = distributed.first_alone(
      lambda: pipeline.num_examples(**self._data(config.data.train_split))
    )
    self.length = optim.run_length(
      num_examples=self.num_examples,
      batch_size=training.batch_size,
      num_epochs=training.num_epochs,
      num_steps=training.num_steps,
      warmup_epochs=training.warmup_epochs,
      val_interval=config.logging.val_interval,
    )
    self.program = Program(config, self.mesh, self.length)
    self.abstract_state = self.program.abstract_state
    for line in sharding.notes(self.abstract_state):
      logging.warning("%s", line)
    self.init_state = self.program.init_state
    self.train_step = self.program.train_step
    self.eval_step = self.program.eval_step
    self.training_free: Segment = self.program.training_free

  def segmenter(self, params: dict) -> Segment:
    """Image [B H W 3] -> labels [B H W] uint8 with these parameters."""
    return functools.partial(self.program.labels, params)

  def _data(self, split: str) -> dict:
    """The fields of the config that choose examples."""
    data = self.config.data
    return dict(
      dataset=data.dataset,
      split=split,
      data_root=data.data_root,
      max_objects=data.max_objects or None,
      max_pixels=data.max_pixels,
    )

  def _shape(self) -> dict:
    """The fields of the config that shape batches."""
    config = self.config
    index, count = sharding.row_share(self.mesh)
    return dict(
      image_size=config.model.image_size,
      crop=tuple(config.data.crop) or None,
      num_threads=config.data.num_threads,
      cache=config.data.cache,
      process_index=index,
      process_count=count,
    )

  def train_batches(
    self, *, start: int, labels: np.ndarray | None
  ) -> Iterator[Batch]:
    """Endless batches from batch number `start` on.

    With `data.extra_dataset` the last rows of each batch are rendered scenes,
    their exact masks in the place of labels.
    """
    config = self.config
    extra = self._extra_rows()
    shared = dict(
      **self._shape(),
      augment=dict(config.augment) if config.data.augmentation else None,
      seed=config.seed,
      num_workers=config.data.num_workers,
      first_batch=start,
    )
    rows = config.training.batch_size - extra
    own = pipeline.make_train(
      **self._data(config.data.train_split),
      **shared,
      batch_size=rows,
      labels=labels,
    )
    if not extra:
      return own
    where = self._data("train") | {
      "dataset": config.data.extra_dataset,
      "max_objects": None,
    }
    shared |= dict(crop=None, batch_size=extra)
    rendered = distributed.first_alone(
      lambda: pipeline.make_train(**where, **shared)
    )
    return joined(own, rendered)

  def _extra_rows(self) -> int:
    """Rows of a batch that come from `data.extra_dataset`."""
    data, size = self.config.data, self.config.training.batch_size
    return round(data.extra_share * size) if data.extra_dataset else 0

  def eval_batches(self, split: str) -> pipeline.EvalBatches:
    """Every example of a split once, in order, the last batch padded."""
    rows = sharding.batch_rows(self.mesh)
    size = max(rows, self.config.training.batch_size // rows * rows)
    return pipeline.make_eval(
      **self._data(split), **self._shape(), batch_size=size
    )

  @functools.cached_property
  def val_batches(self) -> pipeline.EvalBatches:
    """The validation split; decoded images stay in memory if data.cache."""
    return self.eval_batches(self.config.data.val_split)

  def validate(self, state: TrainState) -> dict[str, float]:
    """Scores on the validation split under the names `val/...`."""
    done = evaluate.evaluate(
      self.segmenter(state.params), self.val_batches, mesh=self.mesh
    )
    return {
      f"val/{name}": done.summary[name]
      for name in ("ari", "fg_ari", "mbo", "miou")
    }

  @property
  def round_starts(self) -> list[int]:
    """Steps at which self-training rounds after the first begin."""
    count = self.config.composite.rounds
    return rounds.starts(self.length.num_steps, count)[1:]

  def place(self, batch: Batch, step: int) -> dict[str, jax.Array]:
    """Puts on the devices what the training step reads of a batch."""
    used = {k: batch[k] for k in ("image", "labels") if k in batch}
    if "labels" in used:
      zeros = np.zeros(len(batch["index"]), np.float32)
      used["exact"] = batch.get("exact", zeros)
      trusted = self.config.composite.trust * self.length.num_steps
      trusted /= self.config.composite.rounds
      used["distrust"] = np.full(
        len(batch["index"]), step >= trusted, np.float32
      )
    return sharding.shard_batch(used, self.mesh)

  def place_image(self, image: np.ndarray) -> jax.Array:
    """An image batch, split over the devices."""
    return sharding.shard_batch({"image": image}, self.mesh)["image"]

  def place_params(self, params: dict) -> dict:
    """Parameters where training has them."""
    return jax.tree.map(
      lambda p, s: jax.device_put(p, s.sharding),
      params,
      self.abstract_state.params,
    )

  def pictures(self, state: TrainState) -> dict[str, np.ndarray]:
    """Panels of the first validation images and the PCA of their slots."""
    batch = next(iter(self.val_batches))
    image = self.place_image(batch["image"])
    output = self.eval_step(state.params, image)
    # Whole rows: the compiler may have left widths split over `model`.
    rows = sharding.batch_sharding(self.mesh)
    slots, masks = jax.device_put((output.slots, output.masks), rows)
    painted = None
    if self.program.reconstruct is not None:
      painted = self.program.reconstruct(state.params, image, slots)
    elif output.decoded and output.decoded.prediction.shape == image.shape:
      painted = jax.device_put(output.decoded.prediction, rows)
    attention = sharding.local_rows(slots.attention)
    grid = build_encoder.grid_of(self.config)
    panels = visualise.panels(
      batch["image"],
      sharding.local_rows(masks).argmax(1),
      truth=batch.get("segmentation"),
      reconstruction=None if painted is None else sharding.local_rows(painted),
      attention=attention.reshape(*attention.shape[:2], *grid),
    )
    slots, active = map(sharding.local_rows, (slots.slots, slots.active))
    return {
      "panels": panels,
      "slot_pca": visualise.slot_pca(slots, active),
    }

  def teach(self, state: TrainState, first: int) -> np.ndarray:
    """Labels [N H W] of all training images for the round from step `first`.

    Those of the training-free step for round 0, else those of the model.
    """
    params = state.params if first else None
    return rounds.label_images(
      functools.partial(self.program.teach, params),
      self.eval_batches(self.config.data.train_split),
      num_examples=self.num_examples,
      mesh=self.mesh,
    )
