"""Unsupervised object and panoptic segmentation in JAX."""

from spectraldiffusion_jax.version import __version__

__all__ = ["__version__"]
