"""The TPU tiles on a TPU, and what they share with it that can be seen without one.

Every case runs on the device where there is one (`pytest -m tpu`), and a few interpreted here, with
`make test-slow`; test_mosaic_tpu_forward.py and test_mosaic_tpu_backward.py interpret many more.
The real compiler compiles each kernel for each chip (`make test-aot`).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import test_tile_contract as contract
from jax.sharding import AxisType
from test_tile_contract import Case, start, zigzag

import burst_jax as bj
from burst_kernels import Tile, TileConfig, mosaic_tpu, xla
from workbench import tpu_programs

BLOCKS = TileConfig(block_q=128, block_kv=128)


def shuffled(n: int) -> np.ndarray:
    """Positions of two sequences: in no order with padding, and in order with padding behind."""
    mixed = oracle.permutation(n).copy()
    mixed[::3] = -1
    return np.stack([mixed, np.where(np.arange(n) < n - 60, np.arange(n), -1)])


def padded_front(n: int) -> np.ndarray:
    """A whole block of padding, and more."""
    return np.where(np.arange(n) < 150, -1, np.arange(n) - 150)[None]


# Several blocks on each side, odd lengths, and each thing that a mask may be made of.
CASES = (
    Case("nothing is masked", t=256, s=384, N=2, K=2, H=64, Hv=64),
    Case("one query, odd keys", t=1, s=201, N=4, K=1, H=64, Hv=64),
    Case("odd lengths, nothing is masked", t=203, s=301, N=2, K=1, H=80, Hv=80),
    Case("causal", t=300, s=300, H=128, Hv=128, right=0, N=2, K=1,
         q_positions=start(0), kv_positions=start(0)),
    Case("zigzag shards", t=256, s=256, H=64, Hv=64, right=0,
         q_positions=zigzag(1, 4), kv_positions=zigzag(2, 4)),
    Case("keys all after", t=200, s=140, H=64, Hv=64, right=0,
         q_positions=start(0), kv_positions=start(900)),
    Case("striped shards", t=200, s=200, H=64, Hv=64, right=0,
         q_positions=start(1, 4), kv_positions=start(3, 4)),
    Case("window to both sides", t=390, s=410, N=8, K=1, H=64, Hv=32, left=130, right=5,
         q_positions=start(20), kv_positions=start(0)),
    Case("positions in no order, of each sequence", t=270, s=310, H=64, Hv=64, right=20, left=200,
         q_positions=shuffled, kv_positions=shuffled),
    Case("a block of padding", t=300, s=310, H=64, Hv=64, right=0,
         q_positions=padded_front, kv_positions=padded_front),
    Case("positions of each query row, keys shared", t=260, s=300, H=64, Hv=64, right=9,
         q_positions=shuffled, kv_positions=start(0)),
    Case("queries shared, positions of each key row", t=260, s=300, H=64, Hv=64, right=9,
         q_positions=start(100), kv_positions=shuffled),
    Case("three kinds of segments", t=300, s=290, N=4, K=2, H=64, Hv=128, segments=3),
    Case("segments of each sequence & causal", t=260, s=260, H=64, Hv=64, segments=2,
         segment_rows=2, right=0, q_positions=start(0), kv_positions=start(0)),
    Case("soft cap & causal", t=200, s=270, H=96, Hv=96, cap=3.0, right=0, N=4, K=1,
         q_positions=start(70), kv_positions=start(0)),
    Case("wide heads", t=140, s=270, H=192, Hv=128, N=2, K=1, right=0,
         q_positions=start(90), kv_positions=start(0)),
)  # fmt: skip
# What the other tests do not interpret: rows of tokens that only one side has.
INTERPRETED = {
    "positions in no order, of each sequence",
    "positions of each query row, keys shared",
    "queries shared, positions of each key row",
}


def anywhere(*cases: Case) -> list:
    """Each case on a TPU, and some of them interpreted."""
    device = [pytest.param(c, False, marks=pytest.mark.tpu, id=f"{c}, TPU") for c in cases]
    return device + [
        pytest.param(c, True, marks=pytest.mark.slow, id=f"{c}, interpreted")
        for c in cases
        if c.name in INTERPRETED
    ]


def turned(x: Any) -> Any:
    return jax.tree.map(lambda a: jnp.asarray(a).swapaxes(1, 2), x)


def gradients(backend: Any, x: oracle.Inputs, tile: Any, config: TileConfig | None) -> tuple:
    """out, lse, dq, dk, dv of one backend, heads after tokens, float64."""
    q, k, v, do = turned(x[:4])
    out, lse = jax.jit(backend.tile_forward, static_argnums=4)(q, k, v, tile, config)
    delta = (do.astype(out.dtype) * out).sum(-1)
    rest = jax.jit(backend.tile_backward, static_argnums=7)(q, k, v, do, lse, delta, tile, config)
    return tuple(np.asarray(a.swapaxes(1, 2), np.float64) for a in (out, lse, *rest))


def wanted(case: Case, dtype: str) -> tuple[Any, oracle.Inputs, oracle.Results]:
    """The tile, inputs without a cotangent of lse, and the truth about the rounded values."""
    tile, seen = contract.made(case)
    x = contract.inputs(case, jnp.dtype(dtype))
    x = x._replace(dlse=np.zeros_like(x.dlse))
    return tile, x, oracle.dense(x, seen, scale=case.scale, logits_soft_cap=case.cap)


@pytest.mark.parametrize("case, interpret", anywhere(*CASES))
def test_float32_tiles_are_attention_and_its_gradients(case, interpret):
    tile, x, want = wanted(case, "float32")
    found = gradients(mosaic_tpu, x, tile, dataclasses.replace(BLOCKS, interpret=interpret))
    for name, got, true in zip(oracle.Results._fields, found, want, strict=False):
        assert oracle.error(got, true) < 1e-5, name


@pytest.mark.parametrize("dtype", ["bfloat16"])
@pytest.mark.parametrize("case, interpret", anywhere(*CASES[3:5], CASES[8], CASES[14]))
def test_narrow_tiles_are_as_exact_as_plain_attention_in_their_dtype(case, interpret, dtype):
    tile, x, want = wanted(case, dtype)
    config = dataclasses.replace(BLOCKS, interpret=interpret)
    found = gradients(mosaic_tpu, x, tile, config)
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        plain = gradients(xla, x, tile, None)
    for name, got, other, true in zip(oracle.Results._fields, found, plain, want, strict=False):
        if name == "lse":
            assert oracle.error(got, true) < 1e-5
        else:
            assert oracle.norm_error(got, true) <= 2 * oracle.norm_error(other, true), name


@pytest.mark.tpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_blocks_of_its_own_choice_are_right_on_this_tpu(dtype):
    case = Case("long", t=3000, s=4100, B=1, N=4, K=2, H=128, Hv=128, right=0,
                q_positions=start(1100), kv_positions=start(0))  # fmt: skip
    tile, x, want = wanted(case, dtype)
    found = gradients(mosaic_tpu, x, tile, None)
    for name, got, true in zip(oracle.Results._fields, found, want, strict=False):
        limit = 1e-5 if dtype == "float32" or name == "lse" else 0.02
        assert oracle.error(got, true) < limit, name


@pytest.mark.tpu
@pytest.mark.parametrize("backward", ["kv", "q"])
def test_a_ring_over_all_tpus_of_this_machine_is_attention(backward):
    mesh = jax.make_mesh((jax.device_count(),), ("sp",), axis_types=(AxisType.Explicit,))
    T = 1024 * jax.device_count() - 37
    where = bj.SequenceSharding(mesh, "sp", "zigzag", length=T)
    x = oracle.inputs("ring", T=T, B=1, N=4, K=2, H=128, dtype=np.float32)
    plan = bj.Plan(backward=backward)
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        want = oracle.truth(x, mask=bj.Mask.causal())
    got = oracle.sharded(x, where, mask=bj.Mask.causal(), plan=plan, implementation="mosaic_tpu")
    for name, a, b in zip(oracle.Results._fields[:5], got, want, strict=False):
        assert oracle.error(a, b) < 1e-5, name


# The real compiler, for every chip.


def shaped(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def kernels_in(compiled: jax.stages.Compiled) -> int:
    return compiled.as_text().count('custom_call_target="tpu_custom_call"')


@pytest.mark.aot
@pytest.mark.parametrize("chip", tpu_programs.SLICES)
def test_every_kernel_compiles_for_every_chip_with_all_that_a_tile_may_ask(chip):
    """Forward, fused and split backward, masked in every way, onto what was there before."""
    B, N, K, t, s, H, Hv = 2, 4, 2, 1000, 1300, 80, 128
    blocks = TileConfig(block_q=256, block_kv=256, chip=chip)

    def everything(q, k, v, do, lse, delta, q_tokens, kv_tokens):
        tile = Tile(
            scale=0.1, logits_soft_cap=5.0, left=300, right=4,
            q_positions=q_tokens[0], kv_positions=kv_tokens[0],
            q_segments=q_tokens[1:], kv_segments=kv_tokens[1:],
        )  # fmt: skip
        seen = mosaic_tpu.tile_forward(q, k, v, tile, blocks)
        seen = mosaic_tpu.tile_forward(q, k, v, tile, blocks, seen)
        onto = (None, None, None)
        for fused in (True, False):
            config = dataclasses.replace(blocks, fused_backward=fused)
            onto = mosaic_tpu.tile_backward(q, k, v, do, lse, delta, tile, config, onto)
        return seen, onto

    for dtype in (jnp.bfloat16, jnp.float32):
        q, k = shaped(B, N, t, H, dtype=dtype), shaped(B, K, s, H, dtype=dtype)
        v, do = shaped(B, K, s, Hv, dtype=dtype), shaped(B, N, t, Hv, dtype=dtype)
        rows = shaped(B, N, t)
        tokens = (shaped(3, B, n, dtype=jnp.int32) for n in (t, s))
        args = tpu_programs.on_one(chip, q, k, v, do, rows, rows, *tokens)
        assert kernels_in(jax.jit(everything).lower(*args).compile()) >= 5


@pytest.mark.aot
@pytest.mark.parametrize("chip", tpu_programs.SLICES)
def test_blocks_of_its_own_choice_fit_every_chip(chip):
    for direction in tpu_programs.PASSES:
        program = tpu_programs.Program(
            chip=chip, direction=direction, mask="causal", tokens=16384, kv_heads=2,
            block_q=None, block_kv=None,
        )  # fmt: skip
        args = tpu_programs.on_one(chip, *tpu_programs.arguments(program))
        assert kernels_in(jax.jit(tpu_programs.function(program)).lower(*args).compile()) >= 1


@pytest.mark.aot
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "split"])
def test_vmapped_tiles_compile(fused):
    """vmap over sequences that share their positions; jax cannot interpret it on a CPU."""
    config = TileConfig(block_q=128, block_kv=128, chip="v5e", fused_backward=fused)

    def both(q, k, v, do, rows):
        positions = jnp.arange(256, dtype=jnp.int32)[None]
        tile = Tile(scale=0.1, right=0, q_positions=positions, kv_positions=positions)
        seen = mosaic_tpu.tile_forward(q, k, v, tile, config)
        return seen, mosaic_tpu.tile_backward(q, k, v, do, rows, rows, tile, config)

    q, k = shaped(3, 1, 4, 256, 128), shaped(3, 1, 2, 256, 128)
    args = tpu_programs.on_one("v5e", q, k, k, q, shaped(3, 1, 4, 256))
    assert kernels_in(jax.jit(jax.vmap(both)).lower(*args).compile()) >= 2
