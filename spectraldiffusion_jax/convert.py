"""Published weights -> this package's parameters, every tensor accounted for.

Two families of names are understood, and told apart by nothing but the names:
the authors' .pth files (`blocks.0.attn.qkv.weight`) and Hugging Face's
(`encoder.layer.0.attention.attention.query.weight`, and the renamed modules of
transformers 5, `attention.q_proj`). Fused matrices are split, dense kernels
transposed, convolutions flattened.
"""

import dataclasses
import math
import pathlib
import re
from collections.abc import Mapping

import numpy as np
from flax import traverse_util

from spectraldiffusion_jax import weights
from spectraldiffusion_jax.errors import UserError
from spectraldiffusion_jax.models import vit_variants
from spectraldiffusion_jax.models.vit import Vit
from spectraldiffusion_jax.pth import read_pth

# Applied in this order, each at most once, to names whose dots became slashes.
_RENAMES = (
  (r"^((module|backbone|teacher|model|vit|dinov2(_with_registers)?)/)+", ""),
  (r"^embeddings/", ""),
  (r"^(?:encoder/layer|layers?|blocks(?:/\d+)?)/(\d+)/", r"block_\1/"),
  (r"^(patch_embed/proj|patch_embeddings(/projection)?)/", "patch_embed/"),
  (r"^cls_token$", "cls"),
  (r"^position_embeddings$", "pos_embed"),
  (r"^(register_tokens|storage_tokens)$", "registers"),
  (r"^layernorm/", "norm/"),
  (r"/layernorm_before/", "/norm1/"),
  (r"/layernorm_after/", "/norm2/"),
  (r"/attention/(attention/query|q_proj)/", "/attn/query/"),
  (r"/attention/(attention/key|k_proj)/", "/attn/key/"),
  (r"/attention/(attention/value|v_proj)/", "/attn/value/"),
  (r"/(attention/(output/dense|o_proj)|attn/proj)/", "/attn/out/"),
  (r"/(mlp/(fc1|up_proj)|intermediate/dense)/", "/mlp/up/"),
  (r"/mlp/gate_proj/", "/mlp/gate/"),
  (r"/(mlp/(fc2|w3|weights_out|down_proj)|output/dense)/", "/mlp/down/"),
  (r"/mlp/(w12|weights_in)/", "/mlp/gate+up/"),
  (r"/attn/qkv/", "/attn/query+key+value/"),
  (r"/(ls1/gamma|layer_scale1/lambda1)$", "/attn_scale"),
  (r"/(ls2/gamma|layer_scale2/lambda1)$", "/mlp_scale"),
)

_BLOCK = re.compile(r"block_(\d+)/").match
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+").fullmatch
_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")

# Parts of training that features do not need, and constants.
_UNUSED = r"(^|/)(mask_token|bias_mask|periods)$|^(head|pooler|classifier)/"


@dataclasses.dataclass(frozen=True)
class Conversion:
  """What a conversion did."""

  name: str  # key of VARIANTS
  params: dict  # nested, float32
  unused: tuple[str, ...]  # tensors left out on purpose


def _rename(name: str) -> str:
  path = name.replace(".", "/")
  for pattern, replacement in _RENAMES:
    path = re.sub(pattern, replacement, path, count=1)
  return path


def _leaf(path: str, array: np.ndarray) -> tuple[str, np.ndarray]:
  """Flax's name and axis order for a torch tensor."""
  array = np.asarray(array).astype(np.float32)
  stem, _, last = path.rpartition("/")
  if last != "weight":
    return path, array
  if array.ndim == 1:
    return f"{stem}/scale", array
  if array.ndim == 4:  # [F C p p] -> [p p C F], the order of space_to_depth
    array = array.transpose(2, 3, 1, 0).reshape(-1, array.shape[0])
  else:
    array = array.T
  return f"{stem}/kernel", array


def flatten_tensors(
  tensors: Mapping[str, np.ndarray],
) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
  """Renamed, split and transposed tensors; names of those left out.

  Args:
    tensors: a state dict of either family of names.

  Returns:
    Parameter path -> float32 array, and the tensors that features do not need.

  Raises:
    UserError: a fused matrix does not split, or two tensors have one meaning.
  """
  flat, unused = {}, []
  for name, array in tensors.items():
    path = _rename(name)
    if re.search(_UNUSED, path):
      unused.append(name)
      continue
    if not array.size:
      raise UserError(f"{name} is {array.shape}: it holds nothing")
    fused = re.search(r"/([a-z]+(?:\+[a-z]+)+)/", path)
    parts = fused[1].split("+") if fused else [""]
    if fused and (array.ndim == 0 or len(array) % len(parts)):
      raise UserError(f"{name} is {array.shape}: not {len(parts)} equal parts")
    pieces = np.split(array, len(parts)) if fused else [array]
    for part, piece in zip(parts, pieces, strict=True):
      target = path.replace(fused[1], part) if fused else path
      if part == "key" and f"{name}_mask" in tensors:
        continue  # DINOv3 multiplies the key's bias by a mask of zeros
      target, piece = _leaf(target, piece)
      if target in flat:
        raise UserError(f"two tensors of the source are {target}: {name}")
      flat[target] = piece
  return flat, tuple(unused)


