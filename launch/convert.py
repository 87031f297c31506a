r"""Converts published DINO weights into one checked safetensors file.

  python launch/convert.py --source=facebook/dinov2-base \
    --output=vitb14.safetensors
  python launch/convert.py --source=dinov2_vitb14_pretrain.pth \
    --output=vitb14.safetensors

The source is a .safetensors or .pth file, a folder that holds one, or a model
on the Hugging Face hub. Pickles are read without being run. Every tensor's
name and shape is checked; the file carries a checksum that is verified
whenever it is loaded.

Exit code 0: written. 2: a mistake, named in one line, and nothing written.
"""

from absl import flags

from spectraldiffusion_jax import command

SOURCE = flags.DEFINE_string(
  "source", None, "File, folder or hub id of the published weights."
)
OUTPUT = flags.DEFINE_string("output", None, "File to write.")
MODEL = flags.DEFINE_string(
  "model", "", "Refuse any other model than this; empty: take what is there."
)


def main(argv: list[str]) -> None:
  """Reads, converts, writes, and says what it did."""
  command.no_arguments(argv)
  from spectraldiffusion_jax import convert  # after the flags are checked

  print(
    convert.convert_file(
      command.require(SOURCE, "source"),
      command.require(OUTPUT, "output"),
      name=MODEL.value,
    )
  )


if __name__ == "__main__":
  command.run(main)
