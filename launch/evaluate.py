"""Scores a trained model on a split.

  python launch/evaluate.py --workdir=runs/p --split=test
  python launch/evaluate.py --workdir=pretrained:clevr --split='train[90%:]' \
    --dataset=clevr_with_masks --data_root=data

Prints a table with the model beside the training-free step on the same
images, and writes DATASET_SPLIT.json under WORKDIR/eval or --output. Runs in
several processes like launch/train.py.
"""

import functools
import pathlib

from absl import flags

from spectraldiffusion_jax import command

WORKDIR = flags.DEFINE_string(
  "workdir", None, "Run to load: W, W@best, W@STEP or pretrained:NAME."
)
SPLIT = flags.DEFINE_string(
  "split", None, "TFDS split, for example test or 'train[90%:]'."
)
DATASET = flags.DEFINE_string(
  "dataset", "", "Data set; default: the one the run was trained on."
)
DATA_ROOT = flags.DEFINE_string(
  "data_root", "", "Folder of prepared data sets; default: the run's."
)
OUTPUT = flags.DEFINE_string(
  "output", "", "Folder for the report; default: WORKDIR/eval."
)
BATCH_SIZE = flags.DEFINE_integer(
  "batch_size", 0, "Images a step; default: the run's.", 0
)
CLUSTER = command.define_cluster_flags()

SET = flags.DEFINE_multi_string(
  "set", [], "Field to change, such as spectral.count=eigengap; repeatable."
)


def main(argv: list[str]) -> int | None:
  """Loads, scores, prints, writes."""
  command.no_arguments(argv)
  workdir = command.require(WORKDIR, "workdir")
  split = command.require(SPLIT, "split")
  from spectraldiffusion_jax import distributed

  distributed.start(**CLUSTER())  # before anything touches a device
  from spectraldiffusion_jax import reports

  output = OUTPUT.value
  if not output and workdir.startswith("pretrained:"):
    output = "eval"
  evaluate = functools.partial(
    reports.evaluate_run,
    workdir,
    split,
    dataset=DATASET.value,
    data_root=DATA_ROOT.value,
    batch_size=BATCH_SIZE.value,
    settings=SET.value,
    output=pathlib.Path(output or f"{workdir.partition('@')[0]}/eval"),
  )
  distributed.together(lambda: evaluate() and 0)


if __name__ == "__main__":
  command.run(main)
