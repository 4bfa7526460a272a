"""The Triton tiles against attention in float64: interpreted on CPU, or on the GPU itself.

Triton's interpreter runs the very source of the kernels on NumPy arrays. It shows what they
compute; not what its compiler makes of them, which `test_triton_aot.py` looks at.
"""

import dataclasses
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from gpu_cases import Case, made, of_each_row, start, turned, zigzag

import burst_jax as bj
import burst_kernels
from burst_kernels import Problem, TileConfig, _dispatch, triton, xla
from burst_kernels._assembler import Assembler
from burst_kernels.triton import _chips

MISSING = any(importlib.util.find_spec(name) is None for name in ("triton", "jax_triton"))
NEEDS_TRITON = pytest.mark.skipif(
    MISSING, reason="needs the `triton` extra; `make test-kernels` installs it and runs this"
)
# Every case runs interpreted; on a machine with an NVIDIA GPU also for real.
WHERE = [
    pytest.param("interpreted", marks=[pytest.mark.kernel, NEEDS_TRITON]),
    pytest.param("gpu", marks=[pytest.mark.gpu, NEEDS_TRITON]),
]
F32 = jnp.float32


def case(name: str, **fields: Any) -> Case:
    """A small tile of more than one block each way."""
    return Case(name, **(dict(t=40, s=52, H=16, Hv=16, dtype=F32) | fields))


CASES = (
    case("nothing is masked", t=32, s=48, B=2, N=2, K=2),
    case("nothing is masked, blocks do not divide", t=33, s=47),
    case("one query, one key", t=1, s=1),
    case("causal, four query heads to two kv heads", N=4, K=2, q_positions=start(9),
         kv_positions=start(0), right=0),
    case("causal zigzag shards", t=64, s=64, q_positions=zigzag, kv_positions=zigzag, right=0),
    case("keys are all after the queries", q_positions=start(0), kv_positions=start(500), right=0),
    case("window to both sides, eight query heads to a kv head", t=64, N=8, q_positions=start(20),
         kv_positions=start(0), left=18, right=5),
    case("documents of each row and two kinds, no positions", B=2, kinds=2),
    case("positions and padding of each row, documents", B=2, kinds=1, q_positions=of_each_row,
         kv_positions=of_each_row, left=30, right=0),
    case("head dims that fill no block", H=24, Hv=40, N=2, q_positions=start(3),
         kv_positions=start(0), right=0),
    case("soft cap", cap=0.7, scale=0.4, q_positions=start(9), kv_positions=start(0), right=0),
    case("bfloat16, causal, grouped", dtype=jnp.bfloat16, N=4, K=1, H=32, Hv=32,
         q_positions=start(9), kv_positions=start(0), right=0),
    case("bfloat16, documents", dtype=jnp.bfloat16, B=2, kinds=1),
    case("float16, soft cap and window", dtype=jnp.float16, cap=3.0, q_positions=start(9),
         kv_positions=start(0), left=20, right=0),
)  # fmt: skip


def config(where: str) -> TileConfig:
    """Small blocks of two shapes, so that tokens of one side are not taken for the other's."""
    sizes = dict(block_q=16, block_kv=32, block_q_backward=32, block_kv_backward=16)
    return TileConfig(interpret=True, chip="sm_80", **sizes) if where == "interpreted" else (
        TileConfig(**sizes)
    )  # fmt: skip


def inputs(case: Case) -> oracle.Inputs:
    return oracle.inputs(
        case.name, T=case.t, S=case.s, B=case.B, N=case.N, K=case.K, H=case.H, Hv=case.Hv,
        dtype=case.dtype,
    )  # fmt: skip


def forward(backend: Any, x: oracle.Inputs, tile: Any, how: TileConfig | None, **onto: Any) -> Any:
    call = jax.jit(backend.tile_forward, static_argnames="config")
    return turned(call(*turned(x[:3]), tile, config=how, **turned(onto)))


def backward(backend: Any, arrays: Any, tile: Any, how: TileConfig | None, **onto: Any) -> Any:
    call = jax.jit(backend.tile_backward, static_argnames="config")
    return turned(call(*turned(arrays), tile, config=how, **turned(onto)))


