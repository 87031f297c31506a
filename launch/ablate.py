"""Trains a config's cells, the full model less one part each, and compares.

  python launch/ablate.py --config=configs/procedural.py --workdir=runs/a \
    --seeds=3 --config.training.num_steps=240
  python launch/ablate.py --config=configs/clevr.py:tiny --workdir=runs/b \
    --cells=full,no_gmm_prior,gru_update

Each run is a process of its own. Started again, finished ones are kept and a
killed one goes on from its checkpoint. Writes ablation.json, ablation.md and
ablation.png after every run. The cells: spectraldiffusion_jax/ablation.
"""

import pathlib

from absl import flags
from ml_collections import config_flags

from spectraldiffusion_jax import command

CONFIG = config_flags.DEFINE_config_file(
  "config", None, "Config of the full model.", lock_config=True
)
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of runs and tables.")
SEEDS = flags.DEFINE_integer("seeds", 3, "Runs of every cell.", 1)
CELLS = flags.DEFINE_list("cells", [], "Names of cells; default: all.")
SPLIT = flags.DEFINE_string("split", "test", "TFDS split that is scored.")


def main(argv: list[str]) -> int:
  """One call."""
  command.no_arguments(argv)
  from spectraldiffusion_jax.ablation import runner

  return runner.run(
    command.require(CONFIG, "config"),
    pathlib.Path(command.require(WORKDIR, "workdir")),
    seeds=SEEDS.value,
    names=CELLS.value,
    split=SPLIT.value,
  )


if __name__ == "__main__":
  command.run(main)
