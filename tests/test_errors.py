"""Every mistake that a caller can make: one sentence with the value, the rule and the remedy.

Each is made with and without jit: the message must come while tracing, before any collective.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import burst_jax as bj


@pytest.fixture(autouse=True)
def as_users_run_it():
    with oracle.as_users_run_it():
        yield


def where(**kwargs) -> bj.SequenceSharding:
    mesh = jax.make_mesh((2, 2, 2), ("dp", "sp", "tp"))
    return bj.SequenceSharding(mesh, **{"axis_name": "sp", **kwargs})


def zeros(*shape: int, dtype=jnp.float32) -> jax.Array:
    return jnp.zeros(shape, dtype)


Q, KV = zeros(2, 16, 4, 8), zeros(2, 16, 2, 8)
NAN = float("nan")

# What is called, and what the message must say: the value, and how to get it right.
CALLS: dict[str, tuple[dict, str]] = {
    "heads that do not divide": (dict(key=zeros(2, 16, 3, 8), value=zeros(2, 16, 3, 8)),
                                 r"N=4 heads and key K=3.*multiple of K"),
    "wrong rank": (dict(query=zeros(16, 4, 8)), r"query has shape \(16, 4, 8\).*x\[None\]"),
    "mixed dtypes": (dict(value=zeros(2, 16, 2, 8, dtype=jnp.bfloat16)),
                     r"one dtype, got query float32.*value bfloat16.*Cast"),
    "integers": (dict(query=zeros(2, 16, 4, 8, dtype=jnp.int32)), r"int32.*astype"),
    "complex numbers": (dict(query=zeros(2, 16, 4, 8, dtype=jnp.complex64)), r"complex64.*astype"),
    "no tokens": (dict(query=zeros(2, 0, 4, 8)), r"\(2, 0, 4, 8\): an empty.*Skip"),
    "other batch": (dict(key=zeros(1, 16, 2, 8), value=zeros(1, 16, 2, 8)),
                    r"query 2, key 1.*broadcast_to"),
    "other tokens in the value": (dict(value=zeros(2, 8, 2, 8)), r"key has 16 tokens, value 8"),
    "other head dim in the key": (dict(key=zeros(2, 16, 2, 4)), r"head dim 8, key 4"),
    "not an array": (dict(query=[[1.0]]), r"query is list, not an array \[B, T, N, H\]"),
    "implementation that is no name": (dict(implementation=["xla"]), r"\['xla'\] does not exist"),
    "unknown implementation": (dict(implementation="cudnn"), r"'cudnn' does not exist.*'xla'"),
    "batch that its axis does not divide": (
        dict(query=zeros(3, 16, 4, 8), key=zeros(3, 16, 2, 8), value=zeros(3, 16, 2, 8),
             sharding=where(batch_axis="dp")), r"batch B = 3.*'dp' with 2 devices"),
    "heads that their axis does not divide": (
        dict(query=zeros(2, 16, 3, 8), key=zeros(2, 16, 3, 8), value=zeros(2, 16, 3, 8),
             sharding=where(head_axis="tp")), r"query heads N = 3.*'tp' with 2 devices"),
    "no sharding": (dict(sharding="sp"), r"SequenceSharding, got str.*burst_attention_shard"),
    "length that the layout cannot share": (
        dict(query=zeros(2, 15, 4, 8), sharding=where(layout="zigzag")),
        r"query has 15 tokens.*multiple of 4.*length=15"),
    "length that contradicts the sharding": (
        dict(sharding=where(layout="zigzag", length=30)), r"query has 16 tokens.*30.*32"),
    "keys of another length": (dict(key=zeros(2, 8, 2, 8), value=zeros(2, 8, 2, 8),
                                    sharding=where(length=16)), r"key_length=8"),
    "scale NaN": (dict(scale=NAN), r"scale=nan.*> 0"),
    "scale zero": (dict(scale=0.0), r"scale=0.0.*> 0"),
    "scale negative": (dict(scale=-1), r"scale=-1.*> 0"),
    "scale no number": (dict(scale="big"), r"scale='big'.*> 0"),
    "soft cap zero": (dict(logits_soft_cap=0), r"logits_soft_cap=0.*None for no cap"),
    "sinks of wrong shape": (dict(sinks=zeros(2)), r"\[4\], one logit a query head, got.*\[2\]"),
    "sinks of integers": (dict(sinks=zeros(4, dtype=jnp.int32)), r"floating array.*int32"),
    "a dense mask": (dict(mask=jnp.ones((16, 16), bool)), r"Mask\.causal\(\).*quadratic"),
    "positions of wrong shape": (dict(positions=jnp.arange(8)), r"\[8\]|\(8,\).*\[16\]"),
    "positions of floats": (dict(positions=zeros(16)), r"float32.*integer array.*astype"),
    "positions beyond int32": (dict(positions=np.full(16, 2**40)), r"1099511627776.*int32"),
    "three positions": (dict(positions=(jnp.arange(16),) * 3), r"tuple of 3.*pair"),
    "segment ids of wrong shape": (dict(mask=bj.Mask.segments(jnp.arange(8))), r"\(8,\).*\[16\]"),
    "plan of another mesh": (dict(plan=bj.Plan(num_shards=8)), r"8 devices.*has 2.*plan=None"),
    "plan that is none": (dict(plan="q"), r"Plan or None, got str"),
    "wider on the wire than it is": (dict(plan=bj.Plan(wire_dtype=jnp.float64)),
                                     r"wire_dtype=float64.*float32"),
    "wider gradients than accumulators": (dict(plan=bj.Plan(gradient_dtype=jnp.float64)),
                                          r"gradient_dtype=float64.*float32"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", CALLS)
@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_a_wrong_argument_is_refused_with_value_and_remedy(mistake, jit):
    given, message = CALLS[mistake]
    call = {"query": Q, "key": KV, "value": KV, "sharding": where(), **given}
    arrays = {name: call.pop(name) for name in ("query", "key", "value")}
    jit = jit and all(hasattr(x, "shape") for x in arrays.values())  # else jit itself refuses
    run: Callable = lambda **arrays: bj.burst_attention(**arrays, **call)  # noqa: E731
    with pytest.raises(ValueError, match=f"(?s){message}"):
        (jax.jit(run) if jit else run)(**arrays)


@pytest.mark.parametrize(
    ("build", "message"),
    {
        "unknown axis": (lambda: where(axis_name="seq"), r"no axis 'seq'.*\('dp', 'sp', 'tp'\)"),
        "no axis": (lambda: where(axis_name=()), r"name the mesh axis"),
        "an axis twice": (lambda: where(batch_axis="sp"), r"'sp' is already used"),
        "unknown layout": (lambda: where(layout="spiral"), r"'spiral' does not exist.*'zigzag'"),
        "length zero": (lambda: where(length=0), r"length=0.*>= 1"),
        "window negative": (lambda: bj.Mask.sliding_window(-1), r"left=-1.*>= 0"),
        "window right negative": (lambda: bj.Mask.sliding_window(1, -2), r"right=-2.*>= 0"),
        "window of a float": (lambda: bj.Mask.sliding_window(1.5), r"left=1\.5.*integer"),
        "segments of floats": (lambda: bj.Mask.segments(jnp.zeros(4)), r"q_ids.*float.*int32"),
        "a side that does not exist": (lambda: bj.Plan(backward="v"), r"backward='v'.*'kv' or 'q'"),
        "a dtype that does not exist": (lambda: bj.Plan(wire_dtype="b16"), r"wire_dtype='b16'"),
        "half bytes on the wire": (lambda: bj.Plan(wire_dtype="float4_e2m1fn"), r"whole bytes"),
        "a flag that is a number": (lambda: bj.Plan(one_message=1.0), r"one_message=1.0"),
        "integers on the wire": (lambda: bj.Plan(gradient_dtype=jnp.int8), r"floating dtype"),
        "unknown hardware": (
            lambda: bj.make_plan((1, 8, 2, 4), (1, 8, 2, 4), sharding=where(), dtype=jnp.float32,
                                 hardware="abacus"), r"'abacus' is not known.*v5e"),
        "placing another length": (lambda: where(length=9).place(np.zeros((1, 8))), r"8 tokens.*9"),
        "placing what cannot be shared": (
            lambda: where().place(np.zeros((1, 9))), r"9 tokens.*multiple of 2.*length=9"),
        "positions without a length": (lambda: where().positions(), r"give.*length=T"),
        "restoring what was not placed": (
            lambda: where(length=8).restore(jnp.zeros((1, 12))), r"12 tokens.*length=8"),
    }.items(),
    ids=lambda x: x if isinstance(x, str) else "",
)  # fmt: skip
def test_an_object_that_cannot_be_is_not_built(build, message):
    make, message = message
    with pytest.raises(ValueError, match=f"(?s){message}"):
        make()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(plan=bj.Plan(num_shards=3)), r"made for 3 devices.*has 2"),
        (dict(plan=bj.Plan(wire_dtype=jnp.float32)), r"wire_dtype=float32.*bfloat16"),
        (dict(plan="kv"), r"Plan or None, got str"),
        (dict(key_shape=(3, 8, 2, 4)), r"batch sizes differ"),
        (dict(key_shape=(2, 8, 2, 8)), r"head dim 4, key 8"),
        (dict(key_shape=(2, 8, 3, 4)), r"multiple of K"),
        (dict(query_shape=(2, 8.0, 2, 4)), r"query_shape=\(2, 8\.0, 2, 4\).*\[B, T, N, H\]"),
        (dict(dtype=jnp.int32), r"int32.*astype"),
        (dict(mask="causal"), r"Mask, got str"),
    ],
    ids=str,
)
def test_a_plan_is_not_made_for_a_call_that_would_be_refused(changes, message):
    shape = (2, 8, 2, 4)
    arguments = dict(query_shape=shape, key_shape=shape, dtype=jnp.bfloat16, sharding=where())
    with oracle.as_users_run_it(), pytest.raises(ValueError, match=f"(?s){message}"):
        bj.make_plan(**(arguments | changes))


@pytest.mark.parametrize("bound", ["a", 2.5, True, -1])
def test_a_window_that_is_no_number_of_positions_is_refused(bound):
    with oracle.as_users_run_it():
        mask = bj.Mask(right=bound)
        with pytest.raises(ValueError, match=r"Mask\(right=.*integer number of positions"):
            bj.burst_attention(Q, KV, KV, sharding=where(), mask=mask)


def test_a_window_beyond_all_positions_hides_nothing_also_in_32_bit():
    q, k = (jnp.arange(64, dtype=jnp.float32).reshape(1, 8, 2, 4) % n for n in (5, 7))
    sharding = bj.SequenceSharding(jax.make_mesh((2,), ("sp",), devices=jax.devices()[:2]))
    with jax.enable_x64(False):
        wide, full = (
            bj.burst_attention(q, k, k, sharding=sharding, mask=mask)
            for mask in (bj.Mask.sliding_window(2**40), bj.Mask.causal())
        )
    np.testing.assert_array_equal(wide, full)


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_a_query_sharded_otherwise_than_the_sharding_says_is_refused(jit):
    sharding = where()
    lies = NamedSharding(sharding.mesh, PartitionSpec("dp"))
    query = jax.device_put(Q, lies)
    run = lambda q: bj.burst_attention(q, KV, KV, sharding=sharding)  # noqa: E731
    with pytest.raises(ValueError, match=r"(?s)query is sharded.*'dp'.*sharding\.place"):
        (jax.jit(run) if jit else run)(query)


def test_a_shard_outside_any_shard_map_and_a_global_call_inside_one_are_refused():
    with pytest.raises(ValueError, match=r"axis_name='sp'.*shard_map.*burst_attention"):
        bj.burst_attention_shard(Q, KV, KV, axis_name="sp")
    sharding = where()
    inside = jax.shard_map(
        lambda q, k, v: bj.burst_attention(q, k, v, sharding=sharding),
        mesh=sharding.mesh,
        in_specs=PartitionSpec(None, "sp"),
        out_specs=PartitionSpec(None, "sp"),
    )
    with pytest.raises(ValueError, match=r"inside a shard_map over \['sp'\].*_shard"):
        jax.jit(inside)(*map(sharding.place, (Q, KV, KV)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(layout="spiral"), r"'spiral' does not exist"),
        (dict(layout="zigzag"), r"3 tokens on this device.*even"),
        (dict(length=7), r"length=7.*1\.\.6"),
    ],
)
def test_a_shard_that_its_layout_does_not_allow_is_refused(arguments, message):
    sharding = where()
    odd = sharding.place(zeros(2, 6, 2, 8))
    inside = jax.shard_map(
        lambda q: bj.burst_attention_shard(q, q, q, axis_name="sp", **arguments),
        mesh=sharding.mesh,
        in_specs=PartitionSpec(None, "sp"),
        out_specs=PartitionSpec(None, "sp"),
    )
    with pytest.raises(ValueError, match=message):
        jax.jit(inside)(odd)
