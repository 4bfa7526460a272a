"""The cases that break other implementations, and how exact the narrow dtypes are.

In float64 a result is right to 1e-10. In a narrower dtype it is right when its error against the
float64 truth is at most twice that of plain attention in the same dtype on one device.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import burst_jax as bj

SIDES = ("kv", "q")


def plan(side: str) -> bj.Plan:
    return bj.Plan(forward=side, backward=side)


# Masks that leave rows, shards or everything unseen. One program; the data make the case.

R, T = 4, 16
EARLIEST, LATEST = np.arange(T), np.arange(T) + 100


def rolled(shift: int) -> np.ndarray:
    """Keys that lie `shift` tokens further on than their positions say."""
    return np.roll(np.arange(T), shift)


# name -> (positions of queries, of keys, segment ids of queries, of keys)
UNSEEN: dict[str, tuple[np.ndarray, ...]] = {
    "a query before all keys sees nothing": (np.arange(T) - 3, np.arange(T), *np.ones((2, T))),
    "a query of a document without keys sees nothing": (
        np.arange(T),
        np.arange(T),
        np.where(np.arange(T) % 3, 1, 7),
        np.ones(T),
    ),
    "the first hop is wholly masked on every device": (EARLIEST, rolled(-T // R), *np.ones((2, T))),
    "the last hop alone sees anything on the last device": (
        np.where(np.arange(T) < 12, 0, np.arange(T) - 12),
        EARLIEST,
        *np.ones((2, T)),
    ),
    "each token is a document": (EARLIEST, EARLIEST, EARLIEST, EARLIEST),
    "each key is seen by one query of another device": (EARLIEST, EARLIEST, EARLIEST, rolled(6)),
    "half of the devices hold padding alone": (
        np.where(np.arange(T) < 8, np.arange(T), -1),
        np.where(np.arange(T) < 8, np.arange(T), -1),
        *np.ones((2, T)),
    ),
    "nothing is seen by anyone": (EARLIEST, LATEST, *np.ones((2, T))),
    "everything is seen by everyone": (LATEST, EARLIEST, *np.ones((2, T))),
}


@pytest.mark.parametrize("side, with_sinks", [("kv", True), ("q", False)])
def test_rows_shards_and_hops_that_see_nothing_are_exact_and_never_nan(side, with_sinks):
    where = oracle.ring(R)
    x = oracle.inputs("unseen", T=T, N=4, K=2, sinks=with_sinks)

    def attend(q, k, v, sinks, positions, ids):
        return bj.burst_attention(
            q, k, v, sharding=where, sinks=sinks, positions=positions, plan=plan(side),
            mask=bj.Mask.causal() & bj.Mask.segments(*ids), return_residual=True,
        )  # fmt: skip

    @jax.jit(compiler_options=oracle.QUICKLY)
    def run(positions, ids):
        arrays = x.q, x.k, x.v, x.sinks
        (out, lse), vjp = jax.vjp(lambda *a: attend(*a, positions, ids), *arrays)
        return oracle.Results(out, lse, *vjp((x.do, x.dlse)))

    for name, (q, k, q_ids, k_ids) in UNSEEN.items():
        seen = (k[None] <= q[:, None]) & (q_ids[:, None] == k_ids[None])
        seen &= (q >= 0)[:, None] & (k >= 0)[None]
        data = [jnp.asarray(a, jnp.int32) for a in (q, k, q_ids, k_ids)]
        found = run(tuple(data[:2]), tuple(data[2:]))
        got = oracle.Results(*(None if a is None else np.asarray(a) for a in found))
        want = oracle.dense(x, seen[None])
        for field, a, b in zip(oracle.Results._fields, got, want, strict=True):
            if b is not None:
                assert oracle.error(a, b) < 1e-12, f"{name}: {field}"
        empty = ~seen.any(-1)
        assert not got.out[:, empty].any() and not got.dq[:, empty].any(), name
        assert not got.dk[:, ~seen.any(0)].any() and not got.dv[:, ~seen.any(0)].any(), name
        lse = got.lse[:, empty]
        assert np.array_equal(lse, np.broadcast_to(x.sinks if with_sinks else -np.inf, lse.shape))


# Lengths that no layout shares.


@pytest.mark.parametrize(
    "R, layout, T, S",
    [
        (4, "contiguous", 4, 4),  # one token a device
        (8, "zigzag", 3, 3),  # 13 of 16 places are padding, most devices hold nothing else
        (4, "striped", 1, 1),
        (3, "zigzag", 1, 14),  # one query, many keys
    ],
)
def test_few_tokens_on_many_devices_match_the_oracle(R, layout, T, S):
    x = oracle.inputs(f"few {R} {layout}", T=T, S=S, N=2, K=1)
    where = oracle.ring(R, layout, length=T, key_length=S if S != T else None)
    got = oracle.sharded(x, where, mask=bj.Mask.causal())
    want = oracle.dense(x, np.tri(T, S, dtype=bool)[None])
    for name, a, b in zip(oracle.Results._fields, got, want, strict=True):
        assert b is None or oracle.error(a, b) < 1e-12, name


def test_contiguous_arrays_of_any_length_need_no_placing():
    T, S = 13, 6
    x = oracle.inputs("plain", T=T, S=S, N=2, K=1)
    where = oracle.ring(4)

    def attend(q, k, v, sinks):
        return bj.burst_attention(
            q, k, v, sharding=where, mask=bj.Mask.causal(), return_residual=True
        )

    got = oracle.with_gradients(attend, oracle.Inputs(*map(jnp.asarray, x[:5]), None))
    assert got.out.shape == x.q.shape
    oracle.assert_close(got, oracle.dense(x, np.tri(T, S, dtype=bool)[None]), 1e-12)


def test_a_shard_of_several_blocks_matches_the_oracle():
    x = oracle.inputs("blocks", B=1, T=1300, N=1, K=1, H=4)
    where = oracle.ring(2, "zigzag", length=1300)
    got = oracle.sharded(x, where, mask=bj.Mask.sliding_window(700))
    distance = np.arange(1300)[:, None] - np.arange(1300)[None]
    want = oracle.dense(x, ((distance >= 0) & (distance <= 700))[None])
    oracle.assert_close(got, want, 1e-12)


# Values at the edges of their dtype.


@functools.cache
def small_ring(dtype: str) -> Callable[..., oracle.Results]:
    """Causal attention of 16 tokens on four devices, compiled once for all that use it."""
    where = oracle.ring(4, "zigzag", length=16)

    @jax.jit(compiler_options=oracle.QUICKLY)
    def run(q, k, v, do, dlse):
        (out, lse), vjp = jax.vjp(
            lambda *a: bj.burst_attention(
                *a, sharding=where, mask=bj.Mask.causal(), plan=plan("q"), return_residual=True
            ),
            *(q, k, v),
        )
        return oracle.Results(out, lse, *vjp((do.astype(out.dtype), dlse.astype(lse.dtype))), None)

    def attend(x: oracle.Inputs) -> oracle.Results:
        placed = (where.place(np.asarray(jnp.asarray(a, dtype))) for a in x[:4])
        got = run(*placed, where.place(x.dlse))
        return oracle.Results(*(oracle.natural(where, a, 16) for a in got[:5]), None)

    return attend


def test_scores_of_200_either_way_are_as_exact_as_plain_float32():
    x = oracle.inputs("large scores", T=16, dtype=np.float32)
    grow = np.sqrt(200 * np.sqrt(8) / 8, dtype=np.float32)
    signs = np.sign(x.q), np.sign(x.k)
    x = x._replace(q=signs[0] * grow, k=signs[1] * grow)
    causal = np.tri(16, dtype=bool)[None]
    scores = np.einsum("btnh,bsnh->bnts", x.q, x.k) / np.sqrt(8)
    assert scores.max() > 199 and scores.min() < -199
    truth = oracle.dense(x, causal)
    got = small_ring("float32")(x)
    plain = oracle.with_gradients(
        lambda q, k, v, sinks: bj.reference.attention(
            q, k, v, mask=bj.Mask.causal(), return_residual=True
        ),
        oracle.Inputs(*map(jnp.asarray, x[:5]), None),
    )
    for name, a, b, c in zip(oracle.Results._fields[:5], got, plain, truth, strict=False):
        assert np.isfinite(a).all()
        floor = 1e-6 * max(1.0, np.abs(c).max())
        assert oracle.norm_error(a, c) <= 2 * oracle.norm_error(b, c) + floor, name


def test_the_greatest_numbers_of_float16_stay_finite():
    x = oracle.inputs("greatest", T=16, dtype=np.float64)
    greatest = float(jnp.finfo(jnp.float16).max)
    signs = x._replace(**{f: np.sign(getattr(x, f)) for f in ("q", "k", "v")})
    for factor in (1.0, 0.5):
        extreme = signs._replace(
            q=signs.q * greatest, k=signs.k * greatest * factor, v=signs.v * greatest
        )
        got = small_ring("float16")(extreme)
        for name, a in zip(oracle.Results._fields[:5], got, strict=False):
            assert not np.isnan(a).any(), name
        assert np.isfinite(got.out).all() and np.isfinite(got.lse).all()
        # Gradients of 65504 squared lie beyond float16, where infinity is the right answer. Which
        # of equal scores win cannot be compared: at 1e10 one ulp of a float32 lse is a thousand.
        # The output still is an average of values, and lse the greatest score.
        assert np.abs(np.asarray(got.out, np.float64)).max() <= greatest
        want = oracle.dense(oracle.in_dtype(extreme, jnp.float16), np.tri(16, dtype=bool)[None])
        assert oracle.error(got.lse, want.lse) < 1e-6


def test_the_least_numbers_of_float16_are_not_lost_in_the_accumulators():
    x = oracle.inputs("least", T=16, dtype=np.float64)
    x = x._replace(v=x.v * 6e-8, do=x.do * 100)
    want = oracle.dense(oracle.in_dtype(x, jnp.float16), np.tri(16, dtype=bool)[None])
    got = small_ring("float16")(x)
    assert oracle.error(got.dv, want.dv) < 1e-2
    assert np.abs(np.asarray(got.out, np.float64) - want.out).max() <= 1.2e-7  # two subnormals


# Narrow dtypes: an error ratio, not a tolerance.


def plain(x: oracle.Inputs, *, causal: bool) -> oracle.Results:
    """Attention as jax.nn has it, on one device, in the inputs' dtype: a second oracle."""

    def attend(q, k, v, sinks):
        out = jax.nn.dot_product_attention(q, k, v, is_causal=causal)
        return out, jnp.zeros(q.shape[:3], jnp.float32)  # its lse is rounded to the inputs' dtype

    # It promotes dtypes silently, which the suite does not allow.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return oracle.with_gradients(attend, oracle.Inputs(*map(jnp.asarray, x[:5]), None))


