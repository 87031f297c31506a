"""Trains a config's cells, the full model less one part each, and compares.

  python launch/ablate.py --config=configs/procedural.py --workdir=runs/a \
    --seeds=3 --config.training.num_steps=240
  python launch/ablate.py --config=configs/clevr.py:tiny --workdir=runs/b \
    --cells=full,no_gmm_prior,gru_update
  python launch/ablate.py --trained=pretrained:clevr --workdir=runs/c \
    --split='train[80%:]' --data_root=data

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
TRAINED = flags.DEFINE_string(
  "trained", "", "Run whose parts are switched off without training anew."
)
DATASET = flags.DEFINE_string(
  "dataset", "", "With --trained: data set; default: the run's own."
)
DATA_ROOT = flags.DEFINE_string(
  "data_root", "", "With --trained: folder of data sets; default: the run's."
)
SPLIT = flags.DEFINE_string("split", "test", "TFDS split that is scored.")


def main(argv: list[str]) -> int:
  """One of two calls."""
  command.no_arguments(argv)
  folder = pathlib.Path(command.require(WORKDIR, "workdir"))
  from spectraldiffusion_jax.ablation import runner, trained

  shared = dict(names=CELLS.value, split=SPLIT.value)
  if TRAINED.value:
    where = dict(dataset=DATASET.value, data_root=DATA_ROOT.value)
    return trained.run(TRAINED.value, folder, **shared, **where)
  config = command.require(CONFIG, "config")
  return runner.run(config, folder, seeds=SEEDS.value, **shared)


if __name__ == "__main__":
  command.run(main)
