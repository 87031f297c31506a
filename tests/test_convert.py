"""Conversion of published weights: round trips, hub, and hostile files."""

import pickle
import subprocess
import sys
import types

import huggingface_hub
import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from flax import traverse_util
from published import TO_HUB, authors_layout, to_torch, write_pth

from spectraldiffusion_jax import convert
from spectraldiffusion_jax import weights as weight_files
from spectraldiffusion_jax.backbone import HUB_IDS, load_backbone
from spectraldiffusion_jax.errors import UserError
from spectraldiffusion_jax.models.vit_variants import (
  VARIANTS,
  abstract_params,
  make_vit,
)
from spectraldiffusion_jax.pth import read_pth


def random_flat(name: str = "vit_tiny") -> dict[str, np.ndarray]:
  rng = np.random.default_rng(0)
  shapes = traverse_util.flatten_dict(abstract_params(make_vit(name)), sep="/")
  return {k: rng.random(v.shape, np.float32) for k, v in shapes.items()}


def same(params, flat):
  ours = traverse_util.flatten_dict(params, sep="/")
  assert ours.keys() == flat.keys()
  for key in flat:
    np.testing.assert_array_equal(ours[key], flat[key], err_msg=key)


# ---- round trips ------------------------------------------------------------


def test_authors_pth_round_trip(tmp_path):
  flat = random_flat()
  source, output = tmp_path / "a.pth", tmp_path / "b.safetensors"
  write_pth(source, authors_layout(flat))
  report = convert.convert_file(str(source), str(output), name="vit_tiny")
  assert "vit_tiny, 102 tensors, 2,756,160 parameters" in report
  assert "mask_token" in report
  name, params = weight_files.load_weights(output)
  assert name == "vit_tiny"
  same(params, flat)
  same(load_backbone("vit_tiny", output).params, flat)


def test_hub_layout_round_trip_from_a_folder(tmp_path):
  flat = random_flat()
  safetensors.numpy.save_file(
    to_torch(flat, TO_HUB), tmp_path / "model.safetensors"
  )
  done = convert.convert_tensors(convert.read_source(str(tmp_path)))
  assert (done.name, done.unused) == ("vit_tiny", ("mask_token",))
  same(done.params, flat)


@pytest.mark.parametrize("name", VARIANTS)
def test_sizes_name_the_model(name):
  shapes = traverse_util.flatten_dict(
    abstract_params(make_vit(name, scan=True)), sep="/"
  )
  flat = {k: np.broadcast_to(np.float32(0), v.shape) for k, v in shapes.items()}
  depth = VARIANTS[name]["depth"]
  flat |= {f"block_{i}/norm1/scale": np.zeros(1) for i in range(depth)}
  assert convert.identify(flat) == name
  assert name in HUB_IDS or name == "vit_tiny"


def test_swiglu_halves_are_gate_then_up():
  gate, up = np.zeros((4, 3)), np.ones((4, 3))
  flat, _ = convert.flatten_tensors(
    {
      "blocks.0.mlp.w12.weight": np.concatenate([gate, up]),
      "encoder.layer.1.mlp.weights_in.bias": np.arange(6.0),
    }
  )
  assert flat["block_0/mlp/gate/kernel"].shape == (3, 4)
  assert flat["block_0/mlp/gate/kernel"].max() == 0
  assert flat["block_0/mlp/up/kernel"].min() == 1
  np.testing.assert_array_equal(flat["block_1/mlp/up/bias"], [3, 4, 5])


def test_masked_key_bias_is_dropped():
  flat, unused = convert.flatten_tensors(
    {
      "blocks.0.attn.qkv.bias": np.arange(6.0),
      "blocks.0.attn.qkv.bias_mask": np.ones(6),
      "rope_embed.periods": np.ones(2),
    }
  )
  assert set(flat) == {"block_0/attn/query/bias", "block_0/attn/value/bias"}
  assert len(unused) == 2


