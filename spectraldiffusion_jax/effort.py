"""How hard XLA works on a program that a CPU runs."""

import jax


def on_cpu(level: int, device: jax.Device) -> dict[str, int] | None:
  """Compiler options of a program for a device.

  Args:
    level: 0 compiles six times as fast and runs twice as slowly as XLA's own 3;
      1 compiles in 5/6 of the time, and what waits for matrix products and
      memory runs as fast (docs/results.md).
    device: that runs it.

  Returns:
    `compiler_options` of `jax.jit`; None, which leaves all to JAX, on other
    devices, and where `JAX_DISABLE_MOST_OPTIMIZATIONS` asks for level 0
    everywhere.
  """
  own = jax.config.read("jax_disable_most_optimizations")
  if own or device.platform != "cpu":
    return None
  return {"xla_backend_optimization_level": level}