def rows_of(case: Case, x: oracle.Inputs, seen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """lse and delta of rows that see more keys than the tile has; one sees nothing at all."""
    rng = oracle.generator(case.name + " elsewhere")
    own = oracle.dense(x, seen, scale=case.scale, logits_soft_cap=case.cap).lse
    lse = np.logaddexp(own, rng.normal(size=own.shape)).astype(np.float32)
    lse[:, 0] = -np.inf
    return lse, rng.normal(size=lse.shape).astype(np.float32)


def assert_exact(case: Case, got: Any, plain: Any, want: Any) -> None:
    """float32 to 1e-5; bfloat16 errs at most twice as much as the `xla` tile does.

    That keeps probabilities of float16 in float32, so there the limit is the dtype's.
    """
    for a, b, c in zip(got, plain, want, strict=True):
        assert a.dtype == np.float32
        if case.dtype == jnp.bfloat16:
            # What is exact in both, such as an lse, differs by its rounding alone.
            assert oracle.norm_error(a, c) <= 2 * oracle.norm_error(b, c) + 1e-6
        else:
            assert oracle.error(a, c) < (1e-5 if case.dtype == F32 else 1e-3)


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_is_attention_to_the_keys_of_the_tile(case, where):
    tile, seen = made(case)
    x = inputs(case)
    got = forward(triton, x, tile, config(where))
    want = oracle.dense(x, seen, scale=case.scale, logits_soft_cap=case.cap)
    assert_exact(case, got, forward(xla, x, tile, None), want[:2])
    nothing = ~np.broadcast_to(seen, (case.B, case.t, case.s)).any(-1)
    assert not np.asarray(got[0])[nothing].any() and np.isneginf(got[1])[nothing].all()


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_are_the_tiles_share_of_rows_that_see_more(case, where):
    tile, seen = made(case)
    x = inputs(case)
    arrays = (*x[:4], *rows_of(case, x, seen))
    got = backward(triton, arrays, tile, config(where))
    wide = [np.asarray(a, np.float64) for a in arrays]
    want = oracle.dense_tile_gradients(*wide, seen, scale=case.scale, logits_soft_cap=case.cap)
    assert_exact(case, got, backward(xla, arrays, tile, None), want)
    assert not np.asarray(got[0])[:, 0].any()


NAMED = {case.name: case for case in CASES}
ONTO = ["causal, four query heads to two kv heads", "keys are all after the queries",
        "head dims that fill no block"]  # fmt: skip


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("name", ONTO)
def test_a_tile_goes_on_from_what_was_found_before(name, where):
    case = NAMED[name]
    tile, seen = made(case)
    x, other = inputs(case), inputs(dataclasses.replace(case, name=name + " before"))
    other = other._replace(q=x.q)
    before = oracle.dense(other, np.ones_like(seen), scale=case.scale)
    blind = before.lse.copy()
    blind[:, 1] = -np.inf  # what saw nothing before starts anew
    out = np.where(np.isneginf(blind)[..., None], 0.0, before.out)
    onto = (out.astype(np.float32), blind.astype(np.float32))
    got = forward(triton, x, tile, config(where), onto=onto)
    own = oracle.dense(x, seen, scale=case.scale)
    with np.errstate(invalid="ignore", divide="ignore"):
        lse = np.logaddexp(own.lse, blind)
        parts = [np.where(np.isneginf(y), 0.0, np.exp(y - lse)) for y in (own.lse, blind)]
    want = parts[0][..., None] * own.out + parts[1][..., None] * out
    assert oracle.error(got[0], want) < 1e-5 and oracle.error(got[1], lse) < 1e-5


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("name", ONTO)
def test_gradients_are_added_to_those_that_are_given(name, where):
    case = NAMED[name]
    tile, seen = made(case)
    x = inputs(case)
    arrays = (*x[:4], *rows_of(case, x, seen))
    alone = backward(triton, arrays, tile, config(where))
    rng = oracle.generator(name + " onto")
    given = tuple(rng.normal(size=a.shape).astype(np.float32) for a in alone)
    for some in ((0, 1, 2), (0,), (1,), (2,)):
        onto = tuple(a if i in some else None for i, a in enumerate(given))
        found = backward(triton, arrays, tile, config(where), onto=onto)
        for i, (got, own) in enumerate(zip(found, alone, strict=True)):
            want = own + given[i] if i in some else own
            assert oracle.error(got, want) < 1e-6, (some, i)


@pytest.mark.parametrize("where", WHERE)
def test_scores_of_hundreds_and_gradients_beyond_float16_stay_finite(where):
    case = dataclasses.replace(
        NAMED["float16, soft cap and window"], name="large", cap=None, scale=8.0
    )
    tile, seen = made(case)
    x = inputs(case)
    x = x._replace(do=(x.do * 3000).astype(np.float16), v=(x.v * 100).astype(np.float16))
    got = forward(triton, x, tile, config(where))
    want = oracle.dense(x, seen, scale=case.scale)
    assert_exact(case, got, forward(xla, x, tile, None), want[:2])
    lse = np.asarray(want.lse, np.float32)
    delta = (np.asarray(x.do, np.float32) * np.asarray(want.out, np.float32)).sum(-1)
    arrays = (*x[:4], lse, delta)
    found = backward(triton, arrays, tile, config(where))
    wide = [np.asarray(a, np.float64) for a in arrays]
    truth = oracle.dense_tile_gradients(*wide, seen, scale=case.scale)
    assert max(np.abs(truth[0]).max(), np.abs(truth[1]).max()) > 65504
    assert_exact(case, found, backward(xla, arrays, tile, None), truth)


@pytest.mark.parametrize("where", WHERE)
def test_stacked_keys_and_values_are_read_where_they_lie(where):
    case = NAMED["causal, four query heads to two kv heads"]
    tile, seen = made(case)
    x = inputs(case)
    q, k, v, do, lse, delta = turned((*x[:4], *rows_of(case, x, seen)))
    how = config(where)

    @jax.jit
    def both(k, v):
        return (*triton.tile_forward(q, k, v, tile, how),
                *triton.tile_backward(q, k, v, do, lse, delta, tile, how))  # fmt: skip

    for a, b in zip(both(k, v), both(jnp.stack((k, v)), None), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("stacked", [False, True])
def test_vmap_makes_sequences_of_the_mapped_axis(stacked, where):
    """Queries, keys and positions are mapped; values (if apart) and segment ids are not."""
    case = dataclasses.replace(
        NAMED["documents of each row and two kinds, no positions"], t=20, s=24
    )
    tile, _ = made(case)
    x, how = inputs(case), config(where)
    q, k, v = turned(x[:3])
    qs, ks = jnp.stack((q, 2 * q)), jnp.stack((k, -k))
    starts = jnp.array([[0], [9]], jnp.int32)

    def attend(q, k, first):
        positions = jnp.arange(case.s, dtype=jnp.int32)[None]
        where_it_is = dataclasses.replace(
            tile, right=0, kv_positions=positions,
            q_positions=jnp.arange(case.t, dtype=jnp.int32)[None] + first[None],
        )  # fmt: skip
        out, lse = triton.tile_forward(
            q, jnp.stack((k, v)) if stacked else k, None if stacked else v, where_it_is, how
        )
        return out, lse, *triton.tile_backward(q, k, v, out, lse, lse, where_it_is, how)

    mapped = jax.jit(jax.vmap(attend))(qs, ks, starts)
    attend = jax.jit(attend)
    for i in range(2):
        for a, b in zip(mapped, attend(qs[i], ks[i], starts[i]), strict=True):
            np.testing.assert_allclose(a[i], b, rtol=1e-6, atol=1e-6)


@pytest.mark.kernel
@NEEDS_TRITON
@pytest.mark.parametrize(("layout", "side"), [("zigzag", "kv"), ("contiguous", "q")])
def test_a_ring_of_triton_tiles_is_attention(layout, side):
    x = oracle.inputs(f"{layout} {side}", T=93, B=1, N=4, K=2, H=16, dtype=np.float32)
    where = oracle.ring(3, layout, length=93)
    plan = bj.Plan(forward=side, backward=side, tile=config("interpreted"))
    got = oracle.sharded(x, where, plan=plan, implementation="triton", mask=bj.Mask.causal())
    oracle.assert_close(got, oracle.truth(x, mask=bj.Mask.causal()), 1e-5)


@pytest.mark.kernel
@NEEDS_TRITON
def test_layers_in_a_scan_are_made_again_in_their_backward():
    x = oracle.inputs("layers", T=32, B=1, N=2, K=1, H=16, dtype=np.float32)
    where, (q, k, v, do) = oracle.ring(2, length=32), (jnp.asarray(a) for a in x[:4])

    def gradients(**kwargs: Any) -> Any:
        def attention(q, k, v):
            return bj.burst_attention(q, k, v, sharding=where, mask=bj.Mask.causal(), **kwargs)

        def layers(q, k, v):
            return jax.lax.scan(lambda q, _: (jax.checkpoint(attention)(q, k, v), None), q,
                                length=2)[0]  # fmt: skip

        return jax.jit(lambda *x: jax.vjp(layers, *x[:3])[1](x[3]))(q, k, v, do)

    plan = bj.Plan(tile=config("interpreted"))
    plain = gradients(implementation="xla")
    for a, b in zip(gradients(plan=plan, implementation="triton"), plain, strict=True):
        assert oracle.error(a, b) < 1e-5


@pytest.mark.kernel
@NEEDS_TRITON
def test_offsets_beyond_two_to_the_31_are_reached():
    """The last of so many keys that their bytes, and their elements, are beyond int32."""
    from burst_kernels.triton import _interpret
    from burst_kernels.triton._sizes import Sizes

    H, block, s = 16, 16, 2**27 + 16
    sizes = Sizes(
        B=1, N=1, K=1, T=16, S=s, H=H, Hv=H, v_at=0, block_q=16, block_kv=block, scale=0.3,
        soft_cap=0.0, listed=True, per_sequence=False, last=True, first=False, kinds=0,
        powers=False, onto=(False, False),
    )  # fmt: skip
    rng = oracle.generator("far away")
    q = rng.normal(size=(1, 1, 16, H)).astype(np.float16)
    far = rng.normal(size=(2, block, H)).astype(np.float16)
    k, v = (np.zeros((1, 1, s, H), np.float16) for _ in range(2))  # pages nobody touches
    k[0, 0, -block:], v[0, 0, -block:] = far
    active = np.zeros((1, 1, s // block), np.int32)
    active[0, 0, 0] = s // block - 1
    counts, order = np.array([[[1, 1]]], np.int32), np.zeros((1, 1), np.int32)
    marks = np.zeros((1, 1, 16), np.int32)
    out, _ = _interpret.interpret(
        "forward_kernel", sizes, 1, (q, k, v, marks, marks, active, counts, order, q, q),
        [jax.ShapeDtypeStruct(shape, F32) for shape in (q.shape, q.shape[:3])], {},
    )  # fmt: skip
    scores = 0.3 * q[0, 0].astype(np.float64) @ far[0].astype(np.float64).T
    p = np.exp(scores - scores.max(-1, keepdims=True))
    want = p @ far[1].astype(np.float64) / p.sum(-1, keepdims=True)
    assert oracle.error(out[0, 0], want) < 1e-3


# Who computes what: nothing of this needs Triton.

PROBLEM = Problem(B=1, t=256, s=256, N=4, K=2, H=128, Hv=128, dtype=jnp.dtype(jnp.bfloat16))
GPUS = [chip for chip in burst_kernels.CHIPS if chip.startswith("sm_")]


@pytest.fixture
def with_extra(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[bool], None]]:
    """Makes it look as if the extra were installed, or were not."""

    def pretend(installed: bool) -> None:
        monkeypatch.setattr(_chips, "installed", lambda: installed)
        monkeypatch.setattr(_chips, "_assembler_too_old", lambda capability: None)
        _dispatch._chosen.cache_clear()

    yield pretend
    _dispatch._chosen.cache_clear()


def select(chip: str, name: str | None = None, config: TileConfig | None = None, **sizes: Any):
    return burst_kernels.select(
        PROBLEM._replace(**sizes), burst_kernels.chip_named(chip), name, config
    )


@pytest.mark.parametrize("chip", ["sm_80", "sm_86", "sm_89", "sm_100", "sm_120"])
def test_gpus_that_the_hopper_tiles_do_not_know_take_triton_where_it_is_installed(chip, with_extra):
    with_extra(True)
    chosen = select(chip)
    assert (chosen.name, chosen.config.chip) == ("triton", chip)
    hash(chosen)
    with_extra(False)
    assert select(chip).name == "xla"
    with pytest.raises(ValueError, match=r"it needs jax_triton.*pip install 'burst-jax\[triton\]'"):
        select(chip, "triton")


def test_hopper_takes_triton_for_what_its_own_tiles_refuse(with_extra):
    with_extra(True)
    assert select("sm_90").name == "mosaic_gpu"
    assert select("sm_90", dtype=jnp.dtype(jnp.float32)).name == "triton"


@pytest.mark.parametrize("chip", ["sm_70", "sm_75"])
def test_gpus_whose_tensor_cores_triton_does_not_use_run_xla_and_say_why(chip, with_extra):
    with_extra(True)
    assert select(chip).name == "xla"
    with pytest.raises(ValueError, match=r"tensor cores from sm_80 on; on sm_7"):
        select(chip, "triton")


@pytest.mark.parametrize(
    ("sizes", "reason"),
    [(dict(dtype=jnp.dtype(jnp.float64)), "this is float64"), (dict(H=257), "over 256 leave no")],
)
def test_what_triton_refuses_falls_to_xla_or_is_refused_with_the_reason(sizes, reason, with_extra):
    with_extra(True)
    assert select("sm_80", **sizes).name == "xla"
    with pytest.raises(ValueError, match=reason):
        select("sm_80", "triton", **sizes)


@pytest.mark.parametrize("chip", GPUS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("dims", [(1, 1), (64, 64), (72, 128), (192, 128), (256, 256)])
@pytest.mark.parametrize("kinds", [0, 3])
def test_nobody_who_gave_no_block_sizes_is_told_that_they_do_not_fit(
    chip, dtype, dims, kinds, with_extra
):
    with_extra(True)
    sizes = dict(H=dims[0], Hv=dims[1], dtype=jnp.dtype(dtype), kinds=kinds, masked=True)
    assert select(chip, **sizes).name in ("triton", "mosaic_gpu", "xla")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (TileConfig(block_q=48), r"block_q=48: the triton tiles take a power of two from 16 to"),
        (TileConfig(block_kv_backward=8), r"block_kv_backward=8: the triton tiles take a power"),
        (TileConfig(warps=3), r"warps=3: the triton tiles take a power of two from 1 to 16"),
        (TileConfig(stages=9), r"stages=9: the triton tiles take from 1 to 8"),
        (TileConfig(block_kv=256, stages=4), r"block_kv=256, stages=4\) needs \d+ bytes of shared "
         r"memory at H=128, Hv=128; sm_86 has 101376\. These fit: \(128, 64, 3\)"),
    ],
)  # fmt: skip
def test_sizes_that_do_not_fit_are_refused_with_those_that_do(config, message, with_extra):
    with_extra(True)
    with pytest.raises(ValueError, match=message):
        select("sm_86", "triton", config)


def test_what_is_given_is_taken_and_the_rest_chosen_to_fit(with_extra):
    with_extra(True)
    config = select("sm_80", "triton", TileConfig(block_q=64, warps=4)).config
    assert (config.block_q, config.warps) == (64, 4)
    assert config.block_kv and config.block_q_backward and config.block_kv_backward


@pytest.mark.parametrize(
    ("wheel", "release", "chip", "remedy"),
    [
        ("nvidia-cuda-nvcc", (13, 0, 88), "sm_80", None),
        ("nvidia-cuda-nvcc", (13, 0, 88), "sm_100", "'nvidia-cuda-nvcc>=13.4'"),
        ("nvidia-cuda-nvcc", (13, 4, 59), "sm_100", None),
        ("nvidia-cuda-nvcc-cu12", (12, 8, 61), "sm_80", "'nvidia-cuda-nvcc-cu12>=12.9'"),
        ("nvidia-cuda-nvcc-cu12", (12, 9, 86), "sm_90", "'jax[cuda13]' 'nvidia-cuda-nvcc>=13.4'"),
        (None, None, "sm_100", None),  # CUDA that is no wheel
    ],
)
def test_an_assembler_that_is_older_than_tritons_is_reported_with_the_remedy(
    wheel, release, chip, remedy, monkeypatch
):
    monkeypatch.setattr(_chips, "installed", lambda: True)
    monkeypatch.setattr(_chips, "assembler", lambda: wheel and Assembler(wheel, release))
    monkeypatch.setattr(_chips, "_tritons_assembler", lambda sm: (13, 4) if sm >= 90 else (12, 9))
    reason = _chips.unavailable(chip)
    assert (reason is None) == (remedy is None)
    assert remedy is None or f"pip install {remedy}." in reason


@NEEDS_TRITON
@pytest.mark.kernel
def test_tritons_assembler_is_asked_for():
    assert _chips._tritons_assembler(80) >= (12, 8)


# The sizes that users get: above, blocks are small, for the interpreter's sake.
@NEEDS_TRITON
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, F32])
@pytest.mark.parametrize("H", [64, 128, 256])
@pytest.mark.parametrize("right", [None, 0])
def test_many_blocks_of_the_sizes_that_are_chosen_on_the_gpu(H, right, dtype):
    where = start(0) if right == 0 else None
    many = Case("many blocks", t=2048, s=2048, B=2, N=4, K=2, H=H, Hv=H, right=right, dtype=dtype,
                q_positions=where, kv_positions=where)  # fmt: skip
    tile, seen = made(many)
    x = inputs(many)
    want = oracle.dense(x, seen, scale=many.scale)
    arrays = (*x[:4], *rows_of(many, x, seen))
    wide = [np.asarray(a, np.float64) for a in arrays]
    truth = oracle.dense_tile_gradients(*wide, seen, scale=many.scale)
    runs = [
        (*forward(triton, x, tile, None), *backward(triton, arrays, tile, None)) for _ in range(3)
    ]
    plain = (*forward(xla, x, tile, None), *backward(xla, arrays, tile, None))
    assert_exact(many, runs[0], plain, (*want[:2], *truth))
    for again in runs[1:]:
        for a, b in zip(runs[0], again, strict=True):
            np.testing.assert_array_equal(a, b, err_msg="no program adds to another's results")
