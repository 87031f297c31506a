"""What no input may do, one named case each; test_fuzz.py has the crowd."""

import ast
import os
import pathlib
import signal

import fuzz_images
import pytest
from PIL import Image
from test_fuzz import Halves

from spectraldiffusion_jax import predict
from spectraldiffusion_jax.data.images import read_map, read_rgb
from spectraldiffusion_jax.errors import LONGEST, UserError

ROOT = pathlib.Path(__file__).resolve().parent.parent
SOURCES = [
  path
  for folder in ("spectraldiffusion_jax", "launch", "configs")
  for path in sorted((ROOT / folder).rglob("*.py"))
]

# ---- what the code does not contain -----------------------------------------

MODULES = {
  "pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve",
  "yaml", "torch", "tarfile", "socketserver", "socket", "http.server", "code",
  "xmlrpc", "ftplib", "telnetlib", "pty",
}  # fmt: skip
CALLS = {
  "eval", "exec", "compile", "__import__", "os.system", "os.popen",
  "shutil.unpack_archive", "asyncio.start_server", "jax.distributed.initialize",
  "jax.profiler.start_server", "torch.load",
}  # fmt: skip
METHODS = {"extractall", "extract", "listen", "serve_forever"}


def dotted(node: ast.AST) -> str:
  if isinstance(node, ast.Attribute):
    return f"{dotted(node.value)}.{node.attr}"
  return node.id if isinstance(node, ast.Name) else ""


def forbidden(tree: ast.AST) -> list[str]:
  """What of the lists above a file imports or calls."""
  found = []
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      names = [a.name for a in node.names]
      found += [n for n in names if {n, n.split(".")[0]} & MODULES]
    elif isinstance(node, ast.ImportFrom) and not node.level:
      if {node.module, node.module.split(".")[0]} & MODULES:
        found.append(node.module)
    elif isinstance(node, ast.Call):
      name, last = dotted(node.func), dotted(node.func).rpartition(".")[2]
      pickles = [k.value for k in node.keywords if k.arg == "allow_pickle"]
      refused = [v for v in pickles if getattr(v, "value", True) is False]
      if name in CALLS or (last in METHODS and "." in name):
        found.append(name)
      elif name in ("np.load", "numpy.load") and not refused:
        found.append(f"{name} without allow_pickle=False")
      elif any(k.arg == "shell" for k in node.keywords):
        found.append("shell")
  return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.stem)
def test_no_pickle_no_eval_no_unpacking_no_server(path):
  # Benchmarks compare with torch's layers, and load nothing through it.
  allowed = {"torch"} if path.parent.name == "benchmarks" else set()
  if path.name == "distributed.py":  # the one place that may, when asked
    allowed.add("jax.distributed.initialize")
  assert set(forbidden(ast.parse(path.read_text()))) <= allowed


@pytest.mark.parametrize(
  "line",
  [
    "import pickle",
    "from torch import load",
    "import http.server",
    "torch.load(f)",
    "np.load(f)",
    "np.load(f, allow_pickle=True)",
    "np.load(f, allow_pickle=x)",
    "eval('1')",
    "archive.extractall(f)",
    "jax.distributed.initialize()",
    "run('ls', shell=True)",
  ],
)
def test_the_check_sees_each_kind(line):
  assert forbidden(ast.parse(line))


def test_only_one_place_opens_image_files():
  found = [path.name for path in SOURCES if "Image.open(" in path.read_text()]
  assert found == ["images.py"]


# ---- messages ---------------------------------------------------------------


def test_a_message_is_one_printable_line_of_bounded_length():
  message = str(UserError("a\n\x1b[31mred\x1b[0m \udcff" + "x" * 10**6))
  assert message.startswith("a ?[31mred?[0m ?xxx") and message.isprintable()
  assert len(message) <= LONGEST + 3


# ---- images -----------------------------------------------------------------


def save(path, image, **options):
  image.save(path, **options)
  return path


def plain(colour=(200, 30, 60), size=(8, 6)) -> Image.Image:
  return Image.new("RGB", size, colour)


@pytest.mark.parametrize(
  "data",
  [
    fuzz_images.huge_png(50_000, 50_000),
    fuzz_images.huge_gif(65_535, 65_535),
    fuzz_images.huge_bmp(2**31 - 1, 2**31 - 1),
    b"P6\n60000 60000\n255\n",
  ],
  ids=["png", "gif cleared after its frame", "bmp", "ppm"],
)
def test_huge_declared_sizes_are_refused_by_the_limit(tmp_path, data):
  path = tmp_path / "a.png"
  path.write_bytes(data)
  with pytest.raises(UserError, match="more .*max_pixels=1000000"):
    read_rgb(path, max_pixels=1_000_000)


