"""CLEVR with masks.

  python launch/prepare.py --dataset=clevr_with_masks --source=DIR \
    --data_dir=data
  python launch/train.py --config=configs/clevr.py:tiny --workdir=runs/c
  python launch/evaluate.py --workdir=runs/c --split='train[90%:]'

Variants: none (the guide's values, on a frozen DINOv2 ViT-B/14), `small`
(trained from scratch, 128 px, the published checkpoint), `tiny` (64 px,
minutes on a laptop), `clevr6` (as `small`, scenes of at most 6 objects).
"""

from ml_collections import ConfigDict

from configs import default

VARIANTS = ("", "small", "tiny", "clevr6")


def get_config(variant: str = "") -> ConfigDict:
  if variant not in VARIANTS:
    raise ValueError(
      f"configs/clevr.py has no variant {variant!r}; there are "
      f"{', '.join(VARIANTS[1:])}"
    )
  c = default.get_config().unlock()
  if not variant:
    c.model.dinov2_model = "dinov2_vitb14"
    c.model.slot_dim = 768
    c.model.token_stride = 14
  if variant == "tiny":
    c.model.image_size = 64
    c.model.token_stride = 2
    c.training.batch_size = 16
    c.training.num_epochs = 10
    c.training.warmup_epochs = 0.5
    c.training.learning_rate = 2e-3
  if variant == "clevr6":
    c.data.max_objects = 6
    c.model.num_slots = 7
  return c.lock()
