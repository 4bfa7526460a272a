"""The TPU forward kernel, run by Pallas's interpreter, against attention written out in NumPy.

The interpreter fills memory that nothing wrote with NaN and refuses reads beyond an array, so what
these tests let through does neither.
"""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from test_tile_contract import CASES, Case, made, start, zigzag

from burst_kernels import (
    EMPTY,
    FULL,
    PARTIAL,
    Problem,
    Tile,
    TileConfig,
    classify,
    mosaic_tpu,
    summarize,
    xla,
)
from burst_kernels.mosaic_tpu import _active, _config

pytestmark = pytest.mark.kernel

CHOSEN = TileConfig(chip="v5e", interpret=True)
SMALL = dataclasses.replace(CHOSEN, block_q=128, block_kv=128)
# Several pieces of a pair of blocks, the last ones shorter; scores ahead of the softmax.
PIECES = TileConfig(
    chip="v6e", interpret=True, block_q=384, block_kv=384, block_compute=256, block_compute_q=256
)


def inputs(case: Case, dtype: Any = np.float32) -> oracle.Inputs:
    return oracle.inputs(
        case.name, T=case.t, S=case.s, B=case.B, N=case.N, K=case.K, H=case.H, Hv=case.Hv,
        dtype=dtype,
    )  # fmt: skip


def forward(
    x: oracle.Inputs, tile: Tile, config: TileConfig, onto: Any = None
) -> tuple[np.ndarray, np.ndarray]:
    """out and lse, laid out as the oracle's."""
    q, k, v = (jnp.asarray(a).swapaxes(1, 2) for a in x[:3])
    onto = onto and tuple(jnp.asarray(a).swapaxes(1, 2) for a in onto)
    # compiled without optimizations, see oracle.QUICKLY
    run = jax.jit(
        mosaic_tpu.tile_forward, static_argnames="config", compiler_options=oracle.QUICKLY
    )
    out, lse = run(q, k, v, tile, config=config, onto=onto)
    assert out.dtype == lse.dtype == jnp.float32
    return np.asarray(out.swapaxes(1, 2)), np.asarray(lse.swapaxes(1, 2))


def check(case: Case, config: TileConfig, tolerance: float = 1e-5) -> None:
    tile, seen = made(case)
    x = inputs(case)
    out, lse = forward(x, tile, config)
    want = oracle.dense(x, seen, scale=case.scale, logits_soft_cap=case.cap)
    assert oracle.error(out, want.out) < tolerance
    assert oracle.error(lse, want.lse) < tolerance
    nothing = ~np.broadcast_to(seen, (case.B, case.t, case.s)).any(-1)
    assert not out[nothing].any() and np.isneginf(lse[nothing]).all()


def named(name: str, /, **changes: Any) -> Case:
    return dataclasses.replace(next(case for case in CASES if case.name == name), **changes)


def long(case: Case) -> Case:
    """The same over several blocks of 128 that do not divide it."""
    heads = dict(N=1, K=1) if case.N == case.K else {}
    return dataclasses.replace(case, t=case.t * 19, s=case.s * 19, **heads)


@pytest.mark.parametrize("case", [c for c in CASES if c.t < 4 or c.t > 100], ids=str)
def test_few_tokens_and_blocks_of_its_own_choice(case):
    check(case, CHOSEN)


@pytest.mark.parametrize("case", [long(c) for c in CASES if 4 <= c.t < 100], ids=str)
def test_it_is_attention_to_the_keys_of_the_tile(case):
    check(case, SMALL)


@pytest.mark.parametrize("name", ["causal, blocks do not divide", "segments", "wider values"])
def test_the_pieces_of_a_pair_of_blocks_change_nothing(name):
    check(named(name, t=500, s=700, B=1), PIECES)


@pytest.mark.parametrize("H", [64, 80, 96, 128, 192, 256])
def test_every_head_dim(H):
    check(named("causal", t=150, s=140, B=1, N=1, K=1, H=H, Hv=H, scale=H**-0.5), SMALL)


def test_eight_query_heads_to_a_kv_head_of_another_value_head_dim():
    check(named("causal", t=130, s=200, B=1, N=8, K=1, H=64, Hv=128), SMALL)


def test_scores_of_two_hundred():
    case = named("causal", t=130, s=130, B=1, N=1, K=1)
    tile, seen = made(case)
    x = inputs(case)
    x = x._replace(q=x.q * np.float32(200 / np.abs(np.einsum("btnh,bsnh->bnts", x.q, x.k)).max()))
    tile = dataclasses.replace(tile, scale=1.0)
    want = oracle.dense(x, seen, scale=1.0)
    out, lse = forward(x, tile, CHOSEN)
    # float32 products of 200 carry an error of 200 ulp into the exponent
    assert oracle.error(out, want.out) < 1e-4 and oracle.error(lse, want.lse) < 1e-5


