"""The spectral step on votes: counts objects, and leaves the rest alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.metrics import adjusted_rand_score

from spectraldiffusion_jax.errors import UserError
from spectraldiffusion_jax.ops import vote_partition as vp

GRID, SLOTS = (16, 20), 8


def scene(count, *, noise=0.05, seed=0):
  """Rectangles of foreground whose tokens vote for distinct centres."""
  random = np.random.default_rng(seed)
  truth = np.zeros(GRID, int)
  for i in range(count):
    row, column = 8 * (i % 2), 5 * (i // 2)
    truth[row + 1 : row + 6, column : column + 4] = i + 1
  centre = random.uniform(0, 8, (count + 1, 2))
  while count > 1 and _nearest(centre[1:]) < 1.0:
    centre = random.uniform(0, 8, (count + 1, 2))
  vote = centre[truth] + noise * random.normal(size=(*GRID, 2))
  vote[truth == 0] = random.uniform(0, 8, ((truth == 0).sum(), 2))
  chance = np.where(truth > 0, 0.9, 0.05)
  features = np.concatenate([chance[..., None], vote], -1)
  return features.astype(np.float32), truth


def _nearest(points):
  gap = np.linalg.norm(points[:, None] - points[None], axis=-1)
  return gap[~np.eye(len(points), dtype=bool)].min()


partition = jax.jit(
  jax.vmap(lambda f: vp.vote_partition(f, num_slots=SLOTS, sigma=0.3))
)


@pytest.fixture(scope="module")
def found():
  scenes = [scene(count, seed=count) for count in range(1, SLOTS)]
  features = np.stack([features for features, _ in scenes])
  return scenes, jax.device_get(partition(features))


def test_eigenvalues_near_one_count_the_objects(found):
  scenes, part = found
  np.testing.assert_array_equal(part.count, [t.max() + 1 for _, t in scenes])
  np.testing.assert_array_equal(part.active.sum(1), part.count)


def test_each_object_has_a_slot_of_its_own(found):
  scenes, part = found
  for (_, truth), assignment in zip(scenes, part.assignment, strict=True):
    labels = assignment.argmax(1)
    assert adjusted_rand_score(truth.ravel(), labels) == 1.0
    assert (labels[truth.ravel() == 0] == 0).all()


def test_rows_sum_to_one_and_inactive_slots_hold_nothing(found):
  _, part = found
  np.testing.assert_allclose(part.assignment.sum(-1), 1, atol=1e-5)
  held = part.assignment.sum(1) > 1e-6
  assert not (held & ~part.active).any()


def test_chroma_tells_apart_what_votes_for_one_place():
  # Two objects whose tokens all vote for the same centre.
  features, truth = scene(2)
  features[truth > 0, 1:3] = 4.0
  chroma = np.array([[0.0, 0.0], [0.5, 0.2], [-0.3, 0.4]], np.float32)[truth]
  coloured = np.concatenate([features, chroma], -1)

  def labels(sigma):
    part = vp.vote_partition(
      jnp.asarray(coloured), num_slots=SLOTS, sigma=0.3, chroma_sigma=sigma
    )
    return part.assignment.argmax(1)

  assert adjusted_rand_score(truth.ravel(), labels(0.15)) == 1.0
  merged = np.minimum(truth.ravel(), 1)
  assert adjusted_rand_score(merged, labels(0.0)) == 1.0
  # Votes still count: one colour in two places is two objects.
  features, truth = scene(4)
  grey = np.concatenate([features, np.zeros((*GRID, 2), np.float32)], -1)
  part = vp.vote_partition(
    jnp.asarray(grey), num_slots=SLOTS, sigma=0.3, chroma_sigma=0.15
  )
  labels = part.assignment.argmax(1)
  assert adjusted_rand_score(truth.ravel(), labels) == 1.0


def test_blurred_votes_are_the_negative_control():
  # Votes spread as wide as the image belong to one object, not to six.
  features, _ = scene(6, noise=3.0)
  assert int(partition(features[None]).count[0]) != 7


def test_the_graph_is_a_positive_semidefinite_kernel():
  features, _ = scene(5)
  weight = np.asarray(vp.vote_graph(jnp.asarray(features), sigma=0.3).weight)
  np.testing.assert_allclose(weight, weight.T, atol=1e-6)
  assert np.linalg.eigvalsh(weight.astype(np.float64)).min() > -1e-4
  assert weight.min() >= 0


@pytest.mark.parametrize(
  "features",
  [
    np.zeros((*GRID, 3), np.float32),
    np.ones((*GRID, 3), np.float32),
    np.full((*GRID, 3), np.nan, np.float32),
  ],
  ids=["all background", "one object", "nan"],
)
def test_degenerate_fields_give_valid_partitions(features):
  part = jax.device_get(partition(features[None]))
  assert np.isfinite(part.assignment).all()
  np.testing.assert_allclose(part.assignment.sum(-1), 1, atol=1e-5)
  assert part.active[0, 0] and 1 <= part.count[0] <= SLOTS


@pytest.mark.parametrize(("slots", "grid"), [(2, (4, 4)), (3, (1, 1))])
def test_few_slots_and_one_token(slots, grid):
  features = np.ones((*grid, 3), np.float32)
  part = vp.vote_partition(features, num_slots=slots)
  assert part.assignment.shape == (grid[0] * grid[1], slots)
  np.testing.assert_allclose(part.assignment.sum(-1), 1, atol=1e-5)


def test_a_large_foreground_is_thinned_not_cut_off():
  features, truth = scene(4, noise=0.02)
  part = vp.vote_partition(features, num_slots=SLOTS, sigma=0.3, limit=40)
  assert int(part.count) == 5
  shares = np.asarray(part.assignment)[truth.ravel() > 0, 1:].sum(1) > 0
  assert 0 < shares.sum() <= 40


def test_dense_eigenvectors_give_the_same_partition(found):
  scenes, iterated = found
  dense = jax.jit(
    lambda f: vp.vote_partition(f, num_slots=SLOTS, sigma=0.3, dense=True)
  )
  for i in (0, 3, SLOTS - 2):
    part = jax.device_get(dense(scenes[i][0]))
    assert part.count == iterated.count[i]
    np.testing.assert_allclose(
      part.assignment.max(1), iterated.assignment[i].max(1), atol=1e-3
    )
    assert (
      adjusted_rand_score(
        part.assignment.argmax(1), iterated.assignment[i].argmax(1)
      )
      == 1.0
    )


def test_other_rules_count_by_the_gap_or_not_at_all(found):
  scenes = found[0]
  features = np.stack([features for features, _ in scenes])

  def counts(rule):
    run = jax.jit(
      jax.vmap(
        lambda f: (
          vp.vote_partition(
            f, num_slots=SLOTS + 1, sigma=0.3, count_rule=rule
          ).count
        )
      )
    )
    return np.asarray(run(features)).tolist()

  true = [truth.max() + 1 for _, truth in scenes]
  # A single object has its gap right behind 1; K - 2 is the most it can find.
  assert counts("eigengap") == true
  assert counts("fixed") == [SLOTS + 1] * len(scenes)
  with pytest.raises(UserError, match="count_rule='most'"):
    vp.vote_partition(features[0], num_slots=3, count_rule="most")