def plain_float16(x: oracle.Inputs) -> oracle.Results:
    """The same written out, causal: jax.nn asks for a product that CPUs do not have in float16.

    Operands are rounded to float16 where jax.nn rounds them; sums are kept in float32.
    """

    def product(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
        a, b = (x.astype(jnp.float16).astype(jnp.float32) for x in (a, b))
        return jnp.einsum(spec, a, b, precision="highest")

    def attend(q, k, v, sinks):
        k, v = (jnp.repeat(a, q.shape[2] // k.shape[2], axis=2) for a in (k, v))
        scores = product("btnh,bsnh->bnts", q, k) * np.float32(q.shape[3] ** -0.5)
        scores = jnp.where(np.tri(q.shape[1], dtype=bool)[None, None], scores, -jnp.inf)
        out = product("bnts,bsnh->btnh", jax.nn.softmax(scores, axis=-1), v)
        return out.astype(jnp.float16), jnp.zeros(q.shape[:3], jnp.float32)

    return oracle.with_gradients(attend, oracle.Inputs(*map(jnp.asarray, x[:5]), None))


COMPARED = ("out", "dq", "dk", "dv")


def ratios(got: Any, baseline: Any, truth: Any) -> dict[str, float]:
    return {
        name: oracle.norm_error(getattr(got, name), getattr(truth, name))
        / oracle.norm_error(getattr(baseline, name), getattr(truth, name))
        for name in COMPARED
    }


def test_float32_agrees_with_jax_nn():
    x = oracle.inputs("jax.nn", T=24, N=4, K=2, dtype=np.float32)
    x = x._replace(dlse=np.zeros_like(x.dlse))
    where = oracle.ring(4, "striped", length=24)
    for causal, mask in ((True, bj.Mask.causal()), (False, None)):
        got, want = oracle.sharded(x, where, mask=mask), plain(x, causal=causal)
        for name in COMPARED:
            assert oracle.error(getattr(got, name), getattr(want, name)) < 1e-5, name


@functools.cache
def narrow(dtype: str, T: int = 256) -> tuple[oracle.Inputs, oracle.Results, oracle.Results]:
    """Inputs, the truth, and plain attention."""
    x = oracle.inputs("narrow", B=1, T=T, N=4, K=2, H=32, dtype=jnp.dtype(dtype))
    x = x._replace(dlse=np.zeros_like(x.dlse))
    baseline = plain_float16(x) if dtype == "float16" else plain(x, causal=True)
    return x, oracle.dense(x, np.tri(T, dtype=bool)[None]), baseline


def test_bfloat16_is_as_exact_as_plain_bfloat16_and_no_worse_on_more_devices():
    x, truth, baseline = narrow("bfloat16")
    found = {}
    for R, side in ((1, "q"), (2, "q"), (4, "q"), (8, "q"), (8, "kv")):
        where = oracle.ring(R, "zigzag", length=256)
        got = oracle.sharded(x, where, mask=bj.Mask.causal(), plan=plan(side))
        assert got.out.dtype == got.dq.dtype == jnp.bfloat16 and got.lse.dtype == np.float32
        assert oracle.error(got.lse, truth.lse) < 1e-5
        found[R, side] = ratios(got, baseline, truth)
        assert max(found[R, side].values()) <= 2.0, found
    for name in COMPARED:
        worst = max(found[case][name] for case in found)
        assert worst <= 1.1 * found[1, "q"][name], f"{name}: {found}"


def test_float16_is_as_exact_as_plain_float16():
    x, truth, baseline = narrow("float16")
    where = oracle.ring(4, "zigzag", length=256)
    got = oracle.sharded(x, where, mask=bj.Mask.causal())
    assert got.out.dtype == jnp.float16
    found = ratios(got, baseline, truth)
    assert max(found.values()) <= 2.0, found


def test_gradients_that_travel_in_bfloat16_round_once_a_hop_and_no_more():
    x, truth, baseline = narrow("bfloat16")
    where = oracle.ring(8, "zigzag", length=256)
    narrow_plan = bj.Plan(backward="q", gradient_dtype=jnp.bfloat16)
    got = oracle.sharded(x, where, mask=bj.Mask.causal(), plan=narrow_plan)
    found = ratios(got, baseline, truth)
    assert max(found.values()) <= 3.0, found


def test_a_narrower_wire_is_taken_at_its_word():
    x = oracle.inputs("wire", T=16, N=2, K=2, dtype=np.float32)
    where = oracle.ring(2)
    truth = oracle.dense(x, np.ones((1, 1, 1), bool))

    def wrong_by(wire_dtype: Any) -> float:
        plan = bj.Plan(forward="kv", wire_dtype=wire_dtype)
        out = bj.burst_attention(*map(where.place, x[:3]), sharding=where, plan=plan)
        assert out.dtype == np.float32
        return oracle.error(out, truth.out)

    assert wrong_by(None) < 1e-6
    assert 1e-4 < wrong_by(jnp.bfloat16) < 2e-2


@pytest.mark.parametrize("one_message", [False, True])
def test_a_traveller_that_jumps_devices_and_what_it_collected_move_each_their_own_way(one_message):
    # Offsets 1, 2, 6, 7: at the second visit the message jumps by 4, what it collected moves by 1.
    x = oracle.inputs("jump", T=64, N=2, K=1)
    mask, plan = bj.Mask.sliding_window(12, 12), bj.Plan(backward="q", one_message=one_message)
    got = oracle.sharded(x, oracle.ring(8, "contiguous", length=64), mask=mask, plan=plan)
    oracle.assert_close(got, oracle.truth(x, mask=mask), 1e-10)