def test_the_limit_is_the_callers_not_pillows(tmp_path, monkeypatch):
  monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
  path = save(tmp_path / "a.png", plain())
  assert read_rgb(path, max_pixels=48).shape == (6, 8, 3)
  with pytest.raises(UserError, match="8 x 6 pixels are more than"):
    read_rgb(path, max_pixels=47)
  assert Image.MAX_IMAGE_PIXELS == 10


def test_only_listed_formats_reach_a_decoder(tmp_path):
  path = tmp_path / "a.png"  # Pillow would start Ghostscript for this
  path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
  with pytest.raises(UserError, match="is no image of PNG, JPEG"):
    read_rgb(path)


def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
  os.mkfifo(tmp_path / "a.png")
  signal.alarm(20)
  try:
    with pytest.raises(UserError, match="no regular file"):
      read_rgb(tmp_path / "a.png")
  finally:
    signal.alarm(0)


def test_an_animation_gives_its_first_frame(tmp_path):
  frames = [plain(), plain((0, 0, 255))]
  for form in ("gif", "webp", "tiff", "png"):
    path = save(
      tmp_path / f"a.{form}",
      frames[0],
      save_all=True,
      append_images=frames[1:],
      **({"lossless": True} if form == "webp" else {}),
    )
    assert (read_rgb(path) == (200, 30, 60)).all(), form


def test_maps_have_one_channel(tmp_path):
  path = save(tmp_path / "a.png", plain())
  with pytest.raises(UserError, match="no map of whole numbers"):
    read_map(path)


# ---- predictions ------------------------------------------------------------


def segment(paths, output, **options):
  chosen = {"max_pixels": 10**6, "overwrite": False} | options
  return predict.predict(Halves(), paths, output, **chosen)


def test_a_result_is_replaced_only_when_asked(tmp_path):
  path, output = save(tmp_path / "a.png", plain()), tmp_path / "out"
  output.mkdir()
  kept = output / "a_masks.png"
  kept.write_text("mine")
  with pytest.raises(UserError, match="a_masks.png already; use --overwrite"):
    predict.check_output([path], output, overwrite=False)
  assert kept.read_text() == "mine" and len(list(output.iterdir())) == 1
  segment([path], output, overwrite=True)
  assert Image.open(kept).size == (8, 6)


def test_a_link_among_the_results_leads_nowhere(tmp_path):
  path, output = save(tmp_path / "a.png", plain()), tmp_path / "out"
  output.mkdir()
  (output / "a_masks.png").symlink_to(tmp_path / "elsewhere")
  (output / ".a_labels.png.partial").symlink_to(tmp_path / "elsewhere")
  with pytest.raises(UserError, match="a_masks.png already"):
    segment([path], output)
  segment([path], output, overwrite=True)
  assert not (tmp_path / "elsewhere").exists()
  assert not (output / "a_masks.png").is_symlink()


def test_an_input_is_never_replaced(tmp_path):
  paths = [save(tmp_path / name, plain()) for name in ("a.png", "a_labels.png")]
  with pytest.raises(UserError, match="a_labels.png is an image to be read"):
    segment(paths, tmp_path, overwrite=True)
  found = predict.find_images(str(tmp_path), output=tmp_path)
  assert [p.name for p in found] == ["a.png"]  # results are no input


def test_images_of_one_name_keep_their_own_results(tmp_path):
  names = ("a.png", "a.jpg", "A.png", "x/a.png", "y/x/a.png", "x-a-png.png")
  paths = []
  for name in names:
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    paths.append(save(tmp_path / name, plain()))
  paths.append(save(tmp_path / f"{'long' * 60}.png", plain()))
  stems = predict.output_names(paths)
  assert len({stem.casefold() for stem in stems}) == len(paths)
  done = segment(paths, tmp_path / "out")
  assert len(done.written) == len(paths)
  assert len(list((tmp_path / "out").glob("*_labels.png"))) == len(paths)


def test_names_of_any_letters_are_drawn_and_written(tmp_path):
  names = ["new\nline.png", "\u0444\u043e\u0442\u043e.png", "\udcff.png"]
  paths = [tmp_path / name for name in names]
  for path in paths:
    plain().save(os.fsencode(path))
  assert len(segment(paths, tmp_path / "out").written) == 3


@pytest.mark.parametrize("pattern", ["~nobody/x", "a**", "x" * 5000])
def test_a_pattern_that_is_none_is_one_line(tmp_path, pattern):
  with pytest.raises(UserError, match="--images="):
    predict.find_images(pattern, output=tmp_path)
