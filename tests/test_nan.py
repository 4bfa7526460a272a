"""A NaN is not lost on its way: what saw it is NaN, in outputs and gradients, and nothing else is.

Each backend where it runs on a CPU. A model whose numbers have run away must not look healthy.
"""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import burst_jax as bj
from burst_kernels import BACKENDS, Tile, TileConfig

KERNEL = pytest.mark.kernel
NEEDS_TRITON = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("triton", "jax_triton")),
    reason="needs the `triton` extra; `make test-kernels` installs it and runs this",
)
SMALL = dict(block_q=16, block_kv=16, block_q_backward=16, block_kv_backward=16)
WAYS = [
    pytest.param("xla", None, id="xla"),
    pytest.param("mosaic_tpu", TileConfig(interpret=True, chip="v5e"), id="tpu", marks=KERNEL),
    pytest.param(
        "triton", TileConfig(interpret=True, chip="sm_80", **SMALL), id="triton",
        marks=[KERNEL, NEEDS_TRITON],
    ),
]  # fmt: skip
T, H = 32, 16
ROW = 20


@pytest.mark.parametrize(("name", "config"), WAYS)
@pytest.mark.parametrize("bad", ["a query is NaN", "scores overflow"])
def test_a_nan_is_in_all_that_saw_it(name, config, bad):
    rng = oracle.generator(bad)
    q, k, v, do = (rng.normal(size=(1, 1, T, H)).astype(np.float32) for _ in range(4))
    if bad == "a query is NaN":
        q[0, 0, ROW, 3] = np.nan
    else:
        q[0, 0, ROW, 0], k[0, 0, 5, 0] = 3e38, 10  # a score of inf: inf - inf in its row
    at = jnp.arange(T, dtype=jnp.int32)[None]
    tile = Tile(scale=0.25, right=0, q_positions=at, kv_positions=at)
    backend = BACKENDS[name]
    out, lse = jax.jit(lambda *x: backend.forward(*x, tile, config=config))(q, k, v)
    others = np.arange(T) != ROW
    assert np.isnan(np.asarray(out)[0, 0, ROW]).all() and np.isnan(np.asarray(lse)[0, 0, ROW])
    assert np.isfinite(np.asarray(out)[0, 0, others]).all()
    assert np.isfinite(np.asarray(lse)[0, 0, others]).all()

    delta = np.zeros((1, 1, T), np.float32)
    arrays = (q, k, v, do, np.asarray(lse), delta)
    dq, dk, dv = jax.jit(lambda *x: backend.backward(*x, tile, config=config))(*arrays)
    assert np.isnan(np.asarray(dq)[0, 0, ROW]).all()
    assert np.isfinite(np.asarray(dq)[0, 0, others]).all()
    seen = np.arange(T) <= ROW
    for gradient in (dk, dv):
        assert np.isnan(np.asarray(gradient)[0, 0, seen]).all()


def test_a_nan_goes_round_the_ring():
    x = oracle.inputs("nan", T=32, N=2, K=2, dtype=np.float32)
    q = x.q.copy()
    q[0, 20] = np.nan
    x = x._replace(q=q)
    got = oracle.sharded(x, oracle.ring(4, "zigzag", length=32), mask=bj.Mask.causal())
    assert np.isnan(got.out[0, 20]).all() and np.isnan(got.lse[0, 20]).all()
    assert np.isfinite(np.delete(got.out, 20, 1)).all()
    assert np.isnan(got.dk[0, :21]).all() and np.isnan(got.dv[0, :21]).all()
