"""Hostile overrides and config.json files, made from a seed."""

import functools
import json

import numpy as np
from fuzz_harness import mangled

from configs import default
from spectraldiffusion_jax import config as config_lib

VALUES = (
  "-1 0 1 2 3 4 8 16 32 64 0.1 0.5 0.9 0.25 1e9 1e999 -inf nan"
  " 10000000000000000000000 0x10 true None ten"
  " (1,2) () [] {} (1,'a',2,3) (0,1,0,nan) 1,2,3 ' \" \\ ../../x /dev/zero"
  " train[: train[:9%] %s"
).split() + [
  "",
  " ",
  "a\nb",
  "\x1b[2J",
  "é",
  "(" * 9999,
  "9" * 5000,
  "1" + "0" * 400,
]
PLAIN = (
  None, True, -1, 0, 1.5, 1e308, 10**30, 2**32, "x", "a\nb", "\ud800", [], [[]],
  {}, {"a": {}}, [1, "a"], [None] * 4, "9" * 10_000, float("nan"), 2, 16, 64,
)  # fmt: skip
FILES = (
  "configs/default.py configs/clevr.py:tiny configs/procedural.py:easy"
  " configs/clevr.py:nonsense README.md nowhere.py configs"
).split()


@functools.cache
def fields() -> tuple[str, ...]:
  config = default.get_config()
  names = [name for name, _ in config_lib.flatten(config)]
  return (*names, *config.keys(), "seed.x", "nothing", "training.learning_rat")


def arguments(seed: int) -> list[str]:
  """Flags of launch/train.py, most with one or two wrong overrides."""
  random = np.random.default_rng(seed)

  def one(choices):
    return choices[random.integers(len(choices))]

  flags = [f"--config={one(FILES) if seed % 9 == 0 else FILES[seed % 3]}"]
  for _ in range(random.integers(1, 3)):
    flag = f"--config.{one(fields())}={one(VALUES)}"
    if random.random() < 0.2:
      at = int(random.integers(2, len(flag)))
      flag = flag[:at] + one("=.-_ \n:0aZ") + flag[at + one((0, 1)) :]
    flags.append(flag)
  return [flag.replace("\0", "") for flag in flags]


def text(seed: int) -> bytes:
  """A config.json with wrong values, missing fields or damaged text."""
  random = np.random.default_rng(seed)
  values = json.loads(json.dumps(default.get_config().to_dict()))
  for _ in range(random.integers(1, 3)):
    names = [name for name in fields()[:-3] if random.random() < 0.5] or [
      "seed"
    ]
    *sections, last = names[random.integers(len(names))].split(".")
    place = values
    for section in sections:
      place = place[section] if isinstance(place.get(section), dict) else {}
    kind = random.integers(4)
    if kind == 0:
      place.pop(last, None)
    elif kind == 1:
      place[last + "x"] = place.pop(last, 1)
    else:
      place[last] = PLAIN[random.integers(len(PLAIN))]
  data = json.dumps(values, indent=2).encode()
  if seed % 5 == 0:
    data = mangled(data, random)
  deep = (
    b"[" * 200_000,
    b'{"a":' * 100_000,
    b"[1]",
    b"5",
    b'{"model": 3}',
    b"",
  )
  return deep[seed // 25 % len(deep)] if seed % 25 == 1 else data
