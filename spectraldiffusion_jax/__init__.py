"""Unsupervised object and panoptic segmentation in JAX.

import spectraldiffusion_jax as sd
model = sd.load("runs/c")            # or "pretrained:clevr"
for found in model.segment(images):  # PIL images or arrays of any size
  found.labels                       # [H W] int32, 0 = background
"""

from spectraldiffusion_jax.version import __version__

__all__ = ["Segmentation", "Segmenter", "__version__", "load", "load_backbone"]

_HOMES = {
  "load": "segmenter",
  "Segmenter": "segmenter",
  "Segmentation": "segmenter",
  "load_backbone": "backbone",
}


def __getattr__(name: str):
  """Loads the library face on first use: `import` alone stays fast."""
  if name not in _HOMES:
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
  import importlib

  return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
