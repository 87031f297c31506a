"""The spectral benchmark's rows are complete and its labels right."""

from spectraldiffusion_jax.benchmarks import spectral


def test_rows_compare_every_graph_with_scikit_learn(monkeypatch):
  names = ("landmarks 8", "20-NN")
  monkeypatch.setattr(spectral, "CASES", (((12, 12), 2, "map", names),))
  monkeypatch.setattr(spectral, "WIDTH", 80)
  monkeypatch.setattr(spectral, "CLUSTERS", 3)
  rows = spectral.run(repeats=1)
  assert [row["graph"] for row in rows] == list(names)
  for row in rows:
    assert row["ms"] > 0 and row["tokens"] == 144 and row["images"] == 2
    assert abs(row["ratio"] - row["scikit_learn_ms"] / row["ms"]) < 1e-6
    assert min(row["ari_truth"], row["ari_scikit_learn"]) > 0.99
