"""Says before a run whether it fits a machine, and what bounds its speed.

  python launch/plan.py --config=configs/cityscapes.py --topology=v5e:16x16 \
    --config.training.batch_size=256 --config.mesh.fsdp=16
  python launch/plan.py --config=configs/clevr.py --topology=cpu:8

Compiles the training and the evaluation step for those devices, which need
not be there: TPU topologies take `pip install '.[tpu]'`, cpu:N simulates N
devices. No data is read and no array is made.

Exit code 0: it fits. 1: it does not, and the last line says what to change.
2: a mistake, named in one line.
"""

import os
import pathlib

from absl import flags
from ml_collections import config_flags

from spectraldiffusion_jax import command

CONFIG = config_flags.DEFINE_config_file(
  "config", None, "Config file, with an optional :variant.", lock_config=True
)
TOPOLOGY = flags.DEFINE_string(
  "topology", None, "v5e:16x16, v6e:16x16, v5p:4x4x8, v4:4x4x4 or cpu:8."
)
OUTPUT = flags.DEFINE_string(
  "output", "", "Folder for the plan as JSON and text; empty: print only."
)

STEPS = flags.DEFINE_list(
  "steps", ["train", "eval"], "Steps to compile, of train and eval."
)


def main(argv: list[str]) -> int:
  """Compiles, prints, and writes if asked to."""
  command.no_arguments(argv)
  config = command.require(CONFIG, "config")
  topology = command.require(TOPOLOGY, "topology")
  # Before JAX is there: programs for TPUs are compiled on the CPU, and libtpu
  # would look for the machine it runs on.
  os.environ["JAX_PLATFORMS"] = "cpu"
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
  os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
  from spectraldiffusion_jax.plan import report, table

  found = report.plan(config, topology, steps=STEPS.value)
  text = table.table(found)
  print(text)
  if OUTPUT.value:
    print(f"written: {report.save(found, text, pathlib.Path(OUTPUT.value))}")
  return 1 if found.fits is False else 0


if __name__ == "__main__":
  command.run(main)
