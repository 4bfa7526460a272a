"""The attention where users put it: further mesh axes, transforms, their own shard_map, pmap."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax.sharding import AxisType, PartitionSpec

import burst_jax as bj

CAUSAL = bj.Mask.causal()
X = oracle.inputs("mesh modes", T=32, N=4, K=2)
ARRAYS = X[:4]
KINDS = pytest.mark.parametrize(
    "kind", [AxisType.Explicit, AxisType.Auto], ids=["Explicit", "Auto"]
)


@pytest.fixture(scope="module")
def truth() -> tuple[np.ndarray, ...]:
    """Output and gradients in natural order, float64."""
    q, k, v, do = map(jnp.asarray, ARRAYS)
    out, vjp = jax.vjp(lambda q, k, v: bj.reference.attention(q, k, v, mask=CAUSAL), q, k, v)
    return tuple(map(np.asarray, (out, *vjp(do))))


def cube(kind: AxisType) -> bj.SequenceSharding:
    """Batch, sequence and heads each over two devices."""
    mesh = jax.make_mesh((2, 2, 2), ("dp", "sp", "tp"), axis_types=(kind,) * 3)
    return bj.SequenceSharding(mesh, "sp", "zigzag", batch_axis="dp", head_axis="tp")


def attend(where: bj.SequenceSharding) -> Callable[..., jax.Array]:
    return lambda q, k, v: bj.burst_attention(q, k, v, sharding=where, mask=CAUSAL)


def with_gradients(fn: Callable[..., jax.Array]) -> Callable[..., tuple]:
    def run(q: Any, k: Any, v: Any, do: Any) -> tuple:
        out, vjp = jax.vjp(fn, q, k, v)
        return out, *vjp(do)

    return run


def assert_close(found: tuple, expected: tuple, where: bj.SequenceSharding) -> None:
    for name, a, b in zip(("out", "dq", "dk", "dv"), found, expected, strict=True):
        error = np.abs(np.asarray(where.restore(a)) - b).max()
        assert error < 1e-10, f"{name} is off by {error}"


@KINDS
def test_batch_sequence_and_heads_may_be_sharded_at_once_and_the_output_lies_as_the_query(
    kind, truth
):
    where = cube(kind)
    placed = [where.place(x) for x in ARRAYS]
    found = jax.jit(with_gradients(attend(where)))(*placed)
    assert_close(found, truth, where)
    for array in found[:2]:
        assert array.sharding.is_equivalent_to(placed[0].sharding, 4)


@KINDS
def test_it_runs_without_jit_under_value_and_grad_and_set_mesh(kind, truth):
    where = cube(kind)
    q, k, v, do = (where.place(x) for x in ARRAYS)
    with jax.set_mesh(where.mesh):
        value, dq = jax.value_and_grad(lambda q: (attend(where)(q, k, v) * do).sum())(q)
    np.testing.assert_allclose(value, (truth[0] * ARRAYS[3]).sum(), rtol=1e-10)
    np.testing.assert_allclose(np.asarray(where.restore(dq)), truth[1], atol=1e-10)


@KINDS
def test_it_runs_under_vmap_checkpoint_and_a_scan_over_layers(kind, truth):
    where = cube(kind)
    q, k, v, do = (where.place(x) for x in ARRAYS)

    def layers(q, k, v):
        layer = jax.checkpoint(lambda q, _: (attend(where)(q, k, v), None))
        return jax.lax.scan(layer, q, None, length=2)[0]

    def by_hand(q, k, v):
        once = bj.reference.attention(q, k, v, mask=CAUSAL)
        return bj.reference.attention(once, k, v, mask=CAUSAL)

    found = jax.jit(with_gradients(layers))(q, k, v, do)
    assert_close(found, with_gradients(by_hand)(*map(jnp.asarray, ARRAYS)), where)
    twice = jax.jit(jax.vmap(attend(where)))(*(jnp.stack([x, x[::-1]]) for x in (q, k, v)))
    np.testing.assert_allclose(np.asarray(where.restore(twice[0])), truth[0], atol=1e-10)
    np.testing.assert_allclose(np.asarray(where.restore(twice[1])), truth[0][::-1], atol=1e-10)


@KINDS
@pytest.mark.parametrize("check_vma", [True, False])
def test_a_shard_works_inside_the_callers_own_shard_map(kind, check_vma, truth):
    where = cube(kind)
    spec = where.spec(4)
    mapped = jax.shard_map(
        lambda q, k, v: bj.burst_attention_shard(
            q, k, v, axis_name="sp", layout="zigzag", mask=CAUSAL
        ),
        mesh=where.mesh,
        in_specs=spec,
        out_specs=spec,
        check_vma=check_vma,
    )
    found = jax.jit(with_gradients(mapped))(*(where.place(x) for x in ARRAYS))
    assert_close(found, truth, where)


@KINDS
def test_a_shard_works_in_a_shard_map_over_the_sequence_alone(kind, truth):
    where = cube(kind)
    mapped = jax.shard_map(
        lambda q, k, v: bj.burst_attention_shard(
            q, k, v, axis_name="sp", layout="zigzag", mask=CAUSAL
        ),
        mesh=where.mesh,
        in_specs=PartitionSpec(None, "sp"),
        out_specs=PartitionSpec(None, "sp"),
        axis_names={"sp"},
    )
    found = jax.jit(with_gradients(mapped))(*(where.place(x) for x in ARRAYS))
    assert_close(found, truth, where)


@KINDS
def test_global_arrays_work_inside_a_shard_map_over_another_axis(kind, truth):
    outer = cube(kind)
    inner = bj.SequenceSharding(outer.mesh, "sp", "zigzag", head_axis="tp")
    mapped = jax.shard_map(
        attend(inner),
        mesh=outer.mesh,
        in_specs=PartitionSpec("dp"),
        out_specs=PartitionSpec("dp"),
        axis_names={"dp"},
    )
    out = jax.jit(mapped)(*(outer.place(x) for x in ARRAYS[:3]))
    np.testing.assert_allclose(np.asarray(outer.restore(out)), truth[0], atol=1e-10)


def test_a_shard_works_inside_pmap(truth):
    def shards(x):
        return jnp.moveaxis(jnp.asarray(x).reshape(2, 8, 4, *x.shape[2:]), 1, 0)

    mapped = jax.pmap(
        with_gradients(
            lambda q, k, v: bj.burst_attention_shard(q, k, v, axis_name="i", mask=CAUSAL)
        ),
        axis_name="i",
    )
    for found, expected in zip(mapped(*map(shards, ARRAYS)), truth, strict=True):
        np.testing.assert_allclose(found, shards(expected), atol=1e-10)


@KINDS
def test_one_ring_may_run_over_two_mesh_axes(kind, truth):
    mesh = jax.make_mesh((2, 4), ("outer", "inner"), axis_types=(kind,) * 2)
    where = bj.SequenceSharding(mesh, ("outer", "inner"), "striped")
    found = jax.jit(with_gradients(attend(where)))(*(where.place(x) for x in ARRAYS))
    assert_close(found, truth, where)


@KINDS
def test_plain_arrays_of_any_length_are_padded_inside(kind):
    mesh = jax.make_mesh((2, 2, 2), ("dp", "sp", "tp"), axis_types=(kind,) * 3)
    where = bj.SequenceSharding(mesh, "sp", batch_axis="dp", head_axis="tp")
    arrays = [jnp.asarray(x[:, :31]) for x in ARRAYS]
    expected = with_gradients(lambda *x: bj.reference.attention(*x, mask=CAUSAL))(*arrays)
    for run in (with_gradients(attend(where)), jax.jit(with_gradients(attend(where)))):
        for found, truth in zip(run(*arrays), expected, strict=True):
            np.testing.assert_allclose(found, truth, atol=1e-10)
