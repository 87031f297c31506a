"""Segments your own images.

  python launch/predict.py --workdir=runs/c --images=photos --output=out
  python launch/predict.py --workdir=pretrained:clevr --images='a/*.png' \
    --output=out

Writes label maps (NAME_labels.png, ids as they are), coloured masks, overlays
and one contact sheet, and nothing outside --output. Of an animation the first
frame is read. Exit code 0: all done. 1: some image could not be read (named,
the others are done). 2: a mistake of yours, named in one line; so is a result
that is there already without --overwrite, before any work is done.
"""

import pathlib
import sys

from absl import flags

from spectraldiffusion_jax import command

WORKDIR = flags.DEFINE_string(
  "workdir", None, "Run to load: W, W@best, W@STEP or pretrained:NAME."
)
IMAGES = flags.DEFINE_string("images", None, "Folder, file or quoted glob.")
OUTPUT = flags.DEFINE_string("output", None, "Folder for the results.")
OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace earlier results.")
MAX_PIXELS = flags.DEFINE_integer(
  "max_pixels", 64_000_000, "Largest image that is read, in pixels.", 1
)


def main(argv: list[str]) -> int:
  """Finds the images, loads the model, writes the results."""
  command.no_arguments(argv)
  workdir = command.require(WORKDIR, "workdir")
  images = command.require(IMAGES, "images")
  output = pathlib.Path(command.require(OUTPUT, "output"))
  from spectraldiffusion_jax import predict, segmenter
  from spectraldiffusion_jax.errors import one_line

  paths = predict.find_images(images, output=output)
  predict.check_output(paths, output, overwrite=OVERWRITE.value)
  summary = predict.predict(
    segmenter.load(workdir),
    paths,
    output,
    max_pixels=MAX_PIXELS.value,
    overwrite=OVERWRITE.value,
  )
  for path, reason in summary.failed:
    print(one_line(f"skipped {path}: {reason}"), file=sys.stderr)
  print(
    f"{len(summary.written)} images segmented, {len(summary.failed)} skipped;"
    f" see {output / 'contact_sheet.png'}"
  )
  return 1 if summary.failed else 0


if __name__ == "__main__":
  command.run(main)