def test_bfloat16_source_becomes_float32(tmp_path):
  path = tmp_path / "a.safetensors"
  tensors = to_torch(random_flat(), TO_HUB)
  half = {k: v.astype(ml_dtypes.bfloat16) for k, v in tensors.items()}
  safetensors.numpy.save_file(half, path)
  done = convert.convert_tensors(convert.read_source(str(path)))
  assert {x.dtype for x in jax.tree.leaves(done.params)} == {np.dtype("f4")}


def test_torch_and_transformers_files(tmp_path):
  torch = pytest.importorskip("torch", reason="torch is not installed")
  transformers = pytest.importorskip("transformers", reason="not installed")
  model = transformers.Dinov2Model(
    transformers.Dinov2Config(
      hidden_size=384, num_attention_heads=6, image_size=518
    )
  )
  model.save_pretrained(tmp_path)
  torch.save(dict(model.state_dict()), tmp_path / "a.pth")
  done = [
    convert.convert_tensors(convert.read_source(str(tmp_path / name)))
    for name in ("model.safetensors", "a.pth")
  ]
  assert done[0].name == "dinov2_vits14"
  same(done[0].params, traverse_util.flatten_dict(done[1].params, sep="/"))
  theirs = model.encoder.layer[3].mlp.fc1.weight.detach().numpy().T
  ours = done[0].params["block_3"]["mlp"]["up"]["kernel"]
  np.testing.assert_array_equal(ours, theirs)
  # Views, parameters and other types, as torch.save may store them.
  base = torch.arange(24.0).reshape(4, 6)
  tensors = {
    "view": base[1:3, ::2],
    "turned": base.T,
    "parameter": torch.nn.Parameter(base),
    "half": base.to(torch.bfloat16),
    "whole": torch.arange(3),
  }
  torch.save({"model": tensors}, tmp_path / "b.pth")
  for key, array in read_pth(tmp_path / "b.pth").items():
    wanted = tensors[key].detach().float().numpy()
    np.testing.assert_array_equal(array.astype(np.float32), wanted)


# ---- wrong weights ----------------------------------------------------------


def refused(tensors, match, **options):
  with pytest.raises(UserError, match=match) as error:
    convert.convert_tensors(tensors, **options)
  assert "\n" not in str(error.value)


def test_wrong_tensors_are_refused():
  tensors = authors_layout(random_flat())
  refused(tensors, "of vit_tiny, not of dinov2_vits14", name="dinov2_vits14")

  def without(name):
    return {k: v for k, v in tensors.items() if k != name}

  refused(
    without("blocks.3.norm1.weight"), r"1 missing \(block_3/norm1/scale\)"
  )
  refused(without("patch_embed.proj.weight"), "no vision transformer")
  refused(tensors | {"fc.weight": np.zeros((2, 2))}, "1 left over .fc/kernel")
  refused(
    tensors | {"norm.weight": np.zeros(3, np.float32)},
    r"1 misshapen \(norm/scale is \(3,\), should be \(192,\)\)",
  )
  refused(
    tensors | {"norm.weight": np.full(192, np.nan)}, "1 not finite .norm/scale"
  )
  refused(tensors | {"blocks.0.attn.qkv.bias": np.zeros(5)}, "3 equal parts")
  refused(tensors | {"blocks.6.norm1.weight": np.zeros(192)}, "depth 7")
  refused(tensors | {"embeddings.cls_token": np.zeros(3)}, "two tensors")
  refused({"patch_embed.proj.weight": np.zeros(())}, "no vision transformer")


@pytest.mark.parametrize(
  ("content", "match"),
  [
    (b"<!DOCTYPE html><html>Sign in</html>", "web page: the download failed"),
    (b"version https://git-lfs.github.com/spec/v1\n", "git-lfs pull"),
    (b"", "only 0 bytes"),
    (pickle.dumps({"a": 1}), "bare pickle"),
    (b"\x00" * 100, "neither safetensors nor"),
    (b"PK\x03\x04" + b"\x00" * 100, "damaged or no torch file"),
    (b"\x10\x00\x00\x00\x00\x00\x00\x00{not json}      ", "damaged"),
  ],
)
def test_other_files_are_refused(tmp_path, content, match):
  path = tmp_path / "a.safetensors"
  path.write_bytes(content)
  match = match.replace("git-lfs pull", "git lfs pull")
  with pytest.raises(UserError, match=match) as error:
    convert.read_source(str(path))
  assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["safetensors", "pth"])
