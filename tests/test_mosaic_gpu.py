"""The Hopper forward tile: numbers by emulation on CPU or on the GPU itself, and compilation.

`tests/gpu_emulation.py` says what an emulation shows and what it does not.
"""

import contextlib
import dataclasses
import importlib.metadata
import re
from typing import Any

import gpu_emulation
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from gpu_cases import (
    COMPILER,
    SIZES,
    WHERE,
    Case,
    made,
    of_each_row,
    ptxas_report,
    start,
    turned,
    zigzag,
)
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

import burst_jax.aot
from burst_kernels import CHIPS, FULL, PARTIAL, Tile, TileConfig, _active, mosaic_gpu
from burst_kernels._assembler import assembler
from burst_kernels._problem import Problem
from burst_kernels._tile import visible
from burst_kernels.mosaic_gpu import _config
from burst_kernels.mosaic_gpu._winners import WINNERS

HOPPER = TileConfig(chip="sm_90")

# The mask as lists of blocks and marks of tokens.


def positions(rng: np.random.Generator, rows: int, n: int, late: bool) -> jax.Array:
    """In ascending order, some of them padding, if `late` some of the greatest there are."""
    p = np.sort(rng.integers(-2, 40, (rows, n)), -1)
    return jnp.asarray(np.where(late & (p > 20), 2**31 - 2 - p, p), jnp.int32)


@pytest.mark.kernel
@hypothesis.given(st.data())
@hypothesis.settings(max_examples=12)
def test_lists_of_blocks_and_marks_of_tokens_are_the_mask(data):
    draw = data.draw
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    # Few sizes, since each compiles anew.
    t, s = draw(st.sampled_from((1, 13, 40))), draw(st.sampled_from((5, 64)))
    block_q, block_kv = draw(st.sampled_from((4, 13))), draw(st.sampled_from((1, 8)))
    rows, kinds, placed = draw(st.integers(1, 2)), draw(st.integers(0, 2)), draw(st.booleans())
    late = draw(st.booleans())

    def ids(n: int) -> jax.Array:
        return jnp.asarray(np.sort(rng.integers(0, 4, (kinds, rows, n)), -1), jnp.int32)

    tile = Tile(
        scale=1.0,
        left=draw(st.sampled_from((None, 0, 3, 2**31 - 1))) if placed else None,
        right=draw(st.sampled_from((None, 0, 4, 2**31 - 1))) if placed else None,
        q_positions=positions(rng, rows, t, late) if placed else None,
        kv_positions=positions(rng, rows, s, late) if placed else None,
        q_segments=ids(t) if kinds else None,
        kv_segments=ids(s) if kinds else None,
    )
    want = np.asarray(visible(tile.queries(t), tile.keys(s), tile))
    mask = _active.block_mask(tile, t, s, block_q, block_kv, like=jnp.zeros(1))
    if mask is None:
        assert want.all()
        return
    lists = ((mask.keys_of_queries(), 0), (mask.queries_of_keys(), 1))
    for active, q_axis in lists:
        got = pairs_visited(mask, active, block_q, block_kv, q_axis)
        assert np.array_equal(got[:, :t, :s], np.broadcast_to(want, got[:, :t, :s].shape))
        assert not got[:, :t, s:].any(), "keys beyond the last are padding"


def pairs_visited(
    mask: _active.BlockMask, active: _active.Active, block_q: int, block_kv: int, q_axis: int
) -> np.ndarray:
    """Which pairs of tokens a kernel lets through, [b, t_, s_]."""
    marks, classes, blocks = (np.asarray(x) for x in (mask.q, mask.classes, active.blocks))
    got = np.zeros((marks.shape[0], marks.shape[2], mask.kv.shape[2]), bool)
    shape = got.shape[1:] if q_axis == 0 else got.shape[:0:-1]
    compared = [
        np.asarray(_active.visible(mask.marks, tuple(q), tuple(kv), shape, q_axis))
        for q, kv in zip(mask.q, mask.kv, strict=True)
    ]
    for (row, mine), (full, total) in zip(
        np.ndindex(active.counts.shape[:2]), active.counts.reshape(-1, 2).tolist(), strict=True
    ):
        for n, other in enumerate(blocks[row, mine, :total]):
            i, j = (mine, other) if q_axis == 0 else (other, mine)
            at = np.s_[i * block_q : (i + 1) * block_q, j * block_kv : (j + 1) * block_kv]
            assert classes[row, i, j] == (FULL if n < full else PARTIAL)
            assert not got[row][at].any(), "a pair is visited once"
            seen = compared[row] if q_axis == 0 else compared[row].T
            got[row][at] = n < full or seen[at]
    return got


