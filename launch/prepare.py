"""Prepares a data set for random access; nothing is replaced unasked.

  python launch/prepare.py --dataset=clevr_with_masks --source=DIR \
    --data_dir=data
  python launch/prepare.py --dataset=procedural_clevr/easy_64 --data_dir=data

The clevr_with_masks source is the public GZIP TFRecord file, or the folder
that holds it. Exit code 2: a mistake of yours, named in one line.
"""

from absl import flags

from spectraldiffusion_jax import command

DATASET = flags.DEFINE_string(
  "dataset", None, "clevr_with_masks or procedural_clevr/NAME."
)
SOURCE = flags.DEFINE_string(
  "source", None, "File or folder to read, for clevr_with_masks."
)
DATA_DIR = flags.DEFINE_string(
  "data_dir", "data", "Folder of prepared data sets."
)
OVERWRITE = flags.DEFINE_bool(
  "overwrite", False, "Replace the data set if it is already there."
)


def main(argv: list[str]) -> None:
  """Makes one call and prints what came of it."""
  command.no_arguments(argv)
  from spectraldiffusion_jax.data import prepare  # after the flags are checked

  summary = prepare.prepare(
    command.require(DATASET, "dataset"),
    data_root=command.require(DATA_DIR, "data_dir"),
    source=SOURCE.value,
    overwrite=OVERWRITE.value,
  )
  print(summary)


if __name__ == "__main__":
  command.run(main)
