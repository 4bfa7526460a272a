"""Mask: which keys a query sees, against the definition spelled out pair by pair."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import burst_jax as bj

T = S = 12
SETTINGS = settings(max_examples=40, deadline=None)


def seen_by(attend, mask: bj.Mask, B: int = 1, **kwargs) -> np.ndarray:
    """Which pairs [B, T, S] an attention counts: with values that are unit vectors, its weights."""
    q, k = np.zeros((B, T, 1, 2)), np.zeros((B, S, 1, 2))
    v = np.broadcast_to(np.eye(S), (B, S, S))[:, :, None]
    return np.asarray(attend(*map(jnp.asarray, (q, k, v)), mask=mask, **kwargs))[:, :, 0] > 0


seen_by_reference = functools.partial(seen_by, bj.reference.attention)


def by_definition(rule) -> np.ndarray:
    return np.array([[[bool(rule(i, j)) for j in range(S)] for i in range(T)]])


ids = st.lists(st.integers(0, 3), min_size=T, max_size=T)
# Descriptions, built into masks inside the tests: a strategy must not run checked code.
simple_masks = st.one_of(
    st.just(("full",)),
    st.just(("causal",)),
    st.tuples(st.just("window"), st.integers(0, 14), st.integers(0, 14)),
    st.tuples(st.just("segments"), ids),
    st.tuples(st.just("cross segments"), ids, ids),
)


def built(description: tuple) -> tuple[bj.Mask, np.ndarray]:
    """A simple mask, and what it means."""
    match description:
        case ("full",):
            return bj.Mask.full(), by_definition(lambda i, j: True)
        case ("causal",):
            return bj.Mask.causal(), by_definition(lambda i, j: j <= i)
        case ("window", left, right):
            rule = by_definition(lambda i, j: i - left <= j <= i + right)
            return bj.Mask.sliding_window(left, right), rule
        case ("segments", a):
            return bj.Mask.segments(jnp.asarray(a)), by_definition(lambda i, j: a[i] == a[j])
        case ("cross segments", a, b):
            mask = bj.Mask.segments(jnp.asarray(a), jnp.asarray(b))
            return mask, by_definition(lambda i, j: a[i] == b[j])
    raise AssertionError(description)


@SETTINGS
@given(simple_masks)
def test_a_mask_lets_through_what_its_definition_says(description):
    mask, meaning = built(description)
    np.testing.assert_array_equal(seen_by_reference(mask), meaning)


@SETTINGS
@given(st.lists(simple_masks, min_size=2, max_size=4))
def test_combining_masks_is_the_logical_and_of_what_each_lets_through(descriptions):
    masks, meanings = zip(*map(built, descriptions), strict=True)
    mask = functools.reduce(lambda a, b: a & b, masks)
    np.testing.assert_array_equal(seen_by_reference(mask), np.logical_and.reduce(meanings))


@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "striped"])
def test_burst_attention_sees_the_pairs_that_the_definition_names(layout):
    where = oracle.ring(3, layout, length=T)
    rng = oracle.generator(layout)
    a, b = rng.integers(0, 3, (2, T)).astype(np.int32), rng.integers(0, 2, T).astype(np.int32)
    mask = (
        bj.Mask.sliding_window(6, 3)
        & bj.Mask.segments(where.place(a))
        & bj.Mask.segments(where.place(b, axis=0))
    )

    @jax.jit(compiler_options=oracle.QUICKLY)
    def attend(q, k, v, mask):
        return bj.burst_attention(q, k, v, sharding=where, mask=mask)

    def in_natural_order(q, k, v, mask):
        q, k, v = (where.place(np.asarray(x)) for x in (q, k, v))
        return oracle.natural(where, attend(q, k, v, mask), T)

    seen = seen_by(in_natural_order, mask, B=2)
    for row in range(2):
        meaning = by_definition(
            lambda i, j, row=row: i - 6 <= j <= i + 3 and a[row, i] == a[row, j] and b[i] == b[j]
        )
        np.testing.assert_array_equal(seen[row], meaning[0])


def test_a_mask_is_a_frozen_pytree_whose_ids_alone_are_data():
    mask = bj.Mask.causal() & bj.Mask.segments(jnp.arange(4)) & bj.Mask.sliding_window(3, 2)
    assert (mask.left, mask.right) == (3, 0)
    assert len(jax.tree.leaves(mask)) == 2
    assert jax.tree.leaves(bj.Mask.sliding_window(3)) == []
    assert hash(bj.Mask.sliding_window(3)) == hash(bj.Mask.sliding_window(3, 0))
    assert bj.Mask.sliding_window(3) != bj.Mask.sliding_window(4)
    with pytest.raises(dataclasses.FrozenInstanceError):
        mask.left = 5
    through_jit = jax.jit(lambda mask: mask)(mask)
    assert (through_jit.left, through_jit.right) == (3, 0)


def test_other_documents_of_the_same_shape_do_not_compile_again():
    traces = 0

    @jax.jit
    def attend(x, mask):
        nonlocal traces
        traces += 1
        return bj.reference.attention(x, x, x, mask=mask)

    x = jnp.ones((1, 4, 1, 2))
    first = attend(x, bj.Mask.segments(jnp.zeros(4, jnp.int32)))
    second = attend(x, bj.Mask.segments(jnp.arange(4, dtype=jnp.int32)))
    assert traces == 1
    assert first.shape == second.shape


def test_combining_with_something_else_is_refused():
    with pytest.raises(TypeError):
        bj.Mask.causal() & np.ones((4, 4), bool)
