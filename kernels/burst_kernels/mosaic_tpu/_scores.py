"""Scores of a pair of blocks and what masks them: arithmetic that runs inside the kernels.

What a mask asks of a token is worked out before the kernel, once a token, so that inside, once a
pair of tokens, causal masking is one comparison of integers and each bound or kind of segment ids
more is one more.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32, Shaped

from burst_kernels._tile import Tile, Tokens

LANES = 128

# dot_general: rows against rows (q k^T), and the ordinary product (p v).
ROWS = (((1,), (1,)), ((), ()))
PLAIN = (((1,), (0,)), ((), ()))

# Behind every bound: what stands for the position of a key that is padding.
_BEYOND = np.iinfo(np.int32).max


def matmul(a: Float[Array, "a1 a2"], b: Float[Array, "b1 b2"], dims: tuple) -> Float[Array, "m n"]:
    """A matrix product in float32. Products of 16-bit operands are exact; float32's are made so."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)


def factor(tile: Tile) -> float:
    """What `capped` scores are still to be multiplied by: the scale, or 1 where a cap used it.

    It waits until a maximum has been taken off: the greatest of a row then differs from the
    maximum by zero, however large the scores; and 16-bit queries are not rounded once more.
    """
    return tile.scale if tile.logits_soft_cap is None else 1.0


def exponent(tile: Tile) -> float:
    """`factor` for a power of two: exp(factor x) = exp2(exponent x). The hardware's is exp2."""
    return factor(tile) * math.log2(math.e)


def capped(raw: Float[Array, "m n"], tile: Tile) -> Float[Array, "m n"]:
    """Scores from q k^T, in units of 1 / `factor`."""
    cap = tile.logits_soft_cap
    return raw if cap is None else cap * jnp.tanh(raw * (tile.scale / cap))


def query_mask(tokens: Tokens, tile: Tile) -> Int32[Array, "b rows n"]:
    """Per query: the greatest position it sees, the least (where a bound is set), its segments.

    A query that is padding sees nothing: its greatest position is -1.
    """
    position = tokens.positions
    last = jnp.full_like(position, _BEYOND - 1)
    if tile.right is not None:  # Without overflow, whatever the bound.
        right = min(tile.right, _BEYOND - 1)
        last = jnp.minimum(position, _BEYOND - 1 - right) + right
    rows = [jnp.where(position < 0, -1, last)]
    if tile.left is not None:
        rows.append(position - min(tile.left, _BEYOND - 1))
    return _rows(rows, tokens)


def key_mask(tokens: Tokens) -> Int32[Array, "b rows n"]:
    """Per key: its position, behind all others where it is padding, and its segments."""
    return _rows([jnp.where(tokens.positions < 0, _BEYOND, tokens.positions)], tokens)


def _rows(rows: list[Array], tokens: Tokens) -> Int32[Array, "b rows n"]:
    return jnp.stack([*rows, *tokens.segments], axis=1).astype(jnp.int32)


def seen(
    q: Sequence[Int32[Array, "_m _n"]], kv: Sequence[Int32[Array, "_m _n"]], tile: Tile
) -> Bool[Array, "m n"]:
    """Which pairs count, from the rows of `query_mask` and `key_mask`, laid out to broadcast."""
    position, *kv_segments = kv
    found = position <= q[0]
    if tile.left is not None:
        found &= position >= q[1]
    for q_kind, kv_kind in zip(q[len(q) - len(kv_segments) :], kv_segments, strict=True):
        found &= q_kind == kv_kind
    return found


def column(row: Shaped[Array, "1 n"]) -> Shaped[Array, "n 128"]:
    """A row along lanes as a column, the same in every lane: 32-bit elements."""
    return jnp.broadcast_to(row, (LANES, row.shape[1])).T


def across(column: Shaped[Array, "m 128"], width: int) -> Shaped[Array, "m width"]:
    """A column that is the same in every lane, `width` lanes wide."""
    repeats = -(-width // LANES)
    return (jnp.tile(column, (1, repeats)) if repeats > 1 else column)[:, :width]
