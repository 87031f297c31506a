"""A plan as text."""

GIB, MIB = 2**30, 2**20


def size(count: float) -> str:
  """Bytes for people."""
  for unit, name in ((GIB, "GiB"), (MIB, "MiB"), (2**10, "KiB")):
    if count >= unit:
      return f"{count / unit:.2f} {name}"
  return f"{count:.0f} B"


def table(found) -> str:
  """The whole of a report.Plan."""
  mesh = " x ".join(f"{name} {n}" for name, n in found.mesh.items())
  lines = [
    f"{found.topology}: {found.devices} devices, mesh {mesh}, batch "
    f"{found.batch_size} of {found.image_size} px; all figures per device",
    "state: "
    + ", ".join(f"{name} {size(n)}" for name, n in found.state.items()),
  ]
  for step in found.steps:
    lines += ["", *_step(step, found)]
  return "\n".join([*lines, "", f"verdict: {found.verdict}"])


def _step(step, found) -> list[str]:
  """The lines of one step."""
  if step.memory is None:
    return [f"{step.name} step: {step.overflow}"]
  memory = step.memory
  limit = "" if found.hbm is None else f" of {size(found.hbm)}"
  lines = [
    f"{step.name} step (compiled in {step.compile_seconds:.0f} s)",
    f"  memory     {size(memory.peak)}{limit}: arguments "
    f"{size(memory.arguments)}, temporary {size(memory.temporary)}, outputs "
    f"{size(memory.outputs)}, code {size(memory.code)}",
    f"  compute    {step.flops / 1e9:.2f} GFLOP in matrix products",
    f"  traffic    {size(step.traffic)} to and from main memory",
  ]
  for row in step.collectives:
    lines.append(
      f"  {row.kind:<18} {row.count} runs ({row.looped} in loops), payload "
      f"{size(row.payload)}, sends {size(row.wire)}"
    )
  if not step.collectives:
    lines.append("  no collectives")
  if step.unknown_loops:
    lines.append(
      f"  {step.unknown_loops} loops of unknown length count as one round"
    )
  if step.roofline is not None:
    times = ", ".join(
      f"{name} {1e3 * seconds:.2f}"
      for name, seconds in step.roofline._asdict().items()
    )
    rate = found.batch_size / step.roofline.seconds
    lines.append(
      f"  roofline   {1e3 * step.roofline.seconds:.2f} ms at least ({times}), "
      f"bound by {step.roofline.bound}; at most {rate:,.0f} images/s in all"
    )
  return lines
