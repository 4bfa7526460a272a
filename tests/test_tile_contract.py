"""The tile contract, kept by every backend: against attention written out in NumPy.

A new backend joins by standing in `burst_kernels.BACKENDS`. Where it cannot run it is skipped with
its own reason; what it refuses (NotImplementedError) is skipped with that. `xla` runs everything.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import burst_jax as bj
import burst_kernels
from burst_kernels import BACKENDS, EMPTY, FULL, PARTIAL, Tile, TileConfig


@dataclasses.dataclass(frozen=True)
class Case:
    """One tile. Positions and segment ids are written by functions of (rows, tokens)."""

    name: str
    t: int = 12
    s: int = 12
    B: int = 2
    N: int = 2
    K: int = 2
    H: int = 8
    Hv: int = 8
    q_positions: Callable[[int], np.ndarray] | None = None
    kv_positions: Callable[[int], np.ndarray] | None = None
    segments: int = 0
    segment_rows: int = 1
    left: int | None = None
    right: int | None = None
    scale: float = 0.3
    cap: float | None = None
    config: TileConfig | None = None

    def __str__(self) -> str:
        return self.name


def start(first: int, step: int = 1) -> Callable[[int], np.ndarray]:
    return lambda n: (first + step * np.arange(n))[None]


def zigzag(r: int, R: int) -> Callable[[int], np.ndarray]:
    def positions(n: int) -> np.ndarray:
        early, late = np.arange(n // 2) + r * n // 2, np.arange(n // 2) + (2 * R - 1 - r) * n // 2
        return np.concatenate((early, late))[None]

    return positions


def some_padding(n: int) -> np.ndarray:
    p = oracle.permutation(n).copy()
    p[::3] = -1
    return p[None]


def of_each_row(n: int) -> np.ndarray:
    return np.stack([np.arange(n) * 2, oracle.permutation(n) - n // 4])


def all_padding(n: int) -> np.ndarray:
    return np.full((1, n), -1)


BLOCKS = TileConfig(block_q=4, block_kv=3)
CASES = (
    Case("nothing is masked"),
    Case("one query, one key", t=1, s=1),
    Case("one query, many keys", t=1, s=9, K=1),
    Case("blocks do not divide, nothing is masked", t=13, s=7, config=BLOCKS),
    Case("causal", q_positions=start(0), kv_positions=start(0), right=0, config=BLOCKS),
    Case(
        "causal, blocks do not divide",
        t=13, s=11, q_positions=start(3), kv_positions=start(0), right=0,
        config=TileConfig(block_q=5, block_kv=4),
    ),
    Case("causal, keys all before", q_positions=start(40), kv_positions=start(0), right=0),
    Case("causal, keys all after", q_positions=start(0), kv_positions=start(40), right=0),
    Case(
        "causal zigzag shards",
        q_positions=zigzag(1, 4), kv_positions=zigzag(2, 4), right=0,
        config=TileConfig(block_q=3, block_kv=3),
    ),
    Case("causal striped shards", q_positions=start(1, 4), kv_positions=start(3, 4), right=0),
    Case(
        "window to the left",
        q_positions=start(6), kv_positions=start(0), left=4, right=0, config=BLOCKS,
    ),
    Case(
        "window to both sides", t=17, s=19, config=BLOCKS,
        q_positions=start(2), kv_positions=start(0), left=3, right=5,
    ),
    Case(
        "window to the right alone", q_positions=start(0), kv_positions=start(2), right=4,
        config=BLOCKS,
    ),
    Case("positions in no order, with padding", q_positions=some_padding, kv_positions=some_padding,
         right=2, config=BLOCKS),
    Case("positions of each row", q_positions=of_each_row, kv_positions=of_each_row, right=0,
         left=9, config=BLOCKS),
    Case("queries are all padding", q_positions=all_padding, kv_positions=start(0)),
    Case("keys are all padding", q_positions=start(0), kv_positions=all_padding, config=BLOCKS),
    Case("segments", segments=1, config=BLOCKS),
    Case("segments of each row, two kinds", segments=2, segment_rows=2, config=BLOCKS),
    Case("causal & segments of each row", t=11, segments=1, segment_rows=2, config=BLOCKS,
         q_positions=start(2), kv_positions=start(0), right=0),
    Case("eight query heads to a kv head", N=8, K=1, q_positions=start(0), kv_positions=start(0),
         right=0, config=BLOCKS),
    Case("six to two, one kv head a step", N=6, K=2, Hv=4,
         config=TileConfig(block_q=4, block_kv=6, kv_heads=1)),
    Case("wider values", H=4, Hv=12, q_positions=start(0), kv_positions=start(0), right=0),
    Case("soft cap", cap=0.7, q_positions=start(0), kv_positions=start(0), right=0, config=BLOCKS),
    Case("one key a block", config=TileConfig(block_q=1, block_kv=1), t=3, s=5, right=0,
         q_positions=start(1), kv_positions=start(0)),
    Case("more tokens than a default block", t=1030, s=518, B=1, N=1, K=1, H=4, Hv=4, right=0,
         q_positions=start(0), kv_positions=start(300)),
)  # fmt: skip


def visible(case: Case, ids: tuple[np.ndarray, np.ndarray] | None) -> np.ndarray:
    """Which pairs count, [b, t, s], from the definition of each field of `Tile`."""
    seen = np.ones((1, case.t, case.s), bool)
    if case.q_positions is not None:
        q, kv = case.q_positions(case.t)[:, :, None], case.kv_positions(case.s)[:, None, :]
        seen = seen & (q >= 0) & (kv >= 0)
        if case.right is not None:
            seen = seen & (kv - q <= case.right)
        if case.left is not None:
            seen = seen & (q - kv <= case.left)
    for q_kind, kv_kind in zip(*ids, strict=True) if ids else ():
        seen = seen & (q_kind[:, :, None] == kv_kind[:, None, :])
    return seen


def made(case: Case) -> tuple[Tile, np.ndarray]:
    """The tile, and which of its pairs count."""
    ids = None
    if case.segments:
        rng = oracle.generator(case.name)
        rows = (case.segments, case.segment_rows)
        ids = tuple(
            np.sort(rng.integers(0, 3, (*rows, n)), -1).astype(np.int32) for n in (case.t, case.s)
        )

    def array(x: np.ndarray | None) -> jax.Array | None:
        return None if x is None else jnp.asarray(x, jnp.int32)

    tile = Tile(
        scale=case.scale, logits_soft_cap=case.cap, left=case.left, right=case.right,
        q_positions=array(case.q_positions and case.q_positions(case.t)),
        kv_positions=array(case.kv_positions and case.kv_positions(case.s)),
        q_segments=array(ids and ids[0]), kv_segments=array(ids and ids[1]),
    )  # fmt: skip
    return tile, visible(case, ids)


@pytest.fixture(params=list(BACKENDS))
def backend(request: pytest.FixtureRequest) -> str:
    chip = burst_kernels.chip_at_hand()
    if (reason := BACKENDS[request.param].unavailable(chip)) is not None:
        pytest.skip(f"{request.param}: {reason} Runs under `pytest -m tpu` or `-m gpu` there.")
    return request.param


def run(backend: str, function: str, *args: Any, config: TileConfig | None, **onto: Any) -> Any:
    """A tile function, compiled; arrays [B, n, heads, ...] here, heads before tokens there.

    A refusal with a reason skips, except on the backend that refuses nothing.
    """

    def turned(x: Any) -> Any:
        return jax.tree.map(lambda a: a.swapaxes(1, 2), x)

    *arrays, tile = args
    try:
        compiled = jax.jit(
            getattr(BACKENDS[backend], function),
            static_argnames="config",
            compiler_options=oracle.QUICKLY,
        )
        found = compiled(*turned(arrays), tile, config=config, **turned(onto))
        return jax.tree.map(np.asarray, turned(found))
    except NotImplementedError as refusal:
        assert backend != "xla", "xla is the backend that runs everything"
        assert str(refusal), "a refusal names its reason"
        pytest.skip(f"{backend} refuses: {refusal} The case runs on xla.")


def inputs(case: Case, dtype: Any = np.float64) -> oracle.Inputs:
    return oracle.inputs(
        case.name, T=case.t, S=case.s, B=case.B, N=case.N, K=case.K, H=case.H, Hv=case.Hv,
        dtype=dtype,
    )  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_is_attention_to_the_keys_of_the_tile(backend, case):
    tile, seen = made(case)
    x = inputs(case)
    out, lse = run(backend, "forward", x.q, x.k, x.v, tile, config=case.config)
    want = oracle.dense(x, seen, scale=case.scale, logits_soft_cap=case.cap)
    assert oracle.error(out, want.out) < 1e-12
    assert oracle.error(lse, want.lse) < 1e-12
    nothing = ~np.broadcast_to(seen, (case.B, case.t, case.s)).any(-1)
    assert not out[nothing].any() and np.isneginf(lse[nothing]).all()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_backward_takes_its_share_of_rows_whose_lse_and_delta_are_of_more_keys(backend, case):
    tile, seen = made(case)
    x = inputs(case)
    rng = oracle.generator(case.name + " elsewhere")
    elsewhere = rng.normal(size=x.dlse.shape)
    lse = np.logaddexp(
        oracle.dense(x, seen, scale=case.scale, logits_soft_cap=case.cap).lse, elsewhere
    )
    lse[:, 0] = -np.inf  # a row that sees nothing at all takes no part, whatever the tile shows it
    delta = rng.normal(size=lse.shape)
    args = (x.q, x.k, x.v, x.do, lse, delta)
    got = run(backend, "backward", *args, tile, config=case.config)
    want = oracle.dense_tile_gradients(*args, seen, scale=case.scale, logits_soft_cap=case.cap)
    for name, a, b in zip(("dq", "dk", "dv"), got, want, strict=True):
        assert oracle.error(a, b) < 1e-12, name
    assert not got[0][:, 0].any()


@pytest.mark.parametrize("name", ["causal, blocks do not divide", "nothing is masked"])
def test_gradients_are_added_to_those_that_are_given(backend, name):
    case = next(case for case in CASES if case.name == name)
    tile, _ = made(case)
    x = inputs(case)
    args = (x.q, x.k, x.v, x.do, x.dlse + 3, x.dlse, tile)
    alone = run(backend, "backward", *args, config=case.config)
    rng = oracle.generator(name + " onto")
    given = tuple(rng.normal(size=a.shape) for a in alone)
    for some in ((0, 1, 2), (0,), (1, 2)):
        onto = tuple(a if i in some else None for i, a in enumerate(given))
        found = run(backend, "backward", *args, config=case.config, onto=onto)
        for i, (got, own) in enumerate(zip(found, alone, strict=True)):
            assert oracle.error(got, own + given[i] if i in some else own) < 1e-12, (some, i)


CAUSAL = next(case for case in CASES if case.name == "causal")


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_window_beyond_int32_is_none(backend, side):
    tile, _ = made(CAUSAL)
    x = inputs(CAUSAL)
    open_, wide = (
        dataclasses.replace(tile, **{"left": None, "right": None, side: limit})
        for limit in (None, 2**40)
    )
    for a, b in zip(
        run(backend, "forward", x.q, x.k, x.v, wide, config=CAUSAL.config),
        run(backend, "forward", x.q, x.k, x.v, open_, config=CAUSAL.config),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)


# Grouped heads and blocks of the backend's own choice: there XLA once refused bfloat16 on CPU.
GROUPED = dataclasses.replace(CAUSAL, name="grouped", t=64, s=64, N=4, H=16, Hv=16, config=None)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_narrow_inputs_give_float32_results_as_exact_as_their_rounded_operands(backend, dtype):
    tile, seen = made(GROUPED)
    x = inputs(GROUPED, jnp.dtype(dtype))
    x = x._replace(dlse=np.zeros_like(x.dlse))
    out, lse = run(backend, "forward", x.q, x.k, x.v, tile, config=None)
    delta = (np.asarray(x.do, np.float32) * out).sum(-1)
    gradients = run(backend, "backward", x.q, x.k, x.v, x.do, lse, delta, tile, config=None)
    want = oracle.dense(x, seen, scale=GROUPED.scale)
    # lse is a sum of exact products; the rest multiplies probabilities rounded to the operands'.
    for name, a in zip(oracle.Results._fields, (out, lse, *gradients), strict=False):
        assert a.dtype == np.float32, name
        exact = dtype == "float32" or name == "lse"
        limit = 1e-5 if exact else 4 * float(jnp.finfo(dtype).eps)
        assert oracle.error(a, getattr(want, name)) < limit, name


@pytest.mark.parametrize("function", ["forward", "backward"])
def test_results_have_the_accumulators_dtype_whatever_the_inputs(backend, function):
    tile, _ = made(CAUSAL)
    for dtype in (jnp.float64, jnp.float32, jnp.bfloat16, jnp.float16):
        wide = burst_kernels.accumulator_dtype(dtype)
        assert wide == (jnp.float64 if dtype == jnp.float64 else jnp.float32)
        q, k, v, do = (jax.ShapeDtypeStruct((2, 2, 12, 8), dtype) for _ in range(4))
        rows = jax.ShapeDtypeStruct((2, 2, 12), wide)
        args = (q, k, v) if function == "forward" else (q, k, v, do, rows, rows)
        found = jax.eval_shape(lambda *a: getattr(BACKENDS[backend], function)(*a, tile), *args)
        assert {x.dtype for x in found} == {wide}


def largest_array(fn: Callable[..., Any], *args: Any) -> int:
    jaxpr = jax.make_jaxpr(fn)(*args).jaxpr
    avals = (x.aval for eqn in bj.inspect.equations(jaxpr) for x in eqn.outvars)
    return max(math.prod(aval.shape) for aval in avals if hasattr(aval, "shape"))


@pytest.mark.parametrize("function", ["forward", "backward"])
def test_memory_is_that_of_a_block_and_keys_are_not_repeated_for_their_queries(backend, function):
    def largest(t: int, s: int, N: int, H: int, right: int | None) -> int:
        tile = Tile(
            scale=1.0, right=right,
            q_positions=jnp.arange(t, dtype=jnp.int32)[None],
            kv_positions=jnp.arange(s, dtype=jnp.int32)[None],
        )  # fmt: skip

        def shaped(*shape: int) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(shape, jnp.float32)

        q, k, rows = shaped(1, N, t, H), shaped(1, 1, s, H), shaped(1, N, t)
        args = (q, k, k) if function == "forward" else (q, k, k, q, rows, rows)
        return largest_array(lambda *a: getattr(BACKENDS[backend], function)(*a, tile), *args)

    for right in (None, 0):
        assert largest(8192, 8192, 1, 16, right) < 8192 * 8192 / 32
        # With few queries, the keys of 8 heads would be by far the largest array.
        assert largest(2, 256, 8, 32, right) < 256 * 8 * 32


@pytest.mark.parametrize("function", ["forward", "backward"])
def test_blocks_change_nothing_beyond_rounding(backend, function):
    case = dataclasses.replace(CAUSAL, name="blocks", N=4, K=2)
    tile, _ = made(case)
    x = inputs(case)
    args = (x.q, x.k, x.v) if function == "forward" else (*x[:4], x.dlse + 3, x.dlse)
    default = run(backend, function, *args, tile, config=None)
    for config in (TileConfig(block_kv=5), TileConfig(block_q=64, kv_heads=2)):
        for a, b in zip(default, run(backend, function, *args, tile, config=config), strict=True):
            assert oracle.error(a, b) < 1e-12, config


def test_a_step_of_kv_heads_that_does_not_divide_them_is_refused():
    tile, _ = made(CAUSAL)
    x = inputs(CAUSAL)
    with pytest.raises(ValueError, match=r"kv_heads=3 does not divide the 2 kv heads"):
        q, k, v = (jnp.asarray(a).swapaxes(1, 2) for a in x[:3])
        BACKENDS["xla"].forward(q, k, v, tile, TileConfig(kv_heads=3))


@pytest.mark.parametrize("field", ["block_q", "block_kv", "kv_heads"])
@pytest.mark.parametrize("value", [0, -1, 2.0])
def test_a_block_of_no_size_is_refused(field, value):
    message = rf"TileConfig\.{field} must be a positive integer.*got {value}"
    with oracle.as_users_run_it(), pytest.raises(ValueError, match=message):
        TileConfig(**{field: value})


# Classification: certain where it says so.


def classes(case: Case, ids: tuple | None, block_q: int, block_kv: int) -> np.ndarray:
    """The class of every pair of blocks, [b, blocks of queries, blocks of keys]."""

    def array(x: np.ndarray) -> jax.Array:
        return jnp.asarray(x, jnp.int32)

    tile = Tile(
        scale=1.0, left=case.left, right=case.right,
        q_positions=array(case.q_positions(case.t)), kv_positions=array(case.kv_positions(case.s)),
        q_segments=None if ids is None else array(ids[0]),
        kv_segments=None if ids is None else array(ids[1]),
    )  # fmt: skip
    q = burst_kernels.summarize(tile.queries(case.t), block_q)
    kv = burst_kernels.summarize(tile.keys(case.s), block_kv)
    q, kv = (
        jax.tree.map(lambda x, side=side: jnp.expand_dims(x, side), summary)
        for summary, side in ((q, -1), (kv, -2))
    )
    return np.asarray(burst_kernels.classify(q, kv, tile))


def blocked(seen: np.ndarray, block_q: int, block_kv: int) -> np.ndarray:
    """[b, blocks of queries, blocks of keys, pairs]"""
    b, t, s = seen.shape
    seen = seen.reshape(b, t // block_q, block_q, s // block_kv, block_kv)
    return seen.swapaxes(2, 3).reshape(b, t // block_q, s // block_kv, -1)


bounds = st.one_of(st.none(), st.integers(0, 14))
positions = st.lists(st.integers(-1, 14), min_size=12, max_size=12)
segment_ids = st.lists(st.integers(0, 2), min_size=12, max_size=12)


@settings(max_examples=80, deadline=None)
@given(
    q=positions, kv=positions, left=bounds, right=bounds,
    ids=st.one_of(st.none(), st.tuples(segment_ids, segment_ids)),
    blocks=st.sampled_from([(1, 1), (4, 3), (12, 12)]),
)  # fmt: skip
def test_a_pair_of_blocks_called_empty_is_empty_and_one_called_full_is_full(
    q, kv, left, right, ids, blocks
):
    case = Case(
        "any", left=left, right=right,
        q_positions=lambda n: np.array([q]), kv_positions=lambda n: np.array([kv]),
    )  # fmt: skip
    ids = None if ids is None else tuple(np.array(x, np.int32)[None, None] for x in ids)
    found, seen = classes(case, ids, *blocks), blocked(visible(case, ids), *blocks)
    assert set(np.unique(found)) <= {EMPTY, PARTIAL, FULL}
    assert not seen[found == EMPTY].any()
    assert seen[found == FULL].all()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 30), st.integers(0, 30), bounds, bounds)
def test_blocks_of_consecutive_tokens_are_never_called_partial_in_vain(q, kv, left, right):
    case = Case("runs", left=left, right=right, q_positions=start(q), kv_positions=start(kv))
    found, seen = classes(case, None, 4, 3), blocked(visible(case, None), 4, 3)
    np.testing.assert_array_equal(found == EMPTY, ~seen.any(-1))
    np.testing.assert_array_equal(found == FULL, seen.all(-1))
