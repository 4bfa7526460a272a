"""SequenceSharding: what lies where, and that it comes back as it was."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import burst_jax as bj
from burst_jax._schedule import LAYOUTS
from burst_jax._sharding import ShardTokens

# Each example compiles what is new to it: there are few.
SETTINGS = settings(max_examples=12, deadline=None)
sizes = st.sampled_from([1, 2, 3, 4, 8])


@SETTINGS
@given(sizes, st.sampled_from(LAYOUTS), st.integers(1, 40), st.data())
def test_restore_undoes_place_for_any_length_and_axis(R, layout, T, data):
    ndim = data.draw(st.integers(1, 4))
    axis = data.draw(st.integers(0, ndim - 1))
    where = oracle.ring(R, layout, length=T)
    shape = [2] * ndim
    shape[axis] = T
    x = np.arange(np.prod(shape), dtype=np.int32).reshape(shape)
    placed = where.place(x, axis=axis)
    assert placed.shape[axis] == where.padded_length
    back = where.restore(placed, axis=axis)
    assert back.dtype == x.dtype
    np.testing.assert_array_equal(back, x)


@SETTINGS
@given(sizes, st.sampled_from(LAYOUTS), st.integers(1, 40))
def test_positions_tell_where_place_puts_each_token(R, layout, T):
    where = oracle.ring(R, layout, length=T)
    placed = where.place(np.arange(T, dtype=np.int32), axis=0, pad_value=-1)
    positions = where.positions()
    assert positions.dtype == jnp.int32
    assert positions.sharding.is_equivalent_to(NamedSharding(where.mesh, where.spec(1, 0)), 1)
    np.testing.assert_array_equal(positions, placed)
    positions = np.asarray(positions)
    np.testing.assert_array_equal(np.sort(positions[positions >= 0]), np.arange(T))


@SETTINGS
@given(sizes, st.sampled_from(LAYOUTS), st.integers(1, 40))
def test_each_device_knows_the_positions_of_its_own_tokens(R, layout, T):
    where = oracle.ring(R, layout, length=T)
    local = where.padded_length // R
    tokens = ShardTokens(layout, R, local, T)
    every = jax.vmap(tokens.positions)(jnp.arange(R, dtype=jnp.int32))
    np.testing.assert_array_equal(np.asarray(every).reshape(-1), where.positions())


def on_devices(where: bj.SequenceSharding, T: int) -> list[list[int]]:
    placed = where.place(np.arange(T), axis=0)
    shards = sorted(placed.addressable_shards, key=lambda shard: shard.index[0].start or 0)
    return [np.asarray(shard.data).tolist() for shard in shards]


def test_the_layouts_are_what_their_names_say():
    R, T = 4, 16
    contiguous = [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]]
    zigzag = [[0, 1, 14, 15], [2, 3, 12, 13], [4, 5, 10, 11], [6, 7, 8, 9]]
    striped = [[0, 4, 8, 12], [1, 5, 9, 13], [2, 6, 10, 14], [3, 7, 11, 15]]
    assert on_devices(oracle.ring(R, "contiguous"), T) == contiguous
    assert on_devices(oracle.ring(R, "zigzag"), T) == zigzag
    assert on_devices(oracle.ring(R, "striped"), T) == striped


def test_the_tests_own_natural_order_is_that_of_restore():
    for R, layout, T in itertools.product((1, 3, 4), LAYOUTS, (24, 19)):
        where = oracle.ring(R, layout, length=T)
        x = where.place(oracle.generator("natural").normal(size=(2, T, 3)))
        np.testing.assert_array_equal(oracle.natural(where, x, T), where.restore(x))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_placing_pads_with_the_value_that_is_asked_for(layout):
    where = oracle.ring(4, layout, length=13)
    padding = np.asarray(where.positions()) == -1
    placed = np.asarray(where.place(np.ones((1, 13), np.int32), pad_value=-7))
    np.testing.assert_array_equal(placed, np.where(padding, -7, 1)[None])
    placed = np.asarray(where.place(np.ones((1, 13))))
    np.testing.assert_array_equal(placed, np.where(padding, 0.0, 1.0)[None])


def test_queries_and_keys_of_different_lengths_are_told_apart():
    where = oracle.ring(4, "zigzag", length=13, key_length=20)
    q, kv = np.arange(13)[None], np.arange(20)[None]
    assert where.place(q).shape == (1, 16) and where.place(kv).shape == (1, 24)
    np.testing.assert_array_equal(where.restore(where.place(q)), q)
    np.testing.assert_array_equal(where.restore(where.place(kv)), kv)
    # Lengths that pad to the same size: the caller says which it is.
    where = oracle.ring(4, "zigzag", length=13, key_length=15)
    np.testing.assert_array_equal(where.restore(where.place(kv[:, :15]), length=15), kv[:, :15])


def test_specs_put_batch_sequence_and_heads_on_their_axes():
    mesh = jax.make_mesh((2, 2, 2), ("dp", "sp", "tp"))
    where = bj.SequenceSharding(mesh, "sp", batch_axis="dp", head_axis="tp")
    assert where.spec(4) == PartitionSpec("dp", "sp", "tp", None)
    assert where.spec(2) == PartitionSpec("dp", "sp")
    assert where.spec(3) == PartitionSpec("dp", "sp", None)
    assert where.spec(1, axis=0) == PartitionSpec("sp")
    assert where.spec(4, axis=2) == PartitionSpec("dp", None, "sp", "tp")
    both = bj.SequenceSharding(mesh, ("dp", "sp"), head_axis="tp")
    assert both.spec(4) == PartitionSpec(None, ("dp", "sp"), "tp", None)
    assert both.num_shards == 4


def test_placed_arrays_lie_as_the_spec_says():
    mesh = jax.make_mesh((2, 2, 2), ("dp", "sp", "tp"))
    where = bj.SequenceSharding(mesh, "sp", "zigzag", batch_axis="dp", head_axis="tp")
    for shape in ((2, 8), (2, 8, 2, 4)):
        x = where.place(np.zeros(shape))
        assert x.sharding.is_equivalent_to(NamedSharding(mesh, where.spec(len(shape))), len(shape))


@pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto])
def test_device_arrays_can_be_placed_and_any_dtype_keeps_its_own(kind):
    where = oracle.ring(2, "zigzag", kind, length=7)
    for dtype in (jnp.bfloat16, jnp.float16, jnp.int8, jnp.bool_):
        x = jnp.ones((1, 7), dtype)
        assert where.place(x).dtype == dtype
        assert where.restore(where.place(x)).dtype == dtype


def test_lengths_are_rounded_up_to_what_the_layout_can_share():
    for layout, multiple in (("contiguous", 4), ("striped", 4), ("zigzag", 8)):
        where = oracle.ring(4, layout, length=9)
        assert where.multiple == multiple
        assert where.padded_length == -(-9 // multiple) * multiple
        assert where.num_shards == 4


def test_it_is_frozen_and_equal_ones_are_one_static_argument():
    where, same = (oracle.ring(4, "zigzag", length=9) for _ in range(2))
    assert where == same and hash(where) == hash(same)
    assert where != dataclasses.replace(where, length=10)
    with pytest.raises(dataclasses.FrozenInstanceError):
        where.length = 10
    traces = 0

    @jax.jit(static_argnums=1)
    def double(x, where):
        nonlocal traces
        traces += 1
        return x * where.num_shards

    assert double(1.0, where) == double(1.0, same) == 4.0
    assert traces == 1
