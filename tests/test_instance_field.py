"""Targets, losses and decoding of the instance field."""

import jax
import jax.numpy as jnp
import numpy as np

from spectraldiffusion_jax.ops import instance_field
from spectraldiffusion_jax.ops.composite import IGNORE

SIZE = 64


def label_map():
  """Three rectangles, two of them in contact."""
  labels = np.zeros((1, SIZE, SIZE), np.int32)
  labels[0, 10:22, 8:20] = 1
  labels[0, 10:24, 20:36] = 2
  labels[0, 40:56, 30:50] = 3
  return jnp.asarray(labels)


def perfect_field(labels):
  """The field that says exactly what the labels say."""
  target = instance_field.targets(labels, num_objects=4)
  object_ = jnp.sum(target.members, axis=-1, keepdims=True)
  offset = target.vote - instance_field.positions(SIZE, SIZE)[None]
  return jnp.concatenate(
    [20.0 * object_ - 10.0, offset * object_, jnp.zeros((1, SIZE, SIZE, 2))],
    axis=-1,
  )


def test_targets_against_loops():
  labels = label_map().at[0, :5].set(IGNORE)
  target = instance_field.targets(labels, num_objects=4)
  place = np.asarray(instance_field.positions(SIZE, SIZE))
  for k in (1, 2, 3):
    own = np.asarray(labels[0]) == k
    np.testing.assert_allclose(
      target.vote[0][own],
      np.tile(place[own].mean(0), (own.sum(), 1)),
      rtol=1e-5,
    )
    assert np.all(target.area[0][own] == own.sum())
  np.testing.assert_array_equal(target.weight[0] == 0, labels[0] == IGNORE)


def test_tiny_objects_are_ignored():
  labels = jnp.zeros((1, SIZE, SIZE), jnp.int32).at[0, 3, 3].set(1)
  target = instance_field.targets(labels, num_objects=2)
  assert target.weight[0, 3, 3] == 0 and target.weight.sum() == SIZE**2 - 1


def test_perfect_field_has_no_loss_and_decodes_exactly():
  labels = label_map()
  field = perfect_field(labels)
  target = instance_field.targets(labels, num_objects=4)
  loss = instance_field.losses(field, target, target.weight)
  for name in ("foreground", "vote", "slot"):
    assert 0 <= float(loss[name]) < 1e-3, name
  got = np.asarray(instance_field.decode(field[0], num_objects=6))
  pairs = {
    (int(a), int(b)) for a, b in zip(np.ravel(labels), got.ravel(), strict=True)
  }
  assert len(pairs) == 4 and (0, 0) in pairs


def test_wrong_field_pays_everywhere():
  labels = label_map()
  target = instance_field.targets(labels, num_objects=4)
  field = -perfect_field(labels)
  loss = instance_field.losses(field, target, target.weight)
  assert loss["foreground"] > 5 and loss["vote"] > 0.01 and loss["slot"] > 0.1


def test_slot_posterior_loss_against_numpy():
  random = np.random.default_rng(0)
  key = random.normal(size=(1, 30, 3))
  member = np.eye(4)[random.integers(0, 3, 30)][None]
  weight = random.uniform(size=(1, 30))
  got = instance_field.slot_posterior_loss(
    *(jnp.asarray(x, jnp.float32) for x in (key, member, weight))
  )
  mean = np.stack([key[0][member[0, :, k] > 0].mean(0) for k in range(3)])
  logit = -0.5 * ((key[0][:, None] - mean) ** 2).sum(-1)
  log = logit - np.log(np.exp(logit).sum(1, keepdims=True))
  own = (log * member[0, :, :3]).sum(1)
  want = -(weight[0] * own).sum() / max(weight.sum(), 1)
  np.testing.assert_allclose(got, want, rtol=1e-4)


def test_contradicted_spares_exact_labels():
  labels = label_map()
  target = instance_field.targets(labels, num_objects=4)
  logit = perfect_field(labels)[..., 0]
  none = jnp.zeros(labels.shape)
  assert not np.any(instance_field.contradicted(logit, target, none))
  assert np.all(instance_field.contradicted(-logit, target, none))
  assert not np.any(instance_field.contradicted(-logit, target, none + 1))


def test_gradients_are_finite_without_any_object():
  labels = jnp.zeros((1, SIZE, SIZE), jnp.int32)
  target = instance_field.targets(labels, num_objects=4)

  def total(field):
    loss = instance_field.losses(field, target, target.weight)
    return sum(loss.values())

  gradient = jax.grad(total)(jnp.zeros((1, SIZE, SIZE, 5)))
  assert np.all(np.isfinite(gradient))
  label = instance_field.decode(jnp.full((SIZE, SIZE, 5), -1.0), num_objects=4)
  assert not np.any(label)
