"""Counting in a compiled program's text, against figures worked out by hand."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from spectraldiffusion_jax import sharding
from spectraldiffusion_jax.plan import collectives, costs, hlo
from spectraldiffusion_jax.plan.roofline import roofline
from spectraldiffusion_jax.plan.topology import Chip

TEXT = pathlib.Path(__file__).with_name("tiny.hlo").read_text()
"""A loop with a gather and a product, and one collective of each kind; laid
out as XLA's TPU compiler writes them."""


def test_collectives_by_hand():
  rows = collectives.count_collectives(hlo.parse(TEXT), devices=8)
  found = {row.kind: row[1:] for row in rows}
  assert found == {
    # (runs, of those in loops, payload, sent)
    # 4 x 8 floats are 128 bytes; groups of 4 send 2 x 3/4 of them.
    "all-reduce": (1, 0, 128, 192),
    # 3 rounds in groups of 2 and one, written twice, outside the loop.
    "all-gather": (4, 3, 4 * 256, 4 * 128),
    # 128 bytes of bf16 over 8 devices: each keeps an eighth.
    "reduce-scatter": (1, 0, 128, 112),
    "collective-permute": (1, 0, 128, 128),
  }


def test_products_in_loops_count_every_round():
  program = hlo.parse(TEXT)
  assert costs.flops(program) == 3 * 2 * 4 * 8 * 8
  assert hlo.unknown_loops(program) == 0
  unknown = hlo.parse(TEXT.replace("constant(3)", "parameter(1)"))
  assert costs.flops(unknown) == 2 * 4 * 8 * 8
  assert hlo.unknown_loops(unknown) == 1


def conv(shapes, window, labels="b0f_0io->b0f"):
  left, right, out = shapes
  return hlo.parse(f"""ENTRY %main (a: f32[1], b: f32[1]) -> f32[1] {{
  %a = f32[{left}]{{2,1,0}} parameter(0)
  %b = f32[{right}]{{2,1,0}} parameter(1)
  ROOT %c = f32[{out}]{{2,1,0}} convolution(%a, %b), {window}dim_labels={labels}
}}
""")


@pytest.mark.parametrize(
  ("shapes", "window", "taps"),
  [
    # 4 places x 3 taps, less the one at either end that falls on padding.
    (("5,4,2", "3,2,7", "5,4,7"), "window={size=3 pad=1_1}, ", 10),
    (("5,4,2", "2,2,7", "5,2,7"), "window={size=2 stride=2}, ", 4),
    # Two inputs with a zero between them: 4 of 9 pairs meet one.
    (("5,2,2", "3,2,7", "5,3,7"), "window={size=3 pad=1_1 lhs_dilate=2}, ", 4),
  ],
)
def test_convolutions_count_taps_that_meet_the_input(shapes, window, taps):
  assert costs.flops(conv(shapes, window)) == 2 * 5 * 2 * 7 * taps


def test_main_memory_traffic_by_hand():
  text = """%cut (s: f32[10,8], n: s32[]) -> f32[1,8] {
  %s = f32[10,8]{1,0} parameter(0)
  %n = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %row = f32[1,8]{1,0} dynamic-slice(%s, %n, %zero)
}

ENTRY %main (a: f32[10,8], n: s32[]) -> f32[1,8] {
  %a = f32[10,8]{1,0} parameter(0)
  %n = s32[] parameter(1)
  %f = f32[1,8]{1,0} fusion(%a, %n), kind=kLoop, calls=%cut
  %g = f32[1,8]{1,0:T(8,128)S(1)} negate(%f)
  ROOT %h = f32[1,8]{1,0} negate(%g)
}
"""
  # The fusion reads a row and an index and writes a row; one negation reads
  # a row, the other writes one: what lies between them stays on the chip.
  assert costs.memory_traffic(hlo.parse(text)) == (32 + 4 + 32) + 32 + 32


def test_a_compiled_loop_counts_as_its_rounds_do():
  mesh = sharding.make_mesh(data=4, fsdp=2)

  def chain(x, weights):
    body = lambda x, w: (jnp.tanh(x @ w), None)
    return jax.lax.scan(body, x, weights)[0]

  x = jax.ShapeDtypeStruct(
    (16, 32), jnp.float32, sharding=sharding.batch_sharding(mesh)
  )
  weights = jax.ShapeDtypeStruct(
    (5, 32, 32),
    jnp.float32,
    sharding=NamedSharding(mesh, P(None, "fsdp", None)),
  )
  text = jax.jit(chain).lower(x, weights).compile().as_text()
  program = hlo.parse(text)
  assert costs.flops(program) == 5 * 2 * (16 // 8) * 32 * 32
  (row,) = collectives.count_collectives(program, devices=8)
  assert row.kind == "all-gather" and row.count >= 1
  np.testing.assert_equal(row.payload, 5 * 32 * 32 * 4)
  np.testing.assert_equal(row.wire, row.payload // 2)


def test_roofline_arithmetic():
  chip = Chip(hbm=1.0, flops=100.0, bandwidth=10.0, network=2.0)
  found = roofline(chip, flops=50.0, traffic=20.0, wire=3.0)
  assert found == (0.5, 2.0, 1.5)
  assert found.seconds == 2.0 and found.bound == "memory"
  assert roofline(chip, flops=1e4, traffic=1.0, wire=1.0).bound == "compute"
