"""The least time a step can take on a chip, and which resource sets it."""

from typing import NamedTuple

from spectraldiffusion_jax.plan.topology import Chip


class Roofline(NamedTuple):
  """Seconds each resource is busy in one step of one device.

  They overlap at best, so that the longest bounds the step from below
  (Williams et al. 2009); published peaks are never reached.
  """

  compute: float
  memory: float
  network: float

  @property
  def seconds(self) -> float:
    """Lower bound of the step."""
    return max(self)

  @property
  def bound(self) -> str:
    """The resource that sets it."""
    return max(self._fields, key=lambda name: getattr(self, name))


def roofline(
  chip: Chip, *, flops: float, traffic: float, wire: float
) -> Roofline:
  """Time at the published peaks.

  Args:
    chip: what one device has.
    flops: of matrix products and convolutions.
    traffic: bytes to and from main memory.
    wire: bytes sent to other devices, as if all links carried them.
  """
  return Roofline(
    compute=flops / chip.flops,
    memory=traffic / chip.bandwidth,
    network=wire / chip.network,
  )
