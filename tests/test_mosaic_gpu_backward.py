"""The Hopper backward tile: numbers by emulation on CPU or on the GPU itself, and compilation.

`tests/gpu_emulation.py` says what an emulation shows and what it does not.
"""

import dataclasses
import re
from contextlib import nullcontext
from typing import Any

import gpu_emulation
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
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import burst_jax.aot
from burst_kernels import Tile, TileConfig, mosaic_gpu, xla

HOPPER = TileConfig(chip="sm_90")

SCALE = Case.scale

CASES = (
    Case("nothing is masked"),
    Case("causal, four query heads to two kv heads, wide heads", t=192, s=256, N=4, K=2, H=128,
         Hv=128, q_positions=start(40), kv_positions=start(0), right=0),
    Case("zigzag shards, float16", t=256, s=256, q_positions=zigzag, kv_positions=zigzag, right=0,
         dtype=jnp.float16),
    Case("neither tokens nor head dims fill a block", t=130, s=75, H=40, Hv=80),
    Case("keys beyond the last are not seen", t=20, s=130, N=2, H=16, Hv=24),
    Case("window, with a soft cap", t=256, H=128, q_positions=start(64), kv_positions=start(0),
         left=60, right=4, cap=2.0),
    Case("two kinds of documents, positions and padding of each row", B=2, t=140, kinds=2,
         q_positions=of_each_row, kv_positions=of_each_row, left=90),
    Case("head dims too wide for one warpgroup", t=130, s=75, N=2, H=256, Hv=192,
         q_positions=start(9), kv_positions=start(0), right=0),
    Case("wide heads, documents, soft cap, float16", t=80, H=200, Hv=256, kinds=1, B=2, cap=5.0,
         dtype=jnp.float16),
    Case("keys are all after the queries", q_positions=start(0), kv_positions=start(500), right=0),
    Case("one block in flight, narrow heads by the kernel for wide ones", t=200, s=130, N=2,
         q_positions=start(90), kv_positions=start(0), right=0,
         config=TileConfig(chip="sm_90", block_kv_backward=64, stages_backward=1)),
    Case("three blocks in flight", t=330, H=72, q_positions=start(0),
         kv_positions=start(0), right=0,
         config=TileConfig(chip="sm_90", block_kv_backward=128, stages_backward=3)),
)  # fmt: skip


def operands(case: Case, seen: np.ndarray) -> tuple[np.ndarray, ...]:
    """q, k, v, do, lse, delta as the oracle has them, the last two of more keys."""
    x = oracle.inputs(
        case.name, T=case.t, S=case.s, B=case.B, N=case.N, K=case.K, H=case.H, Hv=case.Hv,
        dtype=case.dtype,
    )  # fmt: skip
    rng = oracle.generator(case.name + " elsewhere")
    own = oracle.dense(x, seen, scale=SCALE, logits_soft_cap=case.cap).lse
    lse = np.logaddexp(own, rng.normal(size=own.shape)).astype(np.float32)
    lse[:, 0] = -np.inf  # a row that sees nothing at all takes no part
    return x.q, x.k, x.v, x.do, lse, rng.normal(size=lse.shape).astype(np.float32)


def run(
    where: str,
    arrays: tuple[np.ndarray, ...],
    tile: Tile,
    onto: Any = None,
    config: TileConfig = HOPPER,
) -> list[np.ndarray]:
    """dq, dk, dv of the Hopper tile."""

    def call() -> list[np.ndarray]:
        backward = jax.jit(mosaic_gpu.tile_backward, static_argnames="config")
        found = backward(*turned(arrays), tile, config=config, onto=turned(onto))
        return [np.asarray(x) for x in turned(found)]

    if where == "gpu":
        return call()
    # Blocks of keys add to the same dq: no race, but the interpreter would take it for one.
    with gpu_emulation.emulated(detect_races=False):
        return call()


def truth(case: Case, arrays: tuple[np.ndarray, ...], seen: np.ndarray) -> tuple[np.ndarray, ...]:
    wide = [np.asarray(x, np.float64) for x in arrays]
    return oracle.dense_tile_gradients(*wide, seen, scale=SCALE, logits_soft_cap=case.cap)


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_are_those_of_attention_rounded_no_more_than_the_operands(case, where):
    tile, seen = made(case)
    arrays = operands(case, seen)
    want = truth(case, arrays, seen)
    got = run(where, arrays, tile, config=case.config)
    for name, a, b in zip(("dq", "dk", "dv"), got, want, strict=True):
        assert a.dtype == np.float32 and a.shape == b.shape
        assert oracle.error(a, b) < 4 * float(jnp.finfo(case.dtype).eps), name
        assert seen.any() == (np.abs(b).max() > 1e-2), "the case shows something"
        assert seen.any() or not a.any()
        if name == "dq":
            assert not a[:, 0].any()


