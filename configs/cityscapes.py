"""Cityscapes with the guide's values: 24 slots on a frozen ViT-L/14.

  python launch/convert.py --source=facebook/dinov2-large \
    --output=vitl14.safetensors
  python launch/train.py --config=configs/cityscapes.py --workdir=runs/s \
    --config.model.backbone_weights=vitl14.safetensors

Images are stretched to the square of 512 px; the backbone sees 518 (37 x 37
tokens). Checked by shape; the data set has to be prepared under
data.data_root first.
"""

from ml_collections import ConfigDict

from configs import default


def get_config(variant: str = "") -> ConfigDict:
  if variant:
    raise ValueError(f"configs/cityscapes.py has no variant {variant!r}")
  c = default.get_config().unlock()
  c.model.image_size = 512
  c.model.num_slots = 24
  c.model.slot_dim = 768
  c.model.num_iterations = 5
  c.model.dinov2_model = "dinov2_vitl14"
  c.model.token_stride = 8
  c.spectral.mode = "fused"
  c.mamba_slot.key_dim = 64
  c.diffusion.width = 256
  c.diffusion.num_tokens = 256
  c.composite.rounds = 0
  c.training.batch_size = 8
  c.training.learning_rate = 2e-4
  c.training.gradient_accumulation = 2
  c.data.dataset = "cityscapes"
  c.data.train_split = "train"
  c.data.val_split = "validation"
  c.data.num_workers = 8
  c.data.cache = False  # decoded, a thousand images are 0.8 GB
  c.data.crop = ()
  return c.lock()
