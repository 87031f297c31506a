"""The reader of .pth files: only tensors, nothing is run."""

import pathlib
import pickle
import zipfile

import numpy as np
import pytest
from published import write_pth

from spectraldiffusion_jax.errors import UserError
from spectraldiffusion_jax.pth import read_pth


class Payload:
  """Unpickled by pickle.load, this would make a file."""

  def __init__(self, victim):
    self.victim = victim

  def __reduce__(self):
    return pathlib.Path.touch, (pathlib.Path(self.victim),)


@pytest.mark.parametrize(
  "compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED]
)
def test_malicious_pickle_does_not_run(tmp_path, compression):
  victim, path = tmp_path / "ran", tmp_path / "a.pth"
  write_pth(
    path,
    {"a": np.zeros((2, 3), np.float32)},
    extra={"x": Payload(victim)},
    compression=compression,
  )
  with pytest.raises(UserError, match="was refused, .* its (pickle|member)"):
    read_pth(path)
  assert not victim.exists()
  pickle.loads(pickle.dumps(Payload(victim)))  # the payload is a live one
  assert victim.exists()


def write_program(path, program: bytes):
  with zipfile.ZipFile(path, "w") as archive:
    archive.writestr("a/data.pkl", program)
    archive.writestr("a/data/0", np.arange(4, dtype=np.float32).tobytes())


TENSOR = (
  b"\x80\x02}U\x01actorch._utils\n_rebuild_tensor_v2\n("
  b"(U\x07storagectorch\nFloatStorage\nU\x010U\x03cpuK\x04tQ"
  b"%s\x89}tRs."
)


@pytest.mark.parametrize(
  ("geometry", "legal"),
  [
    (b"K\x00K\x02K\x02\x86K\x02K\x01\x86", True),  # offset 0, (2, 2), (2, 1)
    (b"K\x01K\x02K\x02\x86K\x02K\x01\x86", False),  # one too far
    (b"K\x00K\x02K\x02\x86K\x09K\x01\x86", False),  # stride leads outside
    (b"J\xff\xff\xff\xffK\x02K\x02\x86K\x02K\x01\x86", False),  # offset -1
    (b"K\x03K\x02K\x02\x86K\x01J\xff\xff\xff\xff\x86", False),  # stride -1
    (b"K\x00M\xff\xffM\xff\xff\x86K\x00K\x00\x86", False),  # 4e9 copies
  ],
)
def test_tensors_stay_inside_their_storage(tmp_path, geometry, legal):
  path = tmp_path / "a.pth"
  write_program(path, TENSOR % geometry)
  if legal:
    np.testing.assert_array_equal(read_pth(path)["a"], [[0, 1], [2, 3]])
  else:
    with pytest.raises(UserError, match="reaches outside its storage"):
      read_pth(path)


@pytest.mark.parametrize(
  "program",
  [
    b"cos\nsystem\n(U\x04truetR.",  # GLOBAL, REDUCE
    b"(U\x04trueios\nsystem\n.",  # INST
    b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x04true\x85R.",  # STACK_GLOBAL
    b"cbuiltins\neval\n(U\x011tR.",
    b"ctorch\nload\n.",
    b"cnumpy\nload\n.",
    b"(U\x07storagecos\nsystem\nU\x010U\x03cpuK\x04tQ.",
  ],
)
def test_only_state_dict_names_are_resolved(tmp_path, program):
  path = tmp_path / "a.pth"
  write_program(path, program)
  with pytest.raises(UserError, match="its pickle asks for"):
    read_pth(path)


def test_pth_of_something_else_is_refused(tmp_path):
  path = tmp_path / "a.pth"
  write_program(path, pickle.dumps({"epoch": 3}))
  with pytest.raises(UserError, match="no plain state dict"):
    read_pth(path)