@pytest.mark.parametrize("where", WHERE)
def test_the_error_is_at_most_twice_that_of_the_xla_tile(where):
    case = CASES[1]
    tile, seen = made(case)
    arrays = operands(case, seen)
    plain = turned(jax.jit(xla.tile_backward)(*turned(arrays), tile))
    want = truth(case, arrays, seen)
    for name, a, b, c in zip(
        ("dq", "dk", "dv"), run(where, arrays, tile), plain, want, strict=True
    ):
        assert oracle.norm_error(a, c) < 2 * oracle.norm_error(b, c), name


@pytest.mark.gpu
@pytest.mark.parametrize("H", [64, 128, 256])
@pytest.mark.parametrize("right", [None, 0])
def test_many_blocks_of_many_heads_on_the_gpu(H, right):
    where = start(0) if right == 0 else None
    case = Case("many blocks", t=2048, s=2048, B=2, N=8, K=2, H=H, Hv=H, right=right,
                q_positions=where, kv_positions=where)  # fmt: skip
    tile, seen = made(case)
    arrays = operands(case, seen)
    want = truth(case, arrays, seen)
    plain = turned(jax.jit(xla.tile_backward)(*turned(arrays), tile))
    # Twice: a slot read too early, or dq added to too late, need not show every time.
    for _ in range(2):
        for name, a, b, c in zip(
            ("dq", "dk", "dv"), run("gpu", arrays, tile), plain, want, strict=True
        ):
            assert oracle.norm_error(a, c) < 2 * oracle.norm_error(b, c), name


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("some", [(0, 1, 2), (1,)])
def test_gradients_are_added_to_those_that_are_given(some, where):
    case = CASES[3]
    tile, seen = made(case)
    arrays = operands(case, seen)
    rng = oracle.generator("onto")
    shapes = [x.shape for x in arrays[:3]]
    given = [
        rng.normal(size=x).astype(np.float32) if i in some else None for i, x in enumerate(shapes)
    ]
    found = run(where, arrays, tile, onto=tuple(given))
    for got, own, before in zip(found, truth(case, arrays, seen), given, strict=True):
        assert oracle.error(got, own if before is None else own + before) < 2e-2


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("s", [256, 200], ids=["read in place", "padded"])
def test_keys_and_values_may_come_in_one_array(where, s):
    case = Case("stacked", B=2, t=130, s=s, N=4, K=2, H=64, Hv=64, q_positions=start(100),
                kv_positions=start(0), right=0)  # fmt: skip
    tile, seen = made(case)
    q, k, v, *rest = operands(case, seen)
    apart = run(where, (q, k, v, *rest), tile)

    def call() -> list[np.ndarray]:
        kv = jnp.stack((turned(k), turned(v)))
        backward = jax.jit(mosaic_gpu.tile_backward, static_argnames="config")
        found = backward(turned(q), kv, None, *turned(tuple(rest)), tile, config=HOPPER)
        return [np.asarray(x) for x in turned(found)]

    with gpu_emulation.emulated(detect_races=False) if where != "gpu" else nullcontext():
        together = call()
    for a, b in zip(apart, together, strict=True):
        # dq is added to in no fixed order.
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("power", [-40, 30])
def test_float16_score_gradients_neither_overflow_nor_vanish(power, where):
    case = dataclasses.replace(CASES[0], name="scaled", dtype=jnp.float16)
    tile, seen = made(case)
    q, k, v, do, lse, delta = operands(case, seen)
    # Cotangents at the edges of float16: ds would be infinite, or zero, if rounded as it is.
    do = (do.astype(np.float32) * 2.0 ** max(min(power, 12), -18)).astype(np.float16)
    arrays = (q, k, v, do, lse, (delta * 2.0**power).astype(np.float32))
    for name, a, b in zip(
        ("dq", "dk", "dv"), run(where, arrays, tile), truth(case, arrays, seen), strict=True
    ):
        assert np.isfinite(a).all() and a.any()
        assert np.abs(a - b).max() < 1e-2 * np.abs(b).max(), name


@pytest.mark.kernel
@pytest.mark.skipif(gpu_emulation.UNAVAILABLE is not None, reason=str(gpu_emulation.UNAVAILABLE))
@pytest.mark.parametrize("H", [64, 128, 256])
def test_warpgroups_do_not_race(H):
    # One block of keys and one query head to a kv head, so that dq is written once.
    case = Case("races", t=256, s=64, N=2, K=2, H=H, Hv=H, q_positions=start(0),
                kv_positions=start(0), right=0)  # fmt: skip
    tile, seen = made(case)
    arrays = operands(case, seen)
    with gpu_emulation.emulated(detect_races=True):
        backward = jax.jit(mosaic_gpu.tile_backward, static_argnames="config")
        found = turned(backward(*turned(arrays), tile, config=HOPPER))
    for a, b in zip(found, truth(case, arrays, seen), strict=True):
        assert oracle.error(a, b) < 2e-2