@pytest.mark.parametrize("share", [0.001, 0.5, 0.999])
def test_truncated_files_are_refused(tmp_path, kind, share):
  path = tmp_path / f"a.{kind}"
  tensors = authors_layout(random_flat())
  if kind == "pth":
    write_pth(path, tensors)
  else:
    safetensors.numpy.save_file(tensors, path)
  data = path.read_bytes()
  path.write_bytes(data[: int(len(data) * share)])
  with pytest.raises(UserError, match="download it again"):
    convert.read_source(str(path))


# ---- where the source is ----------------------------------------------------


def test_ambiguous_and_missing_sources_are_refused(tmp_path):
  with pytest.raises(UserError, match="holds no .safetensors"):
    convert.read_source(str(tmp_path))
  for name in ("a.pth", "b.pth"):
    (tmp_path / name).write_bytes(b"")
  with pytest.raises(UserError, match="holds a.pth, b.pth: give one"):
    convert.read_source(str(tmp_path))
  with pytest.raises(UserError, match="no weights file at weights/x.pth"):
    convert.read_source("weights/x.pth")


@pytest.fixture
def hub(tmp_path, monkeypatch):
  """A hub with one model; records what was asked of it."""
  path, asked = tmp_path / "cached", []
  safetensors.numpy.save_file({"a": np.zeros(2)}, path)

  def answer(name, value):
    def function(*arguments):
      asked.append((name, *arguments))
      if isinstance(value, Exception):
        raise value
      return value

    monkeypatch.setattr(huggingface_hub, name, function)

  answer("try_to_load_from_cache", None)
  answer("get_hf_file_metadata", object())
  answer("hf_hub_download", str(path))
  return types.SimpleNamespace(asked=asked, answer=answer, path=path)


def test_hub_id_is_downloaded_once(hub):
  download = ("hf_hub_download", "facebook/dinov2-small", "model.safetensors")
  assert set(convert.read_source("facebook/dinov2-small")) == {"a"}
  assert hub.asked[-1] == download
  hub.answer("try_to_load_from_cache", str(hub.path))
  assert set(convert.read_source("facebook/dinov2-small")) == {"a"}
  assert hub.asked.count(download) == 1


def test_without_a_network_the_manual_steps_are_named(hub):
  offline = OSError("cannot reach the hub\nmore text")
  hub.answer("get_hf_file_metadata", offline)
  with pytest.raises(UserError) as error:
    convert.read_source("facebook/dinov2-small")
  message = str(error.value)
  assert "hf download facebook/dinov2-small model.safetensors" in message
  assert "--source=DIR" in message and "\n" not in message
  assert "hf_hub_download" not in [name for name, *_ in hub.asked]


def test_command(tmp_path, root):
  source, output = tmp_path / "a.pth", tmp_path / "b.safetensors"
  write_pth(source, authors_layout(random_flat()))

  def run(*flags):
    return subprocess.run(
      [sys.executable, "launch/convert.py", f"--source={source}", *flags],
      cwd=root,
      capture_output=True,
      text=True,
      timeout=200,
    )

  done = run(f"--output={output}")
  assert done.returncode == 0, done.stderr
  assert "vit_tiny, 102 tensors" in done.stdout and output.exists()
  source.write_bytes(b"<html>")
  failed = run(f"--output={tmp_path / 'c.safetensors'}")
  assert failed.returncode == 2
  assert failed.stderr.count("\n") == 1
  assert failed.stderr.startswith("error: ") and "web page" in failed.stderr
  assert not (tmp_path / "c.safetensors").exists()
