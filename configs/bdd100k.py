"""BDD100K: the values of Cityscapes, whose classes it shares.

  python launch/train.py --config=configs/bdd100k.py --workdir=runs/b \
    --config.model.backbone_weights=vitl14.safetensors

Checked by shape; the data set has to be prepared under data.data_root first.
"""

from ml_collections import ConfigDict

from configs import cityscapes


def get_config(variant: str = "") -> ConfigDict:
  if variant:
    raise ValueError(f"configs/bdd100k.py has no variant {variant!r}")
  c = cityscapes.get_config().unlock()
  c.data.dataset = "bdd100k"
  return c.lock()
