"""The canary of synchronised training: copies that must be equal, compared.

Parameters that a mesh holds more than once are equal bit by bit on all
devices as long as every gradient was reduced over all of them. A device or
process that trains on its own data alone drifts away without a word: here it
is found.
"""

import hashlib

import jax
import numpy as np
from jax.experimental import multihost_utils

from spectraldiffusion_jax.errors import UserError

_WIDTH = 8  # bytes of a digest


def out_of_step(tree) -> list[str]:
  """Paths of the arrays of which two copies differ, on any two devices.

  Every process has to call it; all get the same answer.
  """
  paths, bad, digests = [], [], []
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    paths.append(jax.tree_util.keystr(path, simple=True, separator="/"))
    differs, own = _digest(leaf)
    bad.append(differs)
    digests.append(own)
  if jax.process_count() > 1:
    counts = [len(own) for own in digests]
    every = multihost_utils.process_allgather(np.concatenate(digests))
    bad = multihost_utils.process_allgather(np.array(bad)).any(0).tolist()
    parts = np.split(every, np.cumsum(counts)[:-1], axis=1)
    bad = [b or _differ(part) for b, part in zip(bad, parts, strict=True)]
  return [path for path, differs in zip(paths, bad, strict=True) if differs]


def check(tree) -> None:
  """Raises a UserError that names the arrays that are out of step."""
  found = out_of_step(tree)
  if found:
    raise UserError(
      f"{len(found)} arrays differ between devices, {found[0]} among them: "
      "a device or process was not synchronised; nothing was saved, go on "
      "from the newest checkpoint"
    )


def _digest(leaf: jax.Array) -> tuple[bool, np.ndarray]:
  """Whether copies differ here, and a digest of each part, 0 if not here."""
  places = leaf.sharding.devices_indices_map(leaf.shape).values()
  parts = sorted({repr(place) for place in places})
  own = np.zeros((len(parts), _WIDTH), np.uint8)
  differs = False
  copies = len(leaf.sharding.device_set) > len(parts)
  for shard in leaf.addressable_shards if copies else ():
    content = np.ascontiguousarray(shard.data).tobytes()
    digest = hashlib.blake2b(content, digest_size=_WIDTH).digest()
    row = own[parts.index(repr(shard.index))]
    differs |= bool(row.any()) and row.tobytes() != digest
    row[:] = np.frombuffer(digest, np.uint8)
  return differs, own


def _differ(every: np.ndarray) -> bool:
  """Whether processes hold different contents of a part [process part 8]."""
  return any(
    len({row.tobytes() for row in part if row.any()}) > 1
    for part in every.swapaxes(0, 1)
  )