def test_a_causal_square_visits_its_lower_half_and_masks_its_diagonal():
    n, block = 64, 8
    p = jnp.arange(n, dtype=jnp.int32)[None]
    tile = Tile(scale=1.0, right=0, q_positions=p, kv_positions=p)
    mask = _active.block_mask(tile, n, n, block, block, like=p)
    counts = np.asarray(mask.keys_of_queries().counts[0])
    assert counts.tolist() == [[i, i + 1] for i in range(n // block)]
    assert mask.keys_of_queries().heaviest_first()[0].tolist() == list(range(n // block))[::-1]
    # Queries that fill up a block turn nothing into PARTIAL.
    p_short = p[:, : n - 3]
    tile = dataclasses.replace(tile, q_positions=p_short)
    short = _active.block_mask(tile, n - 3, n, block, block, like=p)
    assert np.array_equal(short.keys_of_queries().counts[0], counts)


# Numbers.


CAUSAL = Case("causal, four query heads to two kv heads, wide heads", t=192, s=256, N=4, K=2, H=128,
              Hv=128, q_positions=start(40), kv_positions=start(0), right=0)  # fmt: skip
CASES = (
    Case("nothing is masked, more keys than the ring holds", s=640),
    CAUSAL,
    Case("zigzag shards, float16", t=256, s=256, q_positions=zigzag, kv_positions=zigzag, right=0,
         dtype=jnp.float16),
    Case("the greatest head dim", H=256, Hv=256, s=192, q_positions=start(60), right=0,
         kv_positions=start(0)),
    Case("one query, one key", t=1, s=1),
    Case("neither tokens nor head dims fill a block", t=130, s=75, H=40, Hv=80),
    Case("window, with a soft cap", t=256, q_positions=start(64), kv_positions=start(0),
         left=60, right=4, cap=2.0, config=TileConfig(chip="sm_90", block_kv=64, stages=3)),
    Case("two kinds of documents, positions and padding of each row", B=2, t=140, kinds=2,
         q_positions=of_each_row, kv_positions=of_each_row, left=90),
    Case("keys are all after the queries", q_positions=start(0), kv_positions=start(500), right=0),
    Case("scores of hundreds", scale=9.0, q_positions=start(0), kv_positions=start(0), right=0),
    Case("256 queries a block", t=256, s=256, q_positions=start(0), kv_positions=start(0), right=0,
         config=TileConfig(chip="sm_90", block_q=256, block_kv=64)),
)  # fmt: skip


def operands(case: Case) -> oracle.Inputs:
    return oracle.inputs(
        case.name, T=case.t, S=case.s, B=case.B, N=case.N, K=case.K, H=case.H, Hv=case.Hv,
        dtype=case.dtype,
    )  # fmt: skip


def run(where: str, case: Case, tile: Tile, x: oracle.Inputs, onto: Any = None) -> list[np.ndarray]:
    """out and lse of the Hopper tile."""

    def call() -> list[np.ndarray]:
        forward = jax.jit(mosaic_gpu.tile_forward, static_argnames="config")
        found = forward(*turned(x[:3]), tile, config=case.config, onto=turned(onto))
        return [np.asarray(a) for a in turned(found)]

    if where == "gpu":
        return call()
    with gpu_emulation.emulated():
        return call()


def in_one_piece(case: Case, x: oracle.Inputs, seen: np.ndarray) -> np.ndarray:
    """Plain attention in the inputs' dtype, its probabilities rounded to it: what a user has."""
    q, k, v = (jnp.asarray(a) for a in x[:3])
    k, v = (jnp.repeat(a, case.N // case.K, axis=2) for a in (k, v))
    scores = jnp.einsum("btnh,bsnh->bnts", q, k, preferred_element_type=jnp.float32) * case.scale
    if case.cap is not None:
        scores = case.cap * jnp.tanh(scores / case.cap)
    p = jax.nn.softmax(jnp.where(seen[:, None], scores, -jnp.inf), axis=-1, where=seen[:, None])
    return np.asarray(jnp.einsum("bnts,bsnh->btnh", p.astype(case.dtype), v), np.float64)


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_out_and_lse_are_those_of_attention(case, where):
    tile, seen = made(case)
    x = operands(case)
    want = oracle.dense(x, seen, scale=case.scale, logits_soft_cap=case.cap)
    out, lse = run(where, case, tile, x)
    assert out.dtype == lse.dtype == np.float32
    # lse is a sum of exact products; out multiplies probabilities rounded to the operands' dtype.
    assert oracle.error(lse, want.lse) < 1e-5
    assert oracle.error(out, want.out) < float(jnp.finfo(case.dtype).eps)
    plain = oracle.norm_error(in_one_piece(case, x, seen), want.out) if seen.any() else 0.0
    assert oracle.norm_error(out, want.out) <= 2 * plain + 1e-6
    nothing = ~np.broadcast_to(seen, (case.B, case.t, case.s)).any(-1)
    assert not out[nothing].any() and np.isneginf(lse[nothing]).all()
    assert seen.any() == np.isfinite(lse).any(), "the case shows something"


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("case", [CAUSAL, CASES[5], CASES[7], CASES[8]], ids=str)
def test_what_was_found_before_is_merged_with(case, where):
    tile, seen = made(case)
    x = operands(case)
    own = oracle.dense(x, seen, scale=case.scale, logits_soft_cap=case.cap)
    rng = oracle.generator(case.name + " before")
    out = rng.normal(size=own.out.shape).astype(np.float32)
    lse = rng.normal(size=own.lse.shape, scale=3).astype(np.float32)
    nothing = np.arange(case.t) % 5 == 0  # rows that saw nothing before
    out[:, nothing], lse[:, nothing] = 0.0, -np.inf
    got_out, got_lse = run(where, case, tile, x, (out, lse))
    want_lse = np.logaddexp(lse.astype(np.float64), own.lse)
    finite = np.where(np.isneginf(want_lse), 0.0, want_lse)
    shares = [np.exp(a - finite)[..., None] for a in (lse.astype(np.float64), own.lse)]
    want_out = shares[0] * out + shares[1] * own.out
    assert oracle.error(got_lse, want_lse) < 1e-5
    assert oracle.error(got_out, want_out) < float(jnp.finfo(case.dtype).eps)
    assert np.array_equal(np.isneginf(got_lse), np.isneginf(want_lse))


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("s", [256, 200], ids=["read in place", "padded"])
def test_keys_and_values_may_come_in_one_array(where, s):
    case = Case("stacked", B=2, t=130, s=s, N=4, K=2, H=64, Hv=64, q_positions=start(100),
                kv_positions=start(0), right=0)  # fmt: skip
    tile, _ = made(case)
    x = operands(case)
    apart = run(where, case, tile, x)

    def call() -> list[np.ndarray]:
        q, k, v = turned(x[:3])
        forward = jax.jit(mosaic_gpu.tile_forward, static_argnames="config")
        found = forward(q, jnp.stack((k, v)), None, tile, config=case.config)
        return [np.asarray(a) for a in turned(found)]

    with contextlib.nullcontext() if where == "gpu" else gpu_emulation.emulated():
        together = call()
    for a, b in zip(apart, together, strict=True):
        np.testing.assert_array_equal(a, b)


# Compilation.


def compiled(case: Case, onto: bool) -> jax.stages.Compiled:
    """The program of eight H100, each with this tile on its shard."""
    mesh = burst_jax.aot.mesh_for("h100:8")
    spec = PartitionSpec("sp")

    def shaped(*shape: int, dtype: Any = case.dtype) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(
            (8 * shape[0], *shape[1:]), dtype, sharding=NamedSharding(mesh, spec)
        )

    tile, _ = made(case)
    q = shaped(case.B, case.N, case.t, case.H)
    k, v = (shaped(case.B, case.K, case.s, h) for h in (case.H, case.Hv))
    out = shaped(case.B, case.N, case.t, case.Hv, dtype=jnp.float32)
    given = (out, shaped(case.B, case.N, case.t, dtype=jnp.float32)) if onto else None
    # Positions and ids come from the device, as in a ring: a constant would vary over no axis.
    fields = ("q_positions", "kv_positions", "q_segments", "kv_segments")
    arrays = [a for name in fields if (a := getattr(tile, name)) is not None]
    names = [name for name in fields if getattr(tile, name) is not None]
    marks = [shaped(*a.shape, dtype=jnp.int32) for a in arrays]

    def local(q, k, v, marks, given):
        own = dataclasses.replace(tile, **dict(zip(names, marks, strict=True)))
        return mosaic_gpu.tile_forward(q, k, v, own, case.config, given)

    call = jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=True)
    return burst_jax.aot.compile_for("h100:8", call, q, k, v, marks, given)


KINDS = {
    "no mask": dict(),
    "causal": dict(q_positions=start(100), kv_positions=start(0), right=0),
    "window": dict(q_positions=start(100), kv_positions=start(0), left=300, right=9, cap=5.0),
    "documents": dict(kinds=1, B=2),
}


@COMPILER
@pytest.mark.aot
@pytest.mark.parametrize(("H", "Hv", "dtype"), SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_it_compiles_for_hopper_and_keeps_its_registers(kind, H, Hv, dtype, tmp_path, monkeypatch):
    monkeypatch.setenv("MOSAIC_GPU_DUMP_TO", str(tmp_path))
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")
    onto = (list(KINDS).index(kind) + (dtype == jnp.float16)) % 2 == 1
    case = Case(f"{kind} {H} {Hv}", t=512, s=512, N=2, H=H, Hv=Hv, dtype=dtype, **KINDS[kind])
    assert "mosaic_gpu" in compiled(case, onto).as_text()
    # A word or two around the loops, where what was found before is read.
    assert ptxas_report(tmp_path)[1] <= 16


# What it refuses.


def problem(**changes: Any) -> Problem:
    sizes = dict(B=1, t=64, s=64, N=4, K=2, H=64, Hv=64, dtype=jnp.bfloat16)
    return Problem(**(sizes | changes))


@pytest.mark.parametrize("chip", CHIPS)
def test_it_is_for_hopper_alone_and_says_what_else_there_is(chip):
    reason = mosaic_gpu.refuses(problem(), chip)
    assert (reason is None) == (chip == "sm_90")
    assert mosaic_gpu.unavailable(chip) == reason
    if chip.startswith("sm_") and reason:
        assert chip in reason and "`xla`" in reason and "sm_90" in reason


@pytest.mark.parametrize(
    ("wheel", "release", "good"),
    [
        ("nvidia-cuda-nvcc-cu12", "12.6.85", True),
        ("nvidia-cuda-nvcc-cu12", "12.8.61", False),
        ("nvidia-cuda-nvcc-cu12", "12.9.41", False),
        ("nvidia-cuda-nvcc-cu12", "12.9.86", True),
        ("nvidia-cuda-nvcc", "13.0.88", True),
        ("nothing", "1.0", True),
    ],
)
def test_an_assembler_that_miscompiles_masks_is_refused(wheel, release, good, monkeypatch):
    def version(name: str) -> str:
        if name == wheel:
            return release
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    assembler.cache_clear()
    try:
        reason = mosaic_gpu.unavailable("sm_90")
    finally:
        assembler.cache_clear()
    assert good or "pip install 'nvidia-cuda-nvcc-cu12>=12.9.86'" in str(reason)
    assert (reason is None) == good


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        (dict(dtype=jnp.float32), r"TF32.*bfloat16 and float16.*implementation='xla'"),
        (dict(dtype=jnp.float64), r"float64.*bfloat16 and float16.*implementation='xla'"),
        (dict(H=320), r"over 256.*H=320, Hv=64.*implementation='xla'"),
        (dict(Hv=257), r"over 256.*H=64, Hv=257"),
    ],
)
def test_what_it_cannot_do_is_refused_with_reason_and_remedy(changes, match):
    assert re.search(match, mosaic_gpu.refuses(problem(**changes), "sm_90"))
    p = problem(**changes)
    q, k, v = (jnp.zeros((1, n, 64, h), p.dtype) for n, h in ((4, p.H), (2, p.H), (2, p.Hv)))
    with pytest.raises(NotImplementedError, match=match):
        mosaic_gpu.tile_forward(q, k, v, Tile(scale=1.0), HOPPER)


@pytest.mark.parametrize("Hv", [1, 64, 80, 128, 192, 256])
@pytest.mark.parametrize("H", [1, 64, 80, 128, 192, 256])
def test_every_head_dim_has_block_sizes_that_fit(H, Hv):
    for kinds in (0, 3):
        sizes = problem(H=H, Hv=Hv, masked=True, kinds=kinds)
        config = mosaic_gpu.configure(sizes, "sm_90", TileConfig())
        named = [x for one in (_config.FORWARD, _config.BACKWARD) for x in one.fields]
        assert all(getattr(config, name) for name in named)
        assert mosaic_gpu.configure(sizes, "sm_90", config) == config


def test_a_head_dim_of_the_table_takes_the_blocks_that_won():
    assert {key[1:] for key in WINNERS} == {
        (one, H) for one in ("forward", "backward") for H in _config.HEAD_DIMS
    }
    for (_, _, H), won in WINNERS.items():
        # The backward fits at equal head dims, the forward also at 192 and 128.
        sizes = problem(H=H, Hv=min(H, 128) if H == 192 else H, masked=True)
        config = mosaic_gpu.configure(sizes, "sm_90", TileConfig())
        assert {name: getattr(config, name) for name in won} == won


def test_what_is_not_given_is_chosen_to_fit_what_is():
    sizes = problem(H=128, Hv=128)
    config = mosaic_gpu.configure(sizes, "sm_90", TileConfig(stages=5, stages_backward=4))
    assert (config.block_q, config.block_kv, config.stages) == (128, 64, 5)
    assert (config.block_q_backward, config.block_kv_backward) == (64, 64)


@pytest.mark.parametrize(
    ("given", "match"),
    [
        (dict(block_q=64), r"block_q=64.*one of 128, 256"),
        (dict(block_kv=100), r"block_kv=100.*64, 128, 192, 256"),
        (dict(stages=1), r"stages=1.*2, 3, 4, 5, 6"),
        (dict(block_kv=256), r"256 registers.* fit: .*\(128, 128, 2\)"),
        (dict(block_kv=128, stages=6), r"bytes of shared memory.* fit: .*\(128, 128, 2\)"),
        (dict(block_q_backward=96), r"block_q_backward=96.*one of 64, 128"),
        (dict(block_kv_backward=256), r"block_kv_backward=256.*one of 64, 128"),
        (dict(stages_backward=9), r"stages_backward=9.*1, 2, 3, 4, 5, 6"),
        (dict(block_q_backward=128), r"256 registers.*_backward.* fit: .*\(64, 128, 2\)"),
        (dict(block_q_backward=128, block_kv_backward=64), r"no size.* fit: .*\(64, 128, 2\)"),
    ],
)
def test_block_sizes_that_do_not_fit_are_refused_with_those_that_do(given, match):
    with pytest.raises(ValueError, match=match):
        mosaic_gpu.configure(problem(H=128, Hv=128), "sm_90", TileConfig(**given))
