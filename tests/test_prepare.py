"""The prepare command, and what every command does around its main."""

import hashlib
import re
import signal
import subprocess
import sys

import clevr_files
import pytest

from spectraldiffusion_jax.data import prepare as prepare_lib
from spectraldiffusion_jax.errors import UserError

FILE = "--config=fields.py"
NO = 'the config has no such field. Did you mean "root"'
FIELDS = """
from ml_collections import ConfigDict
def get_config():
  return ConfigDict({"data": {"root": "here"}})
"""
COMMAND = """
import os, sys, time
from absl import flags
from ml_collections import config_flags
from spectraldiffusion_jax import command
from spectraldiffusion_jax.errors import UserError
NAME = flags.DEFINE_string("name", None, "A name.")
COUNT = flags.DEFINE_integer("count", 0, "A number.")
config_flags.DEFINE_config_file("config")
def main(argv):
  command.no_arguments(argv)
  kind = command.require(NAME, "name")
  if kind == "user":
    raise UserError("field x:\\n  too large")
  if kind == "bug":
    raise ValueError("a defect")
  if kind == "wait":
    print("ready", flush=True)
    time.sleep(60)
  return COUNT.value
if __name__ == "__main__":
  command.run(main)
"""


def run(arguments, **options):
  return subprocess.run(
    [sys.executable, *map(str, arguments)],
    capture_output=True,
    text=True,
    timeout=120,
    **options,
  )


@pytest.fixture(scope="module")
def command(tmp_path_factory):
  path = tmp_path_factory.mktemp("command") / "command.py"
  path.write_text(COMMAND)
  path.with_name("fields.py").write_text(FIELDS)
  return path


@pytest.mark.parametrize(
  ("flags", "code", "message"),
  [
    (["--name=a"], 0, ""),
    (["--name=a", "--count=3"], 3, ""),
    (["--name=user"], 2, "error: field x: too large\n"),
    ([], 2, "error: --name is required; --help lists the flags\n"),
    (["--nam=a"], 2, "error: Unknown command line flag 'nam'. Did you mean"),
    (["--name=a", "--count=b"], 2, "error: flag --count=b: "),
    ([FILE, "--config.data.rot=b"], 2, f"error: --config.data.rot: {NO}"),
    ([FILE, "--config.data.place=b"], 2, "error: --config.data.place: "),
    (["--name=a", "more"], 2, "error: unexpected argument 'more'; "),
  ],
)
def test_codes_and_lines(command, flags, code, message):
  done = run([command, *flags], cwd=command.parent)
  assert done.returncode == code
  assert done.stderr.startswith(message)
  assert done.stderr.count("\n") == (1 if message else 0)


def test_a_defect_keeps_its_traceback(command):
  done = run([command, "--name=bug"])
  assert done.returncode == 1
  assert "Traceback" in done.stderr and "a defect" in done.stderr


def test_interrupt_is_130(command):
  process = subprocess.Popen(
    [sys.executable, str(command), "--name=wait"],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    # Jobs in the background inherit a SIGINT that is ignored.
    preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
  )
  assert process.stdout.readline() == "ready\n"
  process.send_signal(signal.SIGINT)
  assert process.communicate(timeout=60)[1] == "interrupted\n"
  assert process.returncode == 130


@pytest.fixture
def source(tmp_path):
  folder = tmp_path / "source"
  folder.mkdir()
  records = [
    clevr_files.encode(clevr_files.scene(n, objects=3 + n % 2))
    for n in range(3)
  ]
  clevr_files.write(folder / "clevr_with_masks_train.tfrecords", records)
  return folder


def test_the_command_prepares_once_and_tells_what(source, tmp_path, root):
  flags = [
    root / "launch" / "prepare.py",
    "--dataset=clevr_with_masks",
    f"--source={source}",
    f"--data_dir={tmp_path / 'data'}",
  ]
  done = run(flags, cwd=root)
  assert done.returncode == 0, done.stderr
  (file,) = source.iterdir()
  checksum = hashlib.sha256(file.read_bytes()).hexdigest()
  lines = done.stdout.splitlines()
  assert "clevr_with_masks/1.0.0" in lines[0]
  assert re.fullmatch(r"train +3 +\d+\.\d +3: 2  4: 1", lines[2])
  assert lines[3] == f"{file.name}: 3 records checked, sha256 {checksum}"

  folder = tmp_path / "data" / "clevr_with_masks" / "1.0.0"
  before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
  again = run(flags, cwd=root)
  assert again.returncode == 2
  assert again.stderr.startswith("error: clevr_with_masks is already prepared")
  assert again.stderr.count("\n") == 1
  assert before == {path: path.stat().st_mtime_ns for path in folder.iterdir()}


def test_overwrite_replaces(source, tmp_path):
  data = tmp_path / "data"
  options = {"data_root": data, "source": source}
  prepare_lib.prepare("clevr_with_masks", **options)
  file = source / "clevr_with_masks_train.tfrecords"
  clevr_files.write(file, [clevr_files.encode(clevr_files.scene(8))])
  found = prepare_lib.prepare("clevr_with_masks", overwrite=True, **options)
  assert "1 records checked" in found


@pytest.mark.parametrize(
  ("dataset", "given", "message"),
  [
    ("clevr_with_masks", None, "^--source is required for clevr_with_masks"),
    ("clevr_with_masks", "nowhere", "^source='nowhere' does not exist"),
    ("clevr", "x", "^dataset='clevr' is unknown; choose clevr_with_masks or"),
  ],
)
def test_a_wrong_request_is_named(tmp_path, dataset, given, message):
  with pytest.raises(UserError, match=message):
    prepare_lib.prepare(dataset, data_root=tmp_path / "data", source=given)
  assert not (tmp_path / "data").exists()


def test_a_read_only_folder_is_named(source, tmp_path):
  (tmp_path / "data").touch()  # a file where the folder should be
  with pytest.raises(UserError, match="^data_dir=.* cannot be written"):
    prepare_lib.prepare(
      "clevr_with_masks", data_root=tmp_path / "data", source=source
    )
