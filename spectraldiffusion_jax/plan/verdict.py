"""Whether a plan fits, and what to change if it does not."""

from ml_collections import ConfigDict

SMALL = 0.1
"""Share of memory below which a part is not worth a change."""


def judge(found, config: ConfigDict) -> tuple[bool | None, str]:
  """The verdict on a report.Plan: fits or not, in one line."""
  if found.hbm is None:
    return None, "compiles; simulated devices have no memory limit to hold"
  over = [step for step in found.steps if step.memory is None]
  peaks = [step.memory.peak for step in found.steps if step.memory is not None]
  if not over and max(peaks) <= found.hbm:
    share = max(peaks) / found.hbm
    return True, f"fits: {share:.0%} of the memory of a device at its peak"
  said = (
    over[0].overflow
    if over
    else f"{max(peaks) / 2**30:.1f} of {found.hbm / 2**30:.1f} GiB"
  )
  return (
    False,
    f"does not fit ({said}); {'; or '.join(remedies(found, config))}",
  )


def remedies(found, config: ConfigDict) -> list[str]:
  """Flags that take memory off a device, the cheapest in time first."""
  rows = found.mesh["data"] * found.mesh["fsdp"]
  each = found.batch_size // rows // config.training.gradient_accumulation
  fixed = sum(found.state.values())
  advice = []
  if fixed > SMALL * found.hbm and found.mesh["data"] > 1:
    shards = found.mesh["data"] * found.mesh["fsdp"]
    advice.append(f"--config.mesh.data=1 --config.mesh.fsdp={shards}")
  if config.model.compute_dtype == "float32":
    advice.append("--config.model.compute_dtype=bfloat16")
  if each > 1:
    more = 2 * config.training.gradient_accumulation
    advice.append(f"--config.training.gradient_accumulation={more}")
  if config.training.remat == "none":
    advice.append("--config.training.remat=dots")
  elif config.training.remat == "dots":
    advice.append("--config.training.remat=full")
  if found.batch_size > rows:
    advice.append(f"--config.training.batch_size={found.batch_size // 2}")
  return advice or ["a smaller --config.model.image_size, or a larger chip"]
