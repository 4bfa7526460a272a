"""Facts about the program itself, read off its jaxpr: what is sent, when, how large, how often.

Nothing here runs on more than one device, and most programs are only traced: an AbstractMesh has as
many devices as one likes.
"""

import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

import burst_jax as bj
import burst_kernels

GIB = 2**30
SIDES = ("kv", "q")


def spread(R: int, layout: str = "contiguous", **kwargs: Any) -> bj.SequenceSharding:
    """A sharding over R devices that need not exist."""
    mesh = AbstractMesh((R,), ("sp",), axis_types=(AxisType.Explicit,))
    return bj.SequenceSharding(mesh, "sp", layout, **kwargs)


def shaped(
    where: bj.SequenceSharding, *shape: int, dtype: Any = jnp.float32
) -> jax.ShapeDtypeStruct:
    sharding = NamedSharding(where.mesh, where.spec(len(shape)))
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def forward(where: bj.SequenceSharding, **kwargs: Any) -> Callable[..., Any]:
    return lambda q, k, v: bj.burst_attention(q, k, v, sharding=where, **kwargs)


def forward_and_backward(where: bj.SequenceSharding, **kwargs: Any) -> Callable[..., Any]:
    def run(q, k, v, do):
        out, vjp = jax.vjp(forward(where, **kwargs), q, k, v)
        return out, *vjp(do)

    return run


def arguments(
    where: bj.SequenceSharding, T: int, N: int = 4, K: int = 2, H: int = 8, dtype: Any = jnp.float32
) -> list[jax.ShapeDtypeStruct]:
    """q, k, v and do."""
    return [shaped(where, 1, T, heads, H, dtype=dtype) for heads in (N, K, K, N)]


def jaxpr_of(fn: Callable[..., Any], *args: Any) -> Any:
    return jax.make_jaxpr(fn)(*args).jaxpr


# What is sent.

# Arrays that travel: as messages, and as results one hop behind.
FORWARD_MESSAGES = {"kv": 2, "q": 1}  # k, v; q
FORWARD_RESULTS = {"kv": 0, "q": 2}  # -; out, lse
BACKWARD_MESSAGES = {"kv": 2, "q": 4}  # k, v; q, do, lse, delta
BACKWARD_RESULTS = {"kv": 2, "q": 1}  # dk, dv; dq


@pytest.mark.parametrize("one_message", [False, True])
@pytest.mark.parametrize("side", SIDES)
def test_every_message_makes_one_hop_less_than_there_are_devices(side, one_message):
    R = 8
    where = spread(R)
    plan = bj.Plan(forward=side, backward=side, one_message=one_message)

    def hops(messages: int, results: int) -> int:
        if one_message:
            messages, results = min(messages, 1), min(results, 1)
            # Apart go the first two messages, and the results of the last two visits.
            shared = R - 3 if results else 0
            return (R - 1) * (messages + results) - shared
        return (R - 1) * (messages + results)

    q, k, v, do = arguments(where, 8 * R)
    there = hops(FORWARD_MESSAGES[side], FORWARD_RESULTS[side])
    back = hops(BACKWARD_MESSAGES[side], BACKWARD_RESULTS[side])
    # Equality: these are all the collectives that there are, no all-gather among them.
    assert bj.inspect.collective_counts(forward(where, plan=plan), q, k, v) == {"ppermute": there}
    both = forward_and_backward(where, plan=plan)
    assert bj.inspect.collective_counts(both, q, k, v, do) == {"ppermute": there + back}


def test_one_device_sends_nothing():
    where = spread(1)
    counts = bj.inspect.collective_counts(forward_and_backward(where), *arguments(where, 8))
    assert counts == {}


def predicted_bytes(
    R: int, T: int, N: int, K: int, H: int, *, forward: str, backward: str, e: int, g: int
) -> int:
    """The table of BurstAttention, section 3.3, told apart by kv heads; statistics are float32."""
    t = T // R
    hop = {
        ("forward", "kv"): 2 * t * K * H * e,
        ("forward", "q"): t * N * H * e + t * N * H * 4 + 4 * t * N,
        ("backward", "kv"): 2 * t * K * H * (e + g),
        ("backward", "q"): 2 * t * N * H * e + 8 * t * N + t * N * H * g,
    }
    return (R - 1) * (hop["forward", forward] + hop["backward", backward])


@pytest.mark.parametrize("to", SIDES)
@pytest.mark.parametrize("back", SIDES)
def test_the_bytes_sent_are_those_of_the_table(to, back):
    R, T, N, K, H = 4, 32, 6, 2, 16
    where = spread(R)
    plan = bj.Plan(forward=to, backward=back)
    fn = forward_and_backward(where, plan=plan)
    sent = bj.inspect.collective_bytes(fn, *arguments(where, T, N, K, H, jnp.bfloat16))
    assert sent["total"] == predicted_bytes(R, T, N, K, H, forward=to, backward=back, e=2, g=4)


