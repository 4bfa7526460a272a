"""`merge` is a commutative monoid on partial attentions: this is why hops may come in any order."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
from hypothesis import given, settings
from hypothesis import strategies as st

import burst_jax as bj

SHAPE = (1, 3, 2, 4)  # one shape for all examples, so merge compiles once
SETTINGS = settings(max_examples=60, deadline=None)
merge = jax.jit(bj.merge)


def partial(seed: int, empty_rows: list[bool], spread: float) -> bj.Partial:
    """Any partial attention; where a row is empty, out is 0 and lse is -inf."""
    rng = np.random.default_rng(seed)
    lse = rng.normal(size=SHAPE[:3]) * spread
    out = rng.normal(size=SHAPE)
    empty = np.asarray(empty_rows).reshape(SHAPE[:3])
    lse, out = np.where(empty, -np.inf, lse), np.where(empty[..., None], 0.0, out)
    return bj.Partial(jnp.asarray(out), jnp.asarray(lse))


partials = st.builds(
    partial,
    st.integers(0, 2**31),
    st.lists(st.booleans(), min_size=6, max_size=6),
    st.sampled_from([1.0, 30.0, 1e4]),
)


def close(a: bj.Partial, b: bj.Partial) -> bool:
    return all(oracle.error(x, y) < 1e-12 for x, y in zip(a, b, strict=True))


@SETTINGS
@given(partials, partials, partials)
def test_merge_is_associative(a, b, c):
    assert close(merge(merge(a, b), c), merge(a, merge(b, c)))


@SETTINGS
@given(partials, partials)
def test_merge_is_commutative(a, b):
    assert close(merge(a, b), merge(b, a))


@SETTINGS
@given(partials)
def test_nothing_merges_as_the_identity_to_the_last_bit(a):
    nothing = bj.Partial(jnp.zeros(SHAPE), jnp.full(SHAPE[:3], -jnp.inf))
    for merged in (merge(a, nothing), merge(nothing, a)):
        for x, y in zip(merged, a, strict=True):
            np.testing.assert_array_equal(x, y)


@SETTINGS
@given(partials, partials)
def test_a_row_is_empty_where_both_are_and_nothing_is_nan(a, b):
    merged = merge(a, b)
    empty = np.isneginf(a.lse) & np.isneginf(b.lse)
    np.testing.assert_array_equal(np.isneginf(merged.lse), empty)
    out, lse = map(np.asarray, merged)
    assert not np.where(empty[..., None], out, 0).any()
    assert not np.isnan(out).any() and not np.isnan(lse).any()


@SETTINGS
@given(st.integers(0, 2**31), st.integers(0, 12))
def test_attention_to_two_sets_of_keys_merges_into_attention_to_their_union(seed, cut):
    S = 12
    x = oracle.inputs(f"union {seed}", B=1, T=3, S=S, H=4)
    first = np.arange(S) < cut
    whole = oracle.dense(x, np.ones((1, 1, S), bool))
    parts = (oracle.dense(x, seen[None, None]) for seen in (first, ~first))
    merged = merge(*(bj.Partial(jnp.asarray(p.out), jnp.asarray(p.lse)) for p in parts))
    assert close(merged, bj.Partial(whole.out, whole.lse))


def test_merge_keeps_float32_and_survives_its_extremes():
    big = jnp.finfo(jnp.float32).max / 4
    lses = [jnp.full((1, 1, 1), x, jnp.float32) for x in (big, -big, -jnp.inf, 0.0)]
    out = jnp.ones((1, 1, 1, 2), jnp.float32)
    for a in lses:
        for b in lses:
            merged = merge(bj.Partial(out, a), bj.Partial(out, b))
            assert merged.out.dtype == merged.lse.dtype == jnp.float32
            assert np.isfinite(merged.out).all() and not np.isnan(merged.lse).any()


def test_merge_has_finite_derivatives_where_rows_are_empty():
    a = partial(0, [True, True, False, False, True, False], 3.0)
    b = partial(1, [True, False, True, False, True, False], 3.0)
    merged, vjp = jax.vjp(merge, a, b)
    gradients = vjp(bj.Partial(jnp.ones_like(merged.out), jnp.ones_like(merged.lse)))
    for gradient in jax.tree.leaves(gradients):
        assert np.isfinite(gradient).all() and np.any(gradient)