ONTO = ["causal, blocks do not divide", "positions of each row", "causal, keys all after",
        "keys are all padding", "nothing is masked"]  # fmt: skip


@pytest.mark.parametrize("name", ONTO)
def test_what_was_found_before_is_merged_with(name):
    case = long(named(name))
    tile, seen = made(case)
    x = inputs(case)
    rng = oracle.generator(name + " before")
    want = oracle.dense(x, seen, scale=case.scale)
    before_out = rng.normal(size=want.out.shape).astype(np.float32)
    before_lse = rng.normal(size=want.lse.shape).astype(np.float32) + 2
    before_lse[:, ::5], before_out[:, ::5] = -np.inf, 0.0
    out, lse = forward(x, tile, SMALL, (before_out, before_lse))
    want_lse = np.logaddexp(want.lse, before_lse)
    with np.errstate(invalid="ignore"):
        mine, theirs = (
            np.where(np.isneginf(a), 0.0, np.exp(a - want_lse))[..., None]
            for a in (want.lse, before_lse)
        )
    assert oracle.error(lse, want_lse) < 1e-5
    assert oracle.error(out, mine * want.out + theirs * before_out) < 1e-5


@pytest.mark.parametrize("name", ["causal zigzag shards", "nothing is masked", "soft cap"])
def test_bfloat16_is_as_exact_as_plain_attention_in_bfloat16(name):
    case = named(name, t=256, s=256, B=1, H=64, Hv=64, scale=0.125)
    tile, seen = made(case)
    x = inputs(case, jnp.bfloat16)
    want = oracle.dense(x, seen, scale=case.scale, logits_soft_cap=case.cap)
    out, lse = forward(x, tile, SMALL)
    q, k, v = (jnp.asarray(a).swapaxes(1, 2) for a in x[:3])
    plain = xla.tile_forward(q, k, v, tile)[0].astype(jnp.bfloat16).swapaxes(1, 2)
    ours, theirs = oracle.norm_error(out, want.out), oracle.norm_error(plain, want.out)
    assert ours < 2 * theirs
    assert oracle.error(lse, want.lse) < 1e-5  # products of 16 bits are exact


@pytest.mark.parametrize("onto", [False, True])
@pytest.mark.parametrize("name", ["causal & segments of each row", "causal, keys all after"])
def test_no_step_races_with_the_copies_of_another(name, onto, capfd):
    case = named(name, t=384, s=290, N=1, K=1)  # the interpreter aliases whole blocks only
    tile, _ = made(case)
    x = inputs(case)
    before = (np.zeros_like(x.q), np.zeros_like(x.q[..., 0])) if onto else None
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True)):
        forward(x, tile, dataclasses.replace(SMALL, interpret=False), before)
    assert "RACE DETECTED" not in capfd.readouterr().out


def test_the_interpreter_does_tell_of_a_race(capfd):
    def kernel(x, out, semaphore):
        copy = pltpu.make_async_copy(x, out, semaphore)
        copy.start()
        out[...] = jnp.zeros_like(out)
        copy.wait()

    x = jnp.ones((8, 128), jnp.float32)
    pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        scratch_shapes=[pltpu.SemaphoreType.DMA],
        interpret=pltpu.InterpretParams(detect_races=True, dma_execution_mode="eager"),
    )(x).block_until_ready()
    assert "RACE DETECTED" in capfd.readouterr().out


# Which steps are run.


def steps_run(case: Case, **onto: Any) -> list[Any]:
    """The grid points that the interpreter visited, for one head."""
    tile, _ = made(case)
    points = []

    def record(*call: Any) -> Any:
        points.append(call)
        return call[0]  # jax 0.10 threads a token through

    params = pltpu.InterpretParams(grid_point_recorder=record)
    with pltpu.force_tpu_interpret_mode(params):
        forward(inputs(case), tile, dataclasses.replace(SMALL, interpret=False), **onto)
    return points


