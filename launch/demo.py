"""Trains, evaluates and draws on the embedded data set: `make demo`.

  python launch/demo.py --config=configs/procedural.py --output=demo

Ends with one line `RESULT {json}`: scores on the test split of the trained
model, of the same model before its first step (`*_step0`) and of the
training-free step (`*_training_free`), and the seconds since the start.
"""

import pathlib

from absl import flags
from ml_collections import config_flags

from spectraldiffusion_jax import command

CONFIG = config_flags.DEFINE_config_file(
  "config", None, "Config file, with an optional :variant.", lock_config=True
)
OUTPUT = flags.DEFINE_string(
  "output", "demo", "Folder of the run, the report and the pictures."
)
STARTED = flags.DEFINE_float(
  "started", 0.0, "Unix time to count seconds from; 0 = now."
)


def main(argv: list[str]) -> int:
  """One call."""
  command.no_arguments(argv)
  from spectraldiffusion_jax import demo

  return demo.run(
    command.require(CONFIG, "config"),
    pathlib.Path(command.require(OUTPUT, "output")),
    started=STARTED.value,
  )


if __name__ == "__main__":
  command.run(main)
