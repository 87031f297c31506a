"""Images per second of DINOv2, beside transformers' model in the same run.

The two take turns, so that a change in the machine's load meets both. Without
torch and transformers the rows have our figures only.
"""

import importlib.util
import statistics
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from spectraldiffusion_jax.models.vit import Vit
from spectraldiffusion_jax.models.vit_variants import make_vit

# (name, pixels a side, images at once)
CASES = (
  ("dinov2_vits14", 224, 4),
  ("dinov2_vits14", 518, 1),
  ("dinov2_vitb14", 224, 2),
)


def flops_per_image(model: Vit, size: int) -> float:
  """Floating-point operations of the matrix products for one square image."""
  n = 1 + model.registers + (size // model.patch) ** 2
  feed_forward = (3 if model.gated else 2) * model.width * model.hidden
  block = n * (4 * model.width**2 + feed_forward) + 2 * n**2 * model.width
  return 2.0 * (model.depth * block + n * 3 * model.patch**2 * model.width)


def _ours(name: str, image: np.ndarray, dtype: jnp.dtype) -> Callable[[], None]:
  model = make_vit(name, dtype=dtype)
  patch = jnp.zeros((1, model.patch, model.patch, 3))
  params = jax.jit(model.init)(jax.random.key(0), patch)
  forward, image = jax.jit(model.apply), jnp.asarray(image)
  return lambda: jax.block_until_ready(forward(params, image).tokens)


def _theirs(name: str, image: np.ndarray) -> Callable[[], None]:
  import torch
  import transformers

  model = make_vit(name)
  reference = transformers.Dinov2Model(
    transformers.Dinov2Config(
      hidden_size=model.width,
      num_hidden_layers=model.depth,
      num_attention_heads=model.heads,
      image_size=518,
    )
  ).eval()
  pixels = torch.from_numpy(image).permute(0, 3, 1, 2).contiguous()

  def forward():
    with torch.inference_mode():
      reference(pixels)

  return forward


def _seconds(forward: Callable[[], None]) -> float:
  start = time.perf_counter()
  forward()
  return time.perf_counter() - start


def run(
  *,
  cases: Sequence[tuple[str, int, int]] = CASES,
  repeats: int = 5,
  dtype: str = "float32",
  torch: bool = True,
) -> list[dict]:
  """Measures each case; a row is the median over the repeats.

  Args:
    cases: (name, pixels a side, images at once).
    repeats: forward passes of each, after one that compiles.
    dtype: of our matrix products; torch stays at float32.
    torch: compare with torch on the CPU where it is installed.

  Returns:
    Rows of model, size, batch, device, images_per_s, gflop_per_s and, with
    torch, torch_images_per_s and ratio: the median ratio of the paired times.
  """
  installed = map(importlib.util.find_spec, ("torch", "transformers"))
  compare = torch and jax.default_backend() == "cpu" and all(installed)
  rows = []
  for name, size, batch in cases:
    image = np.random.default_rng(0).normal(size=(batch, size, size, 3))
    image = image.astype(np.float32)
    runners = [_ours(name, image, jnp.dtype(dtype))]
    if compare:
      runners.append(_theirs(name, image))
    for forward in runners:
      forward()
    times = [[_seconds(forward) for forward in runners] for _ in range(repeats)]
    ours, *theirs = (statistics.median(t) for t in zip(*times, strict=True))
    row = {
      "model": name,
      "size": size,
      "batch": batch,
      "device": jax.devices()[0].device_kind,
      "images_per_s": batch / ours,
      "gflop_per_s": flops_per_image(make_vit(name), size) * batch / ours / 1e9,
    }
    if theirs:
      row["torch_images_per_s"] = batch / theirs[0]
      row["ratio"] = statistics.median(b / a for a, b in times)
    rows.append(row)
  return rows
