"""Writes weights the way others publish them, for the tests of conversion."""

import io
import pickle
import sys
import types
import zipfile

import numpy as np

# The two layouts, written down the other way round.
TO_AUTHORS = {
  "cls": "cls_token",
  "registers": "register_tokens",
  "patch_embed/": "patch_embed.proj.",
  "block_": "blocks.",
  "attn/out": "attn.proj",
  "mlp/up": "mlp.fc1",
  "mlp/down": "mlp.fc2",
  "attn_scale": "ls1.gamma",
  "mlp_scale": "ls2.gamma",
}
TO_HUB = {
  "cls": "embeddings.cls_token",
  "registers": "embeddings.register_tokens",
  "pos_embed": "embeddings.position_embeddings",
  "patch_embed/": "embeddings.patch_embeddings.projection.",
  "block_": "encoder.layer.",
  "attn/out": "attention.output.dense",
  "attn/": "attention.attention.",
  "mlp/up": "mlp.fc1",
  "mlp/down": "mlp.fc2",
  "attn_scale": "layer_scale1.lambda1",
  "mlp_scale": "layer_scale2.lambda1",
}


def to_torch(flat, names, patch=8):
  """Parameters -> torch's axis order and the names of one layout."""
  result = {}
  for path, array in flat.items():
    if path == "patch_embed/kernel":
      array = array.reshape(patch, patch, 3, -1).transpose(3, 2, 0, 1)
    elif path.endswith("kernel"):
      array = array.T
    for ours, theirs in names.items():
      path = path.replace(ours, theirs)
    path = path.replace("kernel", "weight").replace("scale", "weight")
    path = path.replace("layer_weight", "layer_scale").replace("/", ".")
    if names is TO_HUB and path.startswith("norm."):
      path = f"layer{path}"
    result[path] = np.ascontiguousarray(array)
  return result | {"mask_token": np.zeros((1, 192), np.float32)}


def authors_layout(flat, **options):
  """The authors' state dict, with query, key and value in one matrix."""
  tensors = to_torch(flat, TO_AUTHORS, **options)
  for name in [n for n in tensors if ".attn.query." in n]:
    parts = [
      tensors.pop(name.replace("query", p)) for p in ("query", "key", "value")
    ]
    tensors[name.replace("query", "qkv")] = np.concatenate(parts)
  return tensors


def write_pth(path, tensors, *, extra=None, compression=zipfile.ZIP_STORED):
  """A file as torch.save writes it, without torch."""
  storages, fake = [], types.ModuleType("torch")
  fake._utils = types.ModuleType("torch._utils")

  def named(name, module):
    function = types.new_class(name)
    function.__module__, function.__qualname__ = module, name
    return function

  fake.FloatStorage = named("FloatStorage", "torch")
  fake._utils._rebuild_tensor_v2 = named("_rebuild_tensor_v2", "torch._utils")

  class Storage:
    def __init__(self, array):
      self.array = array

  class Tensor:
    def __init__(self, array):
      self.array = array

    def __reduce__(self):
      stride = [s // 4 for s in self.array.strides]
      args = (Storage(self.array), 0, self.array.shape, tuple(stride), False)
      return fake._utils._rebuild_tensor_v2, (*args, {})

  class Pickler(pickle._Pickler):
    def persistent_id(self, item):
      if not isinstance(item, Storage):
        return None
      storages.append(np.ascontiguousarray(item.array))
      count = item.array.size
      key = str(len(storages) - 1)
      return "storage", fake.FloatStorage, key, "cpu", count

  stream = io.BytesIO()
  content = {k: Tensor(v) for k, v in tensors.items()} | (extra or {})
  before = {k: sys.modules.get(k) for k in ("torch", "torch._utils")}
  sys.modules |= {"torch": fake, "torch._utils": fake._utils}
  try:
    Pickler(stream, 2).dump(content)
  finally:
    for key, module in before.items():
      del sys.modules[key]
      if module is not None:
        sys.modules[key] = module
  with zipfile.ZipFile(path, "w", compression) as archive:
    archive.writestr("archive/data.pkl", stream.getvalue())
    archive.writestr("archive/byteorder", "little")
    for i, storage in enumerate(storages):
      archive.writestr(f"archive/data/{i}", storage.tobytes())
