"""CLEVR with masks.

  python launch/prepare.py --dataset=clevr_with_masks --source=DIR \
    --data_dir=data
  python launch/train.py --config=configs/clevr.py:tiny --workdir=runs/c
  python launch/evaluate.py --workdir=runs/c --split='train[90%:]'

Variants: none (128 px, from the images alone), `small` (the same beside
rendered scenes with exact masks: the published checkpoint), `tiny` (64 px,
minutes on a laptop), `clevr6` (scenes of at most 6 objects), `dinov2` (the
guide's values on a frozen ViT-B/14, whose weights are yours to bring:
--config.model.backbone_weights=FILE of launch/convert.py).
"""

from ml_collections import ConfigDict

from configs import default

VARIANTS = ("", "small", "tiny", "clevr6", "dinov2")


def get_config(variant: str = "") -> ConfigDict:
  if variant not in VARIANTS:
    raise ValueError(
      f"configs/clevr.py has no variant {variant!r}; there are "
      f"{', '.join(VARIANTS[1:])}"
    )
  c = default.get_config().unlock()
  if variant == "dinov2":
    c.model.dinov2_model = "dinov2_vitb14"
    c.model.backbone_size = 224  # 16 x 16 tokens; the images' own 126 has 9 x 9
    c.model.slot_dim = 768
    c.spectral.mode = "fused"
    c.mamba_slot.key_dim = 64
    c.diffusion.width = 256
    c.diffusion.num_tokens = 0
    c.composite.rounds = 0
  else:
    c.training.batch_size = 16
    c.training.num_steps = 900
    c.training.warmup_epochs = 1.0
    c.training.learning_rate = 3e-3
    c.training.weight_decay = 1e-4
    c.data.train_split = "train[:80%]"
    c.data.val_split = "train[80%:]"
    c.composite.rounds = 2
    c.logging.log_interval = 25
    c.logging.val_interval = 9
    c.logging.image_interval = 450
  if variant == "small":
    c.data.extra_dataset = "procedural_clevr/hard_128"
    c.training.num_steps = 2400  # 900 in two rounds lose 0.005 ARI
    c.composite.rounds = 3
  if variant == "tiny":
    c.model.image_size = 64
    c.model.token_stride = 2
    c.training.num_steps = 500
  if variant == "clevr6":
    c.data.max_objects = 6
    c.model.num_slots = 7
  return c.lock()