@pytest.mark.kernel
@pytest.mark.skipif(gpu_emulation.UNAVAILABLE is not None, reason=str(gpu_emulation.UNAVAILABLE))
def test_the_tile_can_be_vmapped():
    case = CASES[0]
    tile, seen = made(case)
    arrays = operands(case, seen)
    with gpu_emulation.emulated(detect_races=False):
        stacked = [jnp.stack((x, -x if i == 3 else x)) for i, x in enumerate(turned(arrays))]
        stacked[5] = jnp.stack((stacked[5][0], -stacked[5][0]))
        found = jax.jit(jax.vmap(lambda *a: mosaic_gpu.tile_backward(*a, tile, HOPPER)))(*stacked)
    for a, b in zip(found, truth(case, arrays, seen), strict=True):
        assert oracle.error(turned(a[0]), b) < 2e-2
        assert oracle.error(turned(a[1]), -b) < 2e-2  # gradients are linear in do and delta


def compiled(case: Case, onto: bool) -> str:
    """The program of eight H100, each with this tile, stacked results and all."""
    mesh = burst_jax.aot.mesh_for("h100:8")
    spec = PartitionSpec("sp")

    def shaped(*shape: int, dtype: Any = case.dtype) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(
            (8 * shape[0], *shape[1:]), dtype, sharding=NamedSharding(mesh, spec)
        )

    def wide(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return x.update(dtype=jnp.float32)

    q, do = (shaped(case.B, case.N, case.t, h) for h in (case.H, case.Hv))
    k, v = (shaped(case.B, case.K, case.s, h) for h in (case.H, case.Hv))
    rows = shaped(case.B, case.N, case.t, dtype=jnp.float32)
    tile, _ = made(case)

    def local(arrays: tuple, given: tuple | None) -> tuple:
        def layer(carry: None, _: None) -> tuple:
            return carry, mosaic_gpu.tile_backward(*arrays, tile, HOPPER, given)

        # As where a scan over layers stacks what each has made.
        return jax.lax.scan(layer, None, None, length=2)[1]

    call = jax.shard_map(
        local, mesh=mesh, in_specs=spec, out_specs=PartitionSpec(None, "sp"), check_vma=True
    )
    given = (wide(q), wide(k), wide(v)) if onto else None
    arrays = (q, k, v, do, rows, rows)
    return burst_jax.aot.compile_for("h100:8", call, arrays, given).as_text()


@COMPILER
@pytest.mark.aot
@pytest.mark.parametrize(("H", "Hv", "dtype"), SIZES)
@pytest.mark.parametrize("case", [CASES[i] for i in (0, 1, 5, 6)], ids=str)
def test_it_compiles_for_hopper_and_dq_is_changed_in_place(
    case, H, Hv, dtype, tmp_path, monkeypatch
):
    monkeypatch.setenv("MOSAIC_GPU_DUMP_TO", str(tmp_path))
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")
    case = dataclasses.replace(case, H=H, Hv=Hv, dtype=dtype)
    text = compiled(case, onto=case.cap is not None)
    # Addresses, and more of them in a soft cap's loop; bytes of each thread.
    assert ptxas_report(tmp_path)[1] <= (900 if case.cap else 700)
    computation, calls = "", []
    for line in text.splitlines():
        if line and not line[0].isspace():
            computation = line.split()[0]
        elif "mosaic_gpu" in line and "custom-call(" in line:
            calls.append((computation, line))
    ((computation, call),) = calls
    assert "output_to_operand_aliasing" in call
    # Inside a fusion the aliasing would be lost, and with it what dq starts from.
    assert computation.startswith("%")
    assert not re.search(rf" fusion\(.*calls={re.escape(computation)}\b", text)


def test_results_vary_over_mesh_axes_as_their_operands_do():
    mesh = jax.make_mesh((2,), ("sp",), devices=jax.devices()[:2], axis_types=(AxisType.Auto,))
    spec, tile = PartitionSpec("sp"), Tile(scale=1.0)
    types = []

    def local(x: jax.Array, row: jax.Array) -> jax.Array:
        forward = mosaic_gpu.tile_forward(x, x, x, tile, HOPPER)
        backward = mosaic_gpu.tile_backward(x, x, x, x, row, row, tile, HOPPER)
        types.extend(jax.typeof(y).manual_axis_type.varying for y in (*forward, *backward))
        return x

    x = jax.ShapeDtypeStruct((2, 1, 128, 64), jnp.bfloat16)
    row = jax.ShapeDtypeStruct((2, 1, 128), jnp.float32)
    jax.eval_shape(jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=spec), x, row)
    assert types[:5] == [{"sp"}] * 5


def test_what_it_cannot_do_is_refused_with_the_reason():
    tile = Tile(scale=1.0)

    def refused(H: int, dtype: Any, match: str, chip: str = "sm_90") -> None:
        q, row = jnp.zeros((1, 1, 64, H), dtype), jnp.zeros((1, 1, 64), jnp.float32)
        with pytest.raises(NotImplementedError, match=match):
            mosaic_gpu.tile_backward(q, q, q, q, row, row, tile, TileConfig(chip=chip))

    refused(64, jnp.float32, "takes bfloat16 and float16")
    refused(320, jnp.bfloat16, "H=320, Hv=320")
    refused(64, jnp.bfloat16, "sm_80 has not", chip="sm_80")
