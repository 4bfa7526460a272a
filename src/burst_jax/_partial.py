"""`Partial(out, lse)` and `merge`: the monoid on which all exactness rests.

Attention to a set of keys is kept as its output and the logarithm of its softmax denominator.
Two disjoint sets merge into their union (online softmax, Milakov and Gimelshein, arXiv 1805.02867;
in this form BurstAttention, arXiv 2403.09347, section 3.2). We differ from the paper's pseudo-code
in keeping a normalized output and one statistic, so that order and grouping of hops do not matter.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float


class Partial(NamedTuple):
    """Attention of some queries to some of the keys.

    Attributes:
        out: softmax(scores) @ v over those keys alone, [B, T, N, H].
        lse: log(sum(exp(scores))) over those keys, natural logarithm, [B, T, N]. A query that sees
            none of them has lse = -inf and out = 0.
    """

    out: Float[Array, "B T N H"]
    lse: Float[Array, "B T N"]


def merge(a: Partial, b: Partial) -> Partial:
    """Attention to the union of two disjoint sets of keys.

    Associative and commutative, with `Partial(0, -inf)` as identity.

    Args:
        a: attention of the queries to one set of keys.
        b: attention of the same queries to another. Keys in both would count twice; not checked.

    Returns:
        Output and lse over both. Rows empty in both stay out = 0, lse = -inf, never NaN.
    """
    high = jnp.maximum(a.lse, b.lse)
    empty = jnp.isneginf(high)
    pivot = jnp.where(empty, 0.0, high)  # an empty row would give (-inf) - (-inf)
    weight_a, weight_b = jnp.exp(a.lse - pivot), jnp.exp(b.lse - pivot)
    total = jnp.where(empty, 1.0, weight_a + weight_b)
    out = (a.out * weight_a[..., None] + b.out * weight_b[..., None]) / total[..., None]
    return Partial(out, jnp.where(empty, -jnp.inf, pivot + jnp.log(total)))