@pytest.mark.parametrize("hop", range(4))
def test_a_causal_zigzag_hop_runs_the_pairs_that_the_mask_needs(hop):
    me, R = 1, 4
    case = named(
        "causal zigzag shards", t=1024, s=1024, B=1, N=1, K=1, config=None,
        q_positions=zigzag(me, R), kv_positions=zigzag((me - hop) % R, R),
    )  # fmt: skip
    _, seen = made(case)
    needed = seen.reshape(8, 128, 8, 128).any((1, 3)).sum()
    assert needed == (36 if hop == 0 else 32)
    # As in the ring: the first hop has nothing to merge with, the others do.
    before = None if hop == 0 else (np.zeros((1, 1024, 1, 8)), np.zeros((1, 1024, 1)))
    onto = before and tuple(a.astype(np.float32) for a in before)
    assert needed <= len(steps_run(case, onto=onto)) <= 1.1 * needed


def test_queries_that_see_nothing_cost_a_step_to_write_them_and_none_where_they_are_kept():
    case = named("causal, keys all after", t=512, s=256, B=1, N=1, K=1, H=8, Hv=8,
                 kv_positions=start(256))  # fmt: skip
    x = inputs(case)
    before = (np.ones_like(x.q), np.ones_like(x.q[..., 0]))
    # Two blocks of queries see nothing, one sees one block of keys, one sees both.
    assert len(steps_run(case)) == 2 + 1 + 2
    assert len(steps_run(case, onto=before)) == 1 + 2
    case = dataclasses.replace(case, kv_positions=start(1000))
    assert len(steps_run(case)) == 4
    assert len(steps_run(case, onto=before)) == 1


def test_pairs_that_are_full_are_told_from_those_that_are_masked():
    case = named("causal", t=512, s=512)
    tile, _ = made(case)
    active = _active.active_pairs(
        tile.queries(512), tile.keys(512), tile, blocks=(128, 128), order="q", cover=True
    )
    steps = [active.at(active.steps, n) for n in range(int(active.count))]
    kinds = {(int(s.i), int(s.j)): int(s.kind) for s in steps}
    assert kinds == {(i, j): PARTIAL if i == j else FULL for i in range(4) for j in range(i + 1)}


@pytest.mark.parametrize("order", ["q", "kv"])
@pytest.mark.parametrize("cover", [False, True])
@pytest.mark.parametrize("rows", [1, 3])
def test_the_list_of_steps_is_the_active_pairs_in_order_with_their_ends_marked(order, cover, rows):
    rng = oracle.generator(f"steps {order} {cover} {rows}")
    for _ in range(8):
        q, kv = (rng.integers(-1, 20, (rows, n)).astype(np.int32) for n in (12, 18))
        kv[0, 4:12] = -1  # blocks of padding on either side
        q[-1, :6] = -1
        tile = Tile(
            scale=1.0, right=2, left=6, q_positions=jnp.asarray(np.sort(q)),
            kv_positions=jnp.asarray(kv),
        )  # fmt: skip
        active = _active.active_pairs(
            tile.queries(12), tile.keys(18), tile, blocks=(3, 2), order=order, cover=cover
        )
        got = [tuple(map(int, active.at(active.steps, n))) for n in range(int(active.count))]
        assert got == listed(classes(tile), order, cover)


def classes(tile: Tile) -> np.ndarray:
    q, kv = summarize(tile.queries(12), 3), summarize(tile.keys(18), 2)
    q, kv = (
        jax.tree.map(lambda x, axis=axis: jnp.expand_dims(x, axis), summary)
        for summary, axis in ((q, -1), (kv, -2))
    )
    return np.asarray(classify(q, kv, tile))


def listed(classes: np.ndarray, order: str, cover: bool) -> list[tuple[int, ...]]:
    """The steps as `Step` has them, written out as loops."""
    classes = classes if order == "q" else classes.swapaxes(1, 2)
    steps = []
    for row, outer in np.ndindex(classes.shape[:2]):
        line = np.flatnonzero(classes[row, outer])
        for inner in line:
            there = np.flatnonzero(classes[row, :, inner])
            on_outer = int(inner == line[0]), int(inner == line[-1])
            on_inner = int(outer == there[0]), int(outer == there[-1])
            place = (outer, inner) if order == "q" else (inner, outer)
            flags = (*on_outer, *on_inner) if order == "q" else (*on_inner, *on_outer)
            steps.append((row, *place, int(classes[row, outer, inner]), *flags))
        if not len(line) and (cover or (not classes.any() and not row and not outer)):
            alone = (1, 1, 0, 0) if order == "q" else (0, 0, 1, 1)
            steps.append((row, *((outer, 0) if order == "q" else (0, outer)), EMPTY, *alone))
    return steps


