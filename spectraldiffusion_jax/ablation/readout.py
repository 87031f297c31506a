"""What the contents of slots know of their objects, read out linearly.

Masks are one half of what slots are for; the other is that a slot describes
its object (property prediction: Locatello et al. 2020, section 4.2). Here a
ridge regression from slot contents predicts what the true mask says of the
object in the image: no labels but masks are needed.
"""

from collections.abc import Callable, Iterable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from spectraldiffusion_jax import metrics
from spectraldiffusion_jax.ops import color
from spectraldiffusion_jax.run import Run
from spectraldiffusion_jax.types import Batch

PROPERTIES = {"colour": [0, 1], "shading": [2, 3], "size": [4]}
"""Which of an object's numbers belong together: the means of CIELAB's a and b;
mean and deviation of L; log of the pixels."""
MIN_PIXELS = 8
"""Of an object that is read out at all."""
RIDGE = 1e-2
"""Penalty, as a share of the variance of a feature."""


def read_out(run: Run, params: dict, split: str) -> dict[str, float]:
  """R^2 of every property on a split, with these parameters."""

  def read(image):
    output = run.eval_step(params, run.place_image(image))
    return output.slots.slots, output.masks.argmax(1)

  return explained(*pairs(run.eval_batches(split), read))


def describe(
  lab: Float[np.ndarray, "H W 3"], mask: Bool[np.ndarray, "H W"]
) -> Float[np.ndarray, " 5"]:
  """The numbers of one object that PROPERTIES are made of, of CIELAB."""
  light, a, b = lab[mask].T
  shading = light.mean(), light.std()
  return np.array([a.mean(), b.mean(), *shading, np.log(mask.sum())])


def pairs(
  batches: Iterable[Batch], read: Callable
) -> tuple[
  Float[np.ndarray, "n D"], Float[np.ndarray, "n 5"], Int[np.ndarray, " n"]
]:
  """Slot contents and properties of all objects, and whose image they are in.

  An object's slot is the one whose segment has the largest IoU with it.
  Objects of fewer than MIN_PIXELS pixels are left out.

  Args:
    batches: of one pass over a split, in one process.
    read: image [B H W 3] -> slot contents [B K D] and labels [B H W] that
      index them.
  """
  contents, properties, images = [], [], []
  for batch in batches:
    slots, labels = map(np.asarray, read(batch["image"]))
    for i in np.flatnonzero(batch["mask"]):
      truth = batch["segmentation"][i]
      lab = np.asarray(color.srgb_to_lab(jnp.asarray(batch["image"][i])))
      table = metrics.contingency(truth, labels[i])
      best = table.pred_ids[metrics.overlaps(table.counts).argmax(1)]
      for one, slot in zip(table.true_ids, best, strict=True):
        mask = truth == one
        if one > 0 and mask.sum() >= MIN_PIXELS:
          contents.append(slots[i, slot])
          properties.append(describe(lab, mask))
          images.append(batch["index"][i])
  return np.array(contents), np.array(properties), np.array(images, int)


def explained(
  contents: Float[np.ndarray, "n D"],
  properties: Float[np.ndarray, "n 5"],
  images: Int[np.ndarray, " n"],
) -> dict[str, float]:
  """R^2 of each property, of images that the regression has not seen.

  Two folds, images with even and odd index; 1 is perfect, 0 as good as the
  mean, and it may be below. Nothing where a fold has no object.
  """
  if len(set(images % 2)) < 2:
    return {}
  left = np.zeros_like(properties)
  for fold in (0, 1):
    seen = images % 2 != fold
    left[~seen] = properties[~seen] - _ridge(
      contents[seen], properties[seen], contents[~seen]
    )
  share = (left**2).sum(0) / ((properties - properties.mean(0)) ** 2).sum(0)
  return {
    name: float(1 - share[columns].mean())
    for name, columns in PROPERTIES.items()
  }


def _ridge(x, y, new):
  """Predictions for new rows: standardised features, an intercept."""
  middle, spread = x.mean(0), x.std(0) + 1e-6
  x, new = (x - middle) / spread, (new - middle) / spread
  gram = x.T @ x + RIDGE * len(x) * np.eye(x.shape[1])
  return y.mean(0) + new @ np.linalg.solve(gram, x.T @ (y - y.mean(0)))