def identify(flat: Mapping[str, np.ndarray]) -> str:
  """Name of the published model that has these sizes.

  Raises:
    UserError: no vision transformer, or none of the table.
  """
  kernel = flat.get("patch_embed/kernel")
  if kernel is None or kernel.ndim != 2 or not kernel.size:
    raise UserError(
      "the source is no vision transformer of the DINO family: it has no patch "
      f"embedding; its tensors begin {', '.join(sorted(flat)[:3])}"
    )
  found = {
    "patch": math.isqrt(len(kernel) // 3),
    "width": kernel.shape[1],
    "depth": 1 + max([int(m[1]) for m in map(_BLOCK, flat) if m], default=-1),
    "registers": np.size(flat.get("registers", ())) // kernel.shape[1],
  }
  for name, fields in vit_variants.VARIANTS.items():
    if all(fields.get(k, 0) == v for k, v in found.items()):
      return name
  sizes = ", ".join(f"{k} {v}" for k, v in found.items())
  raise UserError(
    f"the source has {sizes}: no known model; known are "
    f"{', '.join(vit_variants.VARIANTS)}"
  )


def check_params(model: Vit, flat: Mapping[str, np.ndarray]) -> None:
  """Compares parameters, in the plain layout, with what the model expects.

  Raises:
    UserError: something is missing, left over, misshapen or not finite.
  """
  expected = traverse_util.flatten_dict(
    vit_variants.abstract_params(model.clone(scan=False)), sep="/"
  )
  wrong = [
    f"{key} is {flat[key].shape}, should be {expected[key].shape}"
    for key in sorted(expected.keys() & flat.keys())
    if flat[key].shape != expected[key].shape
  ]
  problems = [
    ("missing", sorted(expected.keys() - flat.keys())),
    ("left over", sorted(flat.keys() - expected.keys())),
    ("misshapen", wrong),
    ("not finite", [k for k, v in flat.items() if not np.isfinite(v).all()]),
  ]
  text = "; ".join(
    f"{len(names)} {what} ({', '.join(names[:3])}{', ...' * (len(names) > 3)})"
    for what, names in problems
    if names
  )
  if text:
    raise UserError(f"the weights do not fit the model: {text}")


def convert_tensors(
  tensors: Mapping[str, np.ndarray], *, name: str = ""
) -> Conversion:
  """Checks and converts the tensors of a published file.

  Args:
    tensors: as the file names them.
    name: the model they must be of; "" takes what their sizes say.

  Raises:
    UserError: another model than asked for, or a tensor is missing, left
      over, of a wrong shape or not finite.
  """
  flat, unused = flatten_tensors(tensors)
  found = identify(flat)
  if name and name != found:
    raise UserError(f"these are the weights of {found}, not of {name}")
  check_params(vit_variants.make_vit(found), flat)
  params = traverse_util.unflatten_dict(flat, sep="/")
  return Conversion(name=found, params=params, unused=unused)


def convert_file(source: str, output: str, *, name: str = "") -> str:
  """Converts `source` into the file `output`; returns a report of it.

  Args:
    source: as for `read_source`.
    output: file to write.
    name: as for `convert_tensors`.
  """
  if pathlib.Path(output).is_dir() or _same_file(source, output):
    raise UserError(
      f"--output={output} is a folder or the source itself: give another file"
    )
  done = convert_tensors(read_source(source), name=name)
  digest = weights.save_weights(output, done.name, done.params)
  leaves = list(traverse_util.flatten_dict(done.params).values())
  return (
    f"{output}: {done.name}, {len(leaves)} tensors, "
    f"{sum(x.size for x in leaves):,} parameters, sha256 {digest}\n"
    f"left out, not needed for features: {', '.join(done.unused) or 'nothing'}"
  )


def _same_file(a: str, b: str) -> bool:
  first, second = pathlib.Path(a).expanduser(), pathlib.Path(b)
  if first.is_dir():
    return second.resolve().parent == first.resolve() and second.exists()
  return first.resolve() == second.resolve()


def read_source(source: str) -> dict[str, np.ndarray]:
  """Tensors of a file, of a folder, or of a model on the Hugging Face hub.

  Raises:
    UserError: nothing there, several candidates, unreadable, or no network.
  """
  path = pathlib.Path(source).expanduser()
  if path.is_dir():
    path = _only_file(path)
  elif not path.exists() and _HUB_ID(source) and path.suffix not in _SUFFIXES:
    path = _download(source)
  if weights.file_kind(path) == "pth":
    return read_pth(path)
  return weights.read_safetensors(path)[0]


def _only_file(folder: pathlib.Path) -> pathlib.Path:
  for suffix in _SUFFIXES:
    files = sorted(folder.glob(f"*{suffix}"))
    if len(files) > 1:
      names = ", ".join(f.name for f in files[:4])
      raise UserError(f"{folder} holds {names}: give one of these files")
    if files:
      return files[0]
  raise UserError(f"{folder} holds no .safetensors and no .pth file")


def _download(repo: str) -> pathlib.Path:
  manual = (
    f"by hand: where there is a network, `hf download {repo} model.safetensors "
    "--local-dir DIR`, then copy DIR here and give --source=DIR"
  )
  try:
    import huggingface_hub
  except ImportError:
    raise UserError(
      f"no file {repo} here, and no huggingface_hub to fetch it (pip install "
      f"'spectraldiffusion_jax[convert]'); {manual}"
    ) from None
  file = "model.safetensors"
  try:
    path = huggingface_hub.try_to_load_from_cache(repo, file)
    if not isinstance(path, str):
      # Fails at once where there is no network; the download would retry.
      huggingface_hub.get_hf_file_metadata(
        huggingface_hub.hf_hub_url(repo, file)
      )
      path = huggingface_hub.hf_hub_download(repo, file)
    return pathlib.Path(path)
  except Exception as error:  # its own types, httpx's and OSError alike
    reason = str(error).strip().split("\n")[0][:100]
    raise UserError(
      f"no file {repo} here, and the hub did not give it "
      f"({type(error).__name__}: {reason}); {manual}"
    ) from None