def test_every_pair_is_the_list_of_a_tile_without_a_mask():
    tile = Tile(scale=1.0)
    for order in ("q", "kv"):
        known = _active.every_pair(4, 9, order)
        found = _active.active_pairs(
            tile.queries(12), tile.keys(18), tile, blocks=(3, 2), order=order, cover=False
        )
        assert known.count == found.count == 36
        np.testing.assert_array_equal(known.steps, found.steps)


def test_lists_that_overflow_scalar_memory_are_walked_sequence_by_sequence(monkeypatch):
    monkeypatch.setattr(_config, "MAX_STEPS", 10)
    check(long(named("positions of each row")), SMALL)
    check(long(named("segments of each row, two kinds")), SMALL)


# Where it stands, and what it refuses.


def test_it_stands_in_a_shard_map_that_checks_what_varies():
    mesh = jax.make_mesh(
        (2,), ("sp",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2]
    )
    case = named("causal", t=512, s=150, B=1, N=2, K=1)
    tile, seen = made(case)
    x = inputs(case)

    def shard(q, k, v, q_positions):
        k, v, kv_positions = (
            jax.lax.pcast(a, "sp", to="varying") for a in (k, v, tile.kv_positions)
        )
        positions = dict(q_positions=q_positions, kv_positions=kv_positions)
        of_shard = dataclasses.replace(tile, **positions)
        out, lse = mosaic_tpu.tile_forward(q, k, v, of_shard, SMALL)
        return mosaic_tpu.tile_forward(q, k, v, of_shard, SMALL, (out, lse))[1]

    turned = (jnp.asarray(a).swapaxes(1, 2) for a in x[:3])
    rows = jax.P(None, None, "sp")
    run = jax.shard_map(
        shard, mesh=mesh, in_specs=(rows, jax.P(), jax.P(), jax.P(None, "sp")), out_specs=rows
    )
    lse = np.asarray(jax.jit(run)(*turned, tile.q_positions).swapaxes(1, 2))
    # seen twice, so every probability counts double
    assert oracle.error(lse, oracle.dense(x, seen, scale=case.scale).lse + np.log(2)) < 1e-5


def problem(**changes: Any) -> Problem:
    sizes = dict(B=1, t=4096, s=4096, N=8, K=8, H=128, Hv=128, dtype=jnp.dtype(jnp.bfloat16))
    return Problem(**(sizes | changes))


@pytest.mark.parametrize(
    "changes, reason",
    [
        (dict(dtype=jnp.dtype(jnp.float64)), "float64"),
        (dict(dtype=jnp.dtype(jnp.float16)), "float16"),
        (dict(H=1024), "got 1024 and 128"),
        (dict(t=2**20, s=2**20), "pairs of blocks"),
    ],
)
def test_what_it_cannot_do_it_refuses_with_a_reason(changes, reason):
    for chip in _config.GENERATIONS:
        assert reason in (mosaic_tpu.refuses(problem(**changes), chip) or "")
        assert mosaic_tpu.refuses(problem(), chip) is None


def test_a_call_that_is_refused_says_why():
    x = jnp.zeros((1, 1, 8, 8), jnp.float64)
    with pytest.raises(NotImplementedError, match="float64"):
        mosaic_tpu.tile_forward(x, x, x, Tile(scale=1.0), CHOSEN)


def test_blocks_that_are_no_whole_lanes_are_refused_naming_one_that_fits():
    config = TileConfig(block_q=200)
    with pytest.raises(ValueError, match=r"block_q=200 is no multiple of 128.* 256 would do"):
        _config.configure_forward(problem(), "v5e", config)


@pytest.mark.parametrize("chip", _config.GENERATIONS)
def test_blocks_that_vector_memory_does_not_hold_are_refused_naming_ones_that_fit(chip):
    config = TileConfig(block_q=8192, block_kv=65536, block_compute=8192, block_compute_q=8192)
    with pytest.raises(
        ValueError, match=r"MiB.*TileConfig\(block_q=\d+, block_kv=\d+\) fits"
    ) as refusal:
        _config.configure_forward(problem(t=2**17, s=2**17), chip, config)
    found = re.search(r"block_q=(\d+), block_kv=(\d+)\) fits", str(refusal.value))
    block_q, block_kv = found.groups()
    fits = TileConfig(block_q=int(block_q), block_kv=int(block_kv))
    _config.configure_forward(problem(t=2**17, s=2**17), chip, fits)


def test_a_zigzag_shard_is_cut_in_its_middle():
    for t in (2048, 2560, 6144, 16384):
        block = mosaic_tpu.configure(problem(t=t, s=t), "v5e", TileConfig()).block_q
        assert t // 2 % block == 0 and 256 <= block <= 1024, (t, block)
