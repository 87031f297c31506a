"""Trains a model; started again with the same --workdir, it continues.

  python launch/train.py --config=configs/procedural.py --workdir=runs/p
  python launch/train.py --config=configs/clevr.py:tiny --workdir=runs/c \
    --config.training.num_steps=500

In several processes start the same command in each, and add
--coordinator=HOST:PORT --num_processes=N --process_id=I where no cluster can
be detected; launch/recipes/ has it ready for Slurm, GKE and Cloud TPU.

Exit code 0: complete. 75: stopped by a signal, saved, start it again to go
on. 2: a mistake of yours, named in one line. 3: the loss diverged. 69: another
process is gone, start all again to go on.
"""

from absl import flags
from ml_collections import config_flags

from spectraldiffusion_jax import command

CONFIG = config_flags.DEFINE_config_file(
  "config", None, "Config file, with an optional :variant.", lock_config=True
)
WORKDIR = flags.DEFINE_string(
  "workdir", None, "Folder of the run: checkpoints, metrics, pictures."
)
EXP_NAME = flags.DEFINE_string(
  "exp_name", "", "Name of a subfolder of --workdir for this run."
)
RESUME = flags.DEFINE_string(
  "resume", "", "Workdir of another run whose newest state to start from."
)
CLUSTER = command.define_cluster_flags()


def main(argv: list[str]) -> int:
  """Parses nothing but flags and makes one call."""
  del argv
  config = command.require(CONFIG, "config")
  workdir = command.require(WORKDIR, "workdir")
  from spectraldiffusion_jax import distributed  # after the flags are checked

  distributed.start(**CLUSTER())  # before anything touches a device
  from spectraldiffusion_jax import train_loop

  return distributed.together(
    lambda: train_loop.train_and_evaluate(
      config, workdir, exp_name=EXP_NAME.value, resume=RESUME.value
    )
  )


if __name__ == "__main__":
  command.run(main)
