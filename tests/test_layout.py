"""The walls: who may import whom, how long a file or function may be."""

import ast
import importlib
import pathlib
import pkgutil
import subprocess
import sys

import pytest

import spectraldiffusion_jax

PACKAGE = "spectraldiffusion_jax"
FOLDER = pathlib.Path(spectraldiffusion_jax.__file__).parent
ROOT = FOLDER.parent

LAYERS = [
  row.split()
  for row in """
    types errors version markdown effort
    ops
    data models losses metrics colours
    panoptic sheet diagnostics config_kinds config_ranges
    pseudo_classes visualise
    optim sharding writers config weights pth prefetch retention
    distributed replicas
    train_state checkpoint preemption workdir divergence ledger
    train_step
    objective convert build_encoder
    backbone
    build_spectral
    evaluate build
    rounds
    program
    run
    segmenter resume
    train_loop
    predict reports
    command
    demo ablation plan benchmarks __init__
  """.strip().splitlines()
]
RANK = {name: i for i, layer in enumerate(LAYERS) for name in layer}
MODULES = sorted(FOLDER.rglob("*.py"))
FILES = sorted(
  path
  for folder in (PACKAGE, "configs", "launch", "tests")
  for path in (ROOT / folder).rglob("*.py")
)


def top(path: pathlib.Path) -> str:
  """`ops` for ops/scan.py, `losses` for losses.py."""
  return path.relative_to(FOLDER).parts[0].removesuffix(".py")


def imported(tree: ast.AST) -> set[str]:
  """Top names of this package's modules that a file imports at its head."""
  names = set()
  for node in ast.walk(tree):
    if isinstance(node, ast.ImportFrom) and node.module:
      parts = node.module.split(".")
      if parts[0] == PACKAGE:
        names |= {parts[1]} if parts[1:] else {a.name for a in node.names}
    elif isinstance(node, ast.Import):
      parts = [a.name.split(".") for a in node.names]
      names |= {p[1] for p in parts if p[0] == PACKAGE and p[1:]}
  return names


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.stem)
def test_modules_import_only_from_layers_below(path):
  own = top(path)
  for name in imported(ast.parse(path.read_text())) - {"version"}:
    same_package = name == own and (FOLDER / own).is_dir()
    assert same_package or RANK[name] < RANK[own], f"{own} imports {name}"


def test_the_check_sees_an_upward_import():
  tree = ast.parse(f"from {PACKAGE} import train_loop\nimport {PACKAGE}.ops")
  assert imported(tree) == {"train_loop", "ops"}


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_files_and_functions_are_short(path):
  text = path.read_text()
  if path.parent.name == "configs":
    return  # a config is one list of fields
  assert len(text.splitlines()) <= 300, "split it: one file, one job"
  for node in ast.walk(ast.parse(text)):
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
      length = node.end_lineno - node.lineno + 1
      assert length <= 60, f"{node.name} has {length} lines"


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_every_file_says_its_job(path):
  docstring = ast.get_docstring(ast.parse(path.read_text()))
  assert docstring and docstring[0].isupper()


def test_configs_open_without_jax():
  code = (
    "import sys, pathlib, importlib;"
    "[importlib.import_module('configs.' + p.stem).get_config()"
    " for p in pathlib.Path('configs').glob('*.py') if p.stem != '__init__'];"
    "assert 'jax' not in sys.modules and 'numpy' not in sys.modules"
  )
  subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_whole_package_imports_without_tensorflow():
  modules = [
    m.name for m in pkgutil.walk_packages([str(FOLDER)], prefix=f"{PACKAGE}.")
  ]
  for name in modules:
    importlib.import_module(name)
  assert len(modules) > 20
  assert "tensorflow" not in sys.modules