@pytest.mark.parametrize("mask, layout", [(None, "contiguous"), (bj.Mask.causal(), "zigzag")])
@pytest.mark.parametrize(
    "heads, gradient_dtype, limit_gib",
    [
        ((32, 32), None, 5.28),
        ((32, 8), None, 1.76),
        ((32, 32), jnp.bfloat16, 4.41),
        ((32, 8), jnp.bfloat16, 1.32),
    ],
)
def test_128k_tokens_on_eight_devices_send_no_more_than_promised(
    heads, gradient_dtype, limit_gib, mask, layout
):
    where = spread(8, layout)
    plan = bj.Plan(gradient_dtype=gradient_dtype)
    args = arguments(where, 2**17, *heads, H=128, dtype=jnp.bfloat16)
    sent = bj.inspect.collective_bytes(forward_and_backward(where, mask=mask, plan=plan), *args)
    assert sent["total"] <= limit_gib * GIB
    # Rounded to two digits in the table; it is no more than one digit better either.
    assert sent["total"] >= (limit_gib - 0.02) * GIB


@pytest.mark.parametrize(
    "heads, gradient_dtype", [((8, 8), None), ((8, 4), jnp.bfloat16), ((8, 1), None)]
)
def test_the_plan_that_is_chosen_sends_no_more_than_any_other(heads, gradient_dtype):
    where = spread(4)
    args = arguments(where, 64, *heads, H=64, dtype=jnp.bfloat16)

    def sent(**fields: Any) -> int:
        plan = bj.Plan(gradient_dtype=gradient_dtype, **fields)
        return bj.inspect.collective_bytes(forward_and_backward(where, plan=plan), *args)["total"]

    least = min(sent(forward=a, backward=b) for a, b in itertools.product(SIDES, SIDES))
    assert sent() == least


@pytest.mark.parametrize("heads, side", [((8, 8), "q"), ((8, 4), "kv"), ((8, 1), "kv")])
def test_queries_travel_back_where_they_are_less_to_carry(heads, side):
    N, K = heads
    where = spread(4)
    plan = bj.make_plan((1, 64, N, 64), (1, 64, K, 64), sharding=where, dtype=jnp.bfloat16)
    assert plan.backward == side
    assert plan.forward == "kv"
    explained = plan.explain()
    args = arguments(where, 64, N, K, H=64, dtype=jnp.bfloat16)
    chosen, unplanned = (
        bj.inspect.collective_counts(forward_and_backward(where, plan=p), *args)
        for p in (plan, None)
    )
    assert chosen == unplanned
    assert explained


def test_cross_attention_to_few_keys_sends_the_keys_and_to_many_the_queries():
    for T, S, side in ((64, 16, "kv"), (16, 64, "q")):
        where = spread(4, length=T, key_length=S)
        q, out = (shaped(where, 1, T, 4, 8) for _ in range(2))
        k, v = (shaped(where, 1, S, 4, 8) for _ in range(2))
        total = [
            bj.inspect.collective_bytes(forward_and_backward(where, plan=plan), q, k, v, out)
            for plan in (None, bj.Plan(forward=side, backward=side))
        ]
        assert total[0] == total[1]


def test_hops_that_a_window_empties_are_not_made():
    R, T = 8, 128
    where = spread(R)
    args = arguments(where, T)
    for left, hops in ((5, 1), (16, 1), (17, 2), (T, R - 1)):
        fn = forward(where, mask=bj.Mask.sliding_window(left))
        sent = bj.inspect.collective_counts(fn, *args[:3])
        assert sent == {"ppermute": 2 * hops}, left


