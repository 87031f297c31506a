"""One of two processes of test_replicas: trains together, then alone."""

import jax
import numpy as np
import test_replicas
from absl import app

from spectraldiffusion_jax import command, distributed, replicas, sharding

CLUSTER = command.define_cluster_flags()


def main(argv: list[str]) -> None:
  """Prints what the canary finds, and the sum of what was learnt."""
  del argv
  distributed.start(**CLUSTER())
  mesh = sharding.make_mesh()
  index, count = sharding.row_share(mesh)
  share = 16 // count

  def mine(step):
    return test_replicas.rows_of(step)[index * share : (index + 1) * share]

  params = test_replicas.train(mesh, mine)
  print("together", replicas.out_of_step(params))
  alone = test_replicas.train_alone(mesh, mine)
  print("alone", replicas.out_of_step(alone))
  own = [np.asarray(p.addressable_data(0)) for p in jax.tree.leaves(params)]
  print(sum(float(np.abs(value).sum()) for value in own))


if __name__ == "__main__":
  app.run(main)
