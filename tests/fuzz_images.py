"""Hostile image files, made from a seed."""

import io
import struct
import zlib

import numpy as np
from fuzz_harness import mangled
from PIL import Image

MODES = {
  "PNG": ("RGB", "RGBA", "L", "LA", "1", "P", "I;16"),
  "JPEG": ("RGB", "L", "CMYK"),
  "GIF": ("P", "L"),
  "WEBP": ("RGB", "RGBA"),
  "TIFF": ("RGB", "CMYK", "I;16", "F", "1", "LAB"),
  "BMP": ("RGB", "L"),
  "PPM": ("RGB", "L"),
}
SIZES = ((1, 1), (3, 500), (500, 3), (17, 31), (64, 48))
EXIF_BOMB = b"Exif\0\0II*\0\xff\xff\xff\x7f" + b"\x12\x01" * 50


def picture(random, form: str, mode: str) -> bytes:
  """A valid file of a form and mode, some of several frames."""
  size = SIZES[random.integers(len(SIZES))]
  frames = [_image(random, mode, size) for _ in range(random.integers(1, 4))]
  options = {}
  if form in ("GIF", "WEBP", "TIFF") and len(frames) > 1:
    options = {"save_all": True, "append_images": frames[1:]}
  if form in ("JPEG", "PNG", "WEBP") and random.random() < 0.3:
    exif = Image.Exif()
    exif[0x0112] = int(random.integers(0, 12))  # orientation, 1..8 are legal
    broken = random.random() < 0.3
    options["exif"] = EXIF_BOMB if broken else exif.tobytes()
  file = io.BytesIO()
  frames[0].save(file, form, **options)
  return file.getvalue()


def _image(random, mode, size) -> Image.Image:
  pixels = random.integers(0, 256, (size[1], size[0], 3), np.uint8)
  if mode == "I;16":
    return Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
  if mode == "F":
    return Image.fromarray(random.random(size[::-1], np.float32) * 1.02)
  if mode == "LAB":
    return Image.frombytes("LAB", size, pixels.tobytes())
  return Image.fromarray(pixels).convert(mode)


def chunk(kind: bytes, data: bytes) -> bytes:
  """A PNG chunk with its checksum."""
  crc = zlib.crc32(kind + data)
  return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", crc)


def huge_png(width: int, height: int, *, depth: int = 8, kind: int = 2):
  """A few bytes that declare any size."""
  head = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
  pixels = zlib.compress(bytes(100))
  return b"\x89PNG\r\n\x1a\n" + b"".join(
    [chunk(b"IHDR", head), chunk(b"IDAT", pixels), chunk(b"IEND", b"")]
  )


def huge_gif(width: int, height: int, *, disposal: int = 2) -> bytes:
  """A GIF whose one frame is as large, and is to be cleared afterwards."""
  size = struct.pack("<HH", width, height)
  control = b"\x21\xf9\x04" + bytes([disposal << 2, 0, 0, 0, 0])
  frame = b"\x2c" + bytes(4) + size + b"\x00\x02\x02\x4c\x01\x00"
  palette = bytes([0, 0, 0, 255, 255, 255])
  return b"GIF89a" + size + b"\x80\0\0" + palette + control + frame + b"\x3b"


def huge_bmp(width: int, height: int) -> bytes:
  """A header alone."""
  head = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, *[0] * 6)
  return b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + head


def huge(random) -> bytes:
  """One of the files above with extreme sizes."""
  sides = (0, 1, 65535, 65536, 2**31 - 1, 30000, 8001)
  width, height = (int(sides[random.integers(len(sides))]) for _ in range(2))
  kind = random.integers(5)
  if kind == 0:
    limit = 65535
    return huge_gif(min(width, limit), min(height, limit))
  if kind == 1:
    return huge_bmp(width, height)
  if kind == 2:
    return b"P6\n%d %d\n255\n" % (width, height) + bytes(99)
  if kind == 3:
    return huge_png(width, height, depth=16, kind=6)
  text = chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(80 << 20), 1))
  return huge_png(5, 5)[:33] + text + huge_png(5, 5)[33:]


def case(seed: int) -> bytes:
  """The file of one seed: valid, mangled, huge or something else."""
  random = np.random.default_rng(seed)
  form = list(MODES)[seed % len(MODES)]
  modes = MODES[form]
  data = picture(random, form, modes[random.integers(len(modes))])
  kind = random.integers(10)
  if kind == 0:
    return data
  if kind == 1:
    return huge(random)
  if kind == 2:
    others = (b"", b"%!PS-Adobe-3.0\n", b"<svg/>", bytes(1000), b"P6\n-1 5\n")
    return others[random.integers(len(others))]
  if kind == 3:  # behind the header, where decoders have begun
    return data[:60] + mangled(data[60:] or b"a", random)
  return mangled(data, random)
