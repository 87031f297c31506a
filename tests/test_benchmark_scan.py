"""The scan benchmark's rows are complete and consistent."""

from spectraldiffusion_jax.benchmarks import scan


def test_rows_compare_every_form_with_the_loop():
  rows = scan.run(lengths=(20,), repeats=1, size=(2, 3, 4))
  assert [row["form"] for row in rows] == list(scan.FORMS)
  for row in rows:
    assert row["gradient_difference"] < 1e-5
    assert row["forward_ms"] > 0 and row["gradient_megabytes"] >= 0
    loop = rows[0]["gradient_ms"] / row["gradient_ms"]
    assert abs(row["gradient_speedup"] / loop - 1) < 1e-6
  short = scan.run(
    lengths=(20,), repeats=1, size=(2, 3, 4), longest_single_chunk=10
  )
  assert len(short) == len(rows) - 1