def test_positions_of_a_layout_are_never_sent_and_segment_ids_once_a_hop():
    R = 4
    where = spread(R, "zigzag", length=61)
    args = arguments(where, 64)[:3]
    ids = jnp.zeros(64, jnp.int32)
    causal = bj.inspect.collective_bytes(forward(where, mask=bj.Mask.causal()), *args)["total"]
    full = bj.inspect.collective_bytes(forward(where), *args)["total"]
    assert causal == full
    mask = bj.Mask.causal() & bj.Mask.segments(ids)
    packed = bj.inspect.collective_bytes(forward(where, mask=mask), *args)["total"]
    assert packed - causal == (R - 1) * (64 // R) * 4


def test_grouped_heads_are_never_repeated():
    """With one kv head for eight, the keys that travel are an eighth of the queries."""
    where = spread(4)
    one, eight = (
        bj.inspect.collective_bytes(
            forward(where, plan=bj.Plan(forward="kv")), *arguments(where, 64, 8, K)[:3]
        )["total"]
        for K in (1, 8)
    )
    assert eight == 8 * one


# When it is sent.


def computes(eqn: Any) -> bool:
    """Whether an equation is (part of) a tile: it holds a matrix product."""
    inner = itertools.chain.from_iterable(map(bj.inspect.equations, inner_jaxprs(eqn)))
    return any(e.primitive.name == "dot_general" for e in (eqn, *inner))


def inner_jaxprs(eqn: Any) -> list[Any]:
    values = jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns"))
    return [getattr(x, "jaxpr", x) for x in values if hasattr(x, "eqns")]


def loops_that_send(jaxpr: Any) -> list[Any]:
    """The bodies of the scans over hops."""
    return [
        eqn.params["jaxpr"].jaxpr
        for eqn in bj.inspect.equations(jaxpr)
        if eqn.primitive.name == "scan"
        and any(e.primitive.name == "ppermute" for e in eqn.params["jaxpr"].jaxpr.eqns)
    ]


def sent_after_the_tile(body: Any) -> list[Any]:
    """The permutes in the body of a hop that must wait for the hop's own tile."""
    waiting: set[Any] = set()
    late = []
    for eqn in body.eqns:
        waits = any(not hasattr(x, "val") and x in waiting for x in eqn.invars)
        if eqn.primitive.name == "ppermute" and waits:
            late.append(eqn)
        if waits or computes(eqn):
            waiting.update(eqn.outvars)
    return late


@pytest.mark.parametrize("one_message", [False, True])
@pytest.mark.parametrize("side", SIDES)
def test_nothing_that_is_sent_waits_for_the_tile_of_its_own_hop(side, one_message):
    where = spread(6, "zigzag")
    plan = bj.Plan(
        forward=side, backward=side, one_message=one_message, gradient_dtype=jnp.bfloat16
    )
    fn = forward_and_backward(where, mask=bj.Mask.causal(), plan=plan)
    bodies = loops_that_send(jaxpr_of(fn, *arguments(where, 48)))
    assert len(bodies) == 2, "one loop forward, one backward"
    for body in bodies:
        assert any(map(computes, body.eqns))
        assert not sent_after_the_tile(body)


def test_the_test_for_waiting_sees_a_permute_that_waits():
    mesh = AbstractMesh((4,), ("sp",), axis_types=(AxisType.Explicit,))

    def hop(x, _):
        return jax.lax.ppermute(x @ x, "sp", [(i, (i + 1) % 4) for i in range(4)]), None

    spec = PartitionSpec("sp")
    looped = jax.shard_map(
        lambda x: jax.lax.scan(hop, x, length=3)[0], mesh=mesh, in_specs=spec, out_specs=spec
    )
    x = jax.ShapeDtypeStruct((16, 4), jnp.float32, sharding=NamedSharding(mesh, spec))
    (body,) = loops_that_send(jaxpr_of(looped, x))
    assert len(sent_after_the_tile(body)) == 1


def test_the_first_message_leaves_before_the_tile_at_home():
    where = spread(4)
    for side in SIDES:
        fn = forward(where, plan=bj.Plan(forward=side))
        jaxpr = jaxpr_of(fn, *arguments(where, 32)[:3])
        ring = next(
            inner
            for eqn in bj.inspect.equations(jaxpr)
            for inner in inner_jaxprs(eqn)
            if any(e.primitive.name == "ppermute" for e in inner.eqns)
        )
        first = next(e for e in ring.eqns if e.primitive.name == "ppermute")
        tile = next(e for e in ring.eqns if computes(e))
        assert ring.eqns.index(first) < ring.eqns.index(tile)
        assert all(x in ring.invars for x in first.invars)


# How large it is.


def count(jaxpr: Any) -> int:
    return sum(1 for _ in bj.inspect.equations(jaxpr))


@pytest.mark.parametrize("side", SIDES)
def test_the_program_for_64_devices_is_as_large_as_that_for_8(side):
    sizes = set()
    for R in (8, 64):
        where = spread(R, "zigzag")
        plan = bj.Plan(forward=side, backward=side)
        fn = forward_and_backward(where, mask=bj.Mask.causal(), plan=plan)
        sizes.add(count(jaxpr_of(fn, *arguments(where, 16 * R))))
    assert len(sizes) == 1


@pytest.mark.parametrize("mask", [bj.Mask.full(), bj.Mask.causal()])
def test_no_array_is_quadratic_in_the_sequence(mask):
    R, T = 4, 8192
    where = spread(R, "zigzag")
    fn = forward_and_backward(where, mask=mask)
    jaxpr = jaxpr_of(fn, *arguments(where, T, N=2, K=1, H=16))
    largest = max(
        math.prod(x.aval.shape)
        for eqn in bj.inspect.equations(jaxpr)
        for x in eqn.outvars
        if hasattr(x.aval, "shape")
    )
    # Not even the scores of two shards: a block of them is as much as is ever there.
    assert largest < (T // R) ** 2
    assert largest < T * T / 50


# How often it runs, and is compiled.

POLICY = jax.checkpoint_policies.save_only_these_names("burst_out", "burst_lse")


def test_a_policy_that_saves_out_and_lse_runs_no_forward_ring_again():
    where = spread(4, "zigzag")
    args = arguments(where, 32)
    fn = forward(where, mask=bj.Mask.causal())

    def gradient(fn: Callable[..., Any]) -> Callable[..., Any]:
        def run(q, k, v, do):
            out, vjp = jax.vjp(fn, q, k, v)
            return out, *vjp(do)

        return run

    plain, saving, forgetting = (
        bj.inspect.collective_counts(gradient(f), *args)["ppermute"]
        for f in (fn, jax.checkpoint(fn, policy=POLICY), jax.checkpoint(fn))
    )
    there = bj.inspect.collective_counts(fn, *args[:3])["ppermute"]
    assert saving == plain
    assert forgetting == plain + there, "a ring that runs twice would be seen"


def compilations(caplog: pytest.LogCaptureFixture, fn: Callable[[], Any]) -> int:
    """How many programs `fn()` compiles."""
    caplog.clear()
    with jax.log_compiles(), caplog.at_level("WARNING"):
        jax.block_until_ready(fn())
    return sum("Finished XLA compilation" in record.getMessage() for record in caplog.records)


def test_repeated_calls_of_one_shape_compile_once(caplog):
    x = oracle.inputs("compile once", T=8, N=2, K=1, H=4, dtype=np.float32)

    def call() -> Any:
        # Everything anew, as in a training loop that keeps nothing: equal is as good as the same.
        where = oracle.ring(2, "zigzag", length=8)
        ids = where.place(np.zeros((2, 8), np.int32))
        mask = bj.Mask.causal() & bj.Mask.segments(ids)
        q, k, v, do = (where.place(a) for a in x[:4])
        out, vjp = jax.vjp(lambda *a: bj.burst_attention(*a, sharding=where, mask=mask), q, k, v)
        return out, vjp(do)

    assert compilations(caplog, call) > 0
    assert compilations(caplog, call) == 0


def test_a_jitted_function_around_it_is_traced_once():
    where = oracle.ring(2, length=7)
    x = oracle.inputs("trace once", T=7, H=4)
    traces = 0

    @jax.jit
    def run(q, k, v):
        nonlocal traces
        traces += 1
        return bj.burst_attention(q, k, v, sharding=where)

    for _ in range(3):
        run(*(where.place(a) for a in x[:3]))
    assert traces == 1


# How the work is shared.


def tiles_to_compute(where: bj.SequenceSharding, local: int, block: int) -> np.ndarray:
    """For each device and hop, how many pairs of blocks are not EMPTY under a causal mask."""
    R = where.num_shards
    positions = np.asarray(where.place(np.arange(R * local, dtype=np.int32), axis=0))
    shards = [jnp.asarray(p[None]) for p in positions.reshape(R, local)]
    tiles = [burst_kernels.Tile(scale=1.0, right=0, q_positions=p, kv_positions=p) for p in shards]
    summaries = [burst_kernels.summarize(tile.queries(local), block) for tile in tiles]

    def pairs(q: Any, kv: Any) -> int:
        q = jax.tree.map(lambda x: x[..., :, None], q)
        kv = jax.tree.map(lambda x: x[..., None, :], kv)
        classes = burst_kernels.classify(q, kv, tiles[0])
        return int((np.asarray(classes) != burst_kernels.EMPTY).sum())

    return np.array(
        [[pairs(summaries[r], summaries[(r - hop) % R]) for hop in range(R)] for r in range(R)]
    )


def test_zigzag_gives_every_device_as_many_causal_tiles_at_every_hop_to_within_one():
    tiles = tiles_to_compute(oracle.ring(4, "zigzag"), local=16, block=4)
    assert (np.ptp(tiles, axis=0) <= 1).all(), tiles
    # Half of all tiles, and the diagonal: so none is computed in vain.
    assert tiles.sum() == 16 * 17 // 2


def test_contiguous_would_not():
    tiles = tiles_to_compute(oracle.ring(4, "contiguous"), local=16, block=4)
    assert np.ptp(tiles.sum(1)) > 4 * 4
