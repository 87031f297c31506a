"""The paired benchmark of sharding: it runs, and its pairs are sane."""

import pytest

from configs import procedural
from spectraldiffusion_jax.benchmarks import sharding as benchmark


@pytest.mark.slow
def test_row():
  config = procedural.get_config("baseline").unlock()
  config.model.image_size, config.model.width = 16, 8
  config.model.num_slots, config.model.slot_dim = 3, 8
  config.model.num_iterations, config.model.decoder_width = 1, 8
  config.training.batch_size = 4
  row = benchmark.run(config.lock(), repeats=3)
  assert row["sharded_steps_per_s"] > 0 and row["plain_steps_per_s"] > 0
  # Far apart only if one of them does other work than the other.
  assert 0.2 < row["sharded_over_plain"] < 5
  assert 0.2 < row["plain_over_plain"] < 5
