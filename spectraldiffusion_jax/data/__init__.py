"""Data sets, transforms and the grain input pipeline; no JAX compute."""
