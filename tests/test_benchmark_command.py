"""The benchmark command: its table, its file, and what it refuses."""

import json
import subprocess
import sys

import pytest

from spectraldiffusion_jax import markdown


def call(root, *flags):
  return subprocess.run(
    [sys.executable, "launch/benchmark.py", *flags],
    cwd=root,
    capture_output=True,
    text=True,
    timeout=560,
  )


def test_tables_have_every_column_of_any_row():
  text = markdown.records([{"form": "loop", "ms": 1.23456}, {"ratio": 2}])
  assert text == (
    "| form | ms | ratio |\n| --- | --- | --- |\n"
    "| loop | 1.235 |  |\n|  |  | 2 |\n"
  )


@pytest.mark.slow
def test_a_benchmark_prints_its_table_and_writes_its_rows(root, tmp_path):
  done = call(root, "--only=checkpoint", f"--output={tmp_path / 'new'}")
  assert done.returncode == 0, done.stderr
  (row,) = json.loads((tmp_path / "new" / "checkpoint.json").read_text())
  assert row["async_share"] < row["sync_share"]
  assert "| async_share |" in done.stdout


@pytest.mark.parametrize(
  "flags, words",
  [
    (["--only=speed"], ["--only", "speed", "scan"]),
    (["--only=sharding"], ["--config is required"]),
    (["scan"], ["unexpected argument"]),
  ],
)
def test_mistakes_are_one_line(root, flags, words):
  done = call(root, *flags)
  assert done.returncode == 2 and done.stderr.count("\n") == 1
  for word in words:
    assert word in done.stderr
