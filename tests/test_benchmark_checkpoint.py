"""The benchmark of saving: its row."""

from spectraldiffusion_jax.benchmarks import checkpoint as benchmark


def test_row():
  row = benchmark.run(width=8, rows=4, depth=2, interval=2, repeats=2)
  # Two layers, their two moments and the count of Adam.
  assert row["megabytes"] == (3 * 2 * 8 * 8 * 4 + 4) / 1e6
  assert row["step_ms"] > 0 and row["fingerprint_ms"] > 0
  assert row["sync_ms"] > 0 and row["blocked_ms"] > 0
  assert row["sync_share"] > -1 and row["async_share"] > -1
