"""The TPU forward kernel, run by Pallas's interpreter, against attention written out in NumPy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax.experimental.pallas import tpu as pltpu
from test_tile_contract import CASES, Case, made, start, zigzag, some_padding, of_each_row

from burst_kernels import Tile, TileConfig, mosaic_tpu, xla

SMALL = TileConfig(block_q=128, block_kv=128, chip="v5e", interpret=True)
CHOSEN = TileConfig(chip="v5e", interpret=True)


def inputs(case: Case, dtype=np.float32) -> oracle.Inputs:
    return oracle.inputs(
        case.name, T=case.t, S=case.s, B=case.B, N=case.N, K=case.K, H=case.H, Hv=case.Hv,
        dtype=dtype,
    )  # fmt: skip


def forward(x: oracle.Inputs, tile: Tile, config: TileConfig, onto=None):
    q, k, v = (jnp.asarray(a).swapaxes(1, 2) for a in x[:3])
    onto = None if onto is None else tuple(jnp.asarray(a).swapaxes(1, 2) for a in onto)
    run = jax.jit(mosaic_tpu.tile_forward, static_argnames="config")
    return tuple(np.asarray(a.swapaxes(1, 2)) for a in run(q, k, v, tile, config, onto))


def long(case: Case) -> Case:
    """The same case over several blocks of 128, none of which is whole."""
    return dataclasses.replace(case, t=case.t * 25, s=case.s * 25)


SHORT = [c for c in CASES if c.t < 1000]


@pytest.mark.parametrize("case", [*CASES, *map(long, SHORT)], ids=lambda c: f"{c} {c.t}x{c.s}")
def test_it_is_attention_to_the_keys_of_the_tile(case):
    tile, visible = made(case)
    x = inputs(case)
    out, lse = forward(x, tile, SMALL if case.t > 20 else CHOSEN)
    want = oracle.dense(x, visible, scale=case.scale, logits_soft_cap=case.cap)
    assert oracle.error(out, want.out) < 1e-5
    assert oracle.error(lse, want.lse) < 1e-5
    nothing = ~np.broadcast_to(visible, (case.B, case.t, case.s)).any(-1)
    assert not out[nothing].any() and np.isneginf(lse[nothing]).all()
