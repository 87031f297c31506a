"""Recomputation policies: the same gradient from fewer kept activations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import procedural
from spectraldiffusion_jax import build, train_state
from spectraldiffusion_jax.models import layers, unet


@functools.cache
def kept_bytes(variant, encoder, policy) -> tuple[int, str]:
  """Bytes the forward pass hands to the backward pass; parameter shapes."""
  config = procedural.get_config(variant).unlock()
  config.training.remat, config.model.encoder = policy, encoder
  config.model.image_size, config.model.token_stride = 32, 4
  config.composite.rounds = 0
  model = build.make_model(config.lock())
  loss_fn = build.make_loss_fn(config, model)
  image = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
  rngs = train_state.stream_keys(0, 0)
  create = functools.partial(model.init, rngs, label_slots=2, train=True)
  labels = jax.ShapeDtypeStruct((2, 32, 32), jnp.int32)
  params = jax.eval_shape(create, image, labels)["params"]

  def forward(params, image):
    loss = lambda p: loss_fn(p, {"image": image}, rngs)[0]
    return jax.vjp(loss, params)[1]

  pull = jax.eval_shape(forward, params, image)
  size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(pull))
  return size, str(jax.tree.map(jnp.shape, params))


@pytest.mark.parametrize(
  ("variant", "encoder"), [("easy", "unet"), ("baseline", "vit_tiny")]
)
def test_policies_keep_less_of_the_same_model(variant, encoder):
  sizes, shapes = zip(
    *(kept_bytes(variant, encoder, policy) for policy in layers.REMAT),
    strict=True,
  )
  none, dots, full = sizes
  assert full < dots < none
  assert len(set(shapes)) == 1


def test_recomputed_gradients_are_the_same():
  image = jax.random.uniform(jax.random.key(1), (1, 16, 16, 3))
  grads = {}
  for policy in ("none", "full"):
    model = unet.UNetEncoder(widths=(4, 4), stride=2, remat=policy)
    params = model.init(jax.random.key(0), image)
    loss = lambda p, m=model: jnp.sum(m.apply(p, image).field ** 2)
    grads[policy] = jax.grad(loss)(params)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
    grads["none"],
    grads["full"],
  )
