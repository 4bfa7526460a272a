"""The tile contract: which (query, key) pairs of a rectangle count, and how its scores are made.

A tile is one rectangle of the attention matrix: t queries against s keys, all on one device. What
is masked follows from data: int32 positions (negative: padding) and segment ids of every token. Per
block of tokens only the least and greatest position and id are needed to call a pair of blocks
EMPTY, FULL or PARTIAL, so masks cost O(t + s) memory and a few bytes a pair of blocks, and every
layout, window and packing of documents is one mechanism.

Contract of a backend (`tile_forward`, `tile_backward` of each `burst_kernels` backend):

    tile_forward(q, k, v, tile, config, onto)                   -> out, lse
    tile_backward(q, k, v, do, lse, delta, tile, config, onto)  -> dq, dk, dv

q: [B, N, t, H]; k: [B, K, s, H]; v: [B, K, s, Hv]; do: [B, N, t, Hv]: heads before tokens, so that
no tile has to transpose. N is a multiple of K; query head n reads kv head n // (N // K). lse,
delta: [B, N, t]. out, lse, dq, dk, dv have the accumulator dtype (`accumulator_dtype`): partial
results are never rounded before they are merged. lse is the natural logarithm. `onto` is what was
found before: (out, lse) over other keys to merge with, or gradients to add to, any of the three or
None. So what stays on a device is kept where it lies. A query that sees no key has out = 0,
lse = -inf, and takes part in no gradient.
A backend that cannot do a tile raises `NotImplementedError` with the reason.

A backend that says `stacked` in its table also takes k and v as they lie in a ring's message, in
one array: k is [2, B, K, s, H], and v is None.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, DTypeLike, Int, Int8

EMPTY, PARTIAL, FULL = 0, 1, 2

# dq, dk, dv so far, in the accumulator dtype; None counts as zero.
Onto = tuple[Array | None, Array | None, Array | None]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Tile:
    """What counts inside one rectangle of queries and keys.

    Rows of tokens are B, or 1 where all sequences of the batch share them. Position differences
    must fit int32, so positions lie in [-1, 2**31 - 1).

    Attributes:
        scale: factor on q k^T. Static.
        logits_soft_cap: scores become `cap * tanh(scores / cap)`; None: no cap. Static.
        left: a key more than `left` positions before the query is masked; None: no limit. Static.
        right: a key more than `right` positions after the query is masked; 0 is causal. Static.
        q_positions, kv_positions: position of each token; negative is padding, which sees nothing
            and is never seen. Both None: no positions, nothing is padding.
        q_segments, kv_segments: `C` kinds of segment ids; a pair counts where all kinds agree.
    """

    scale: float = dataclasses.field(metadata={"static": True})
    logits_soft_cap: float | None = dataclasses.field(default=None, metadata={"static": True})
    left: int | None = dataclasses.field(default=None, metadata={"static": True})
    right: int | None = dataclasses.field(default=None, metadata={"static": True})
    q_positions: Int[Array, "_b t"] | None = None
    kv_positions: Int[Array, "_b s"] | None = None
    q_segments: Int[Array, "C _b t"] | None = None
    kv_segments: Int[Array, "C _b s"] | None = None

    @property
    def masked(self) -> bool:
        """False if, whatever the data, every pair counts."""
        return self.q_positions is not None or self.q_segments is not None

    def queries(self, t: int) -> "Tokens":
        """The query side of the mask, for t queries."""
        return _tokens(self.q_positions, self.q_segments, t)

    def keys(self, s: int) -> "Tokens":
        """The key side of the mask, for s keys."""
        return _tokens(self.kv_positions, self.kv_segments, s)


class Tokens(NamedTuple):
    """What a mask may ask of each token on one side; `C` may be 0."""

    positions: Int[Array, "b n"]
    segments: Int[Array, "C b n"]


class Summary(NamedTuple):
    """Least and greatest value in each block of tokens: all that is needed to classify a pair.

    `low` and `high` range over tokens that are not padding; a block of padding has high = -1.
    """

    low: Int[Array, "..."]
    high: Int[Array, "..."]
    whole: Bool[Array, "..."]
    segment_low: Int[Array, "C ..."]
    segment_high: Int[Array, "C ..."]


def _tokens(
    positions: Int[Array, "_b n"] | None, segments: Int[Array, "C _b n"] | None, n: int
) -> Tokens:
    if positions is None:
        # Any array of the caller will do as a model: a fresh constant would lack its mesh axes.
        like = None if segments is None else segments[0]
        zeros = jnp.zeros((1, n), jnp.int32) if like is None else jnp.zeros_like(like)
        positions = zeros
    if segments is None:
        segments = jnp.zeros_like(positions, shape=(0, *positions.shape))
    b = max(positions.shape[0], segments.shape[1])
    return Tokens(
        jnp.broadcast_to(positions, (b, n)),
        jnp.broadcast_to(segments, (segments.shape[0], b, n)),
    )


def summarize(tokens: Tokens, block: int) -> Summary:
    """Summaries [b, n / block] of equal blocks; n must be a multiple of `block`."""
    positions, segments = (x.reshape(*x.shape[:-1], x.shape[-1] // block, block) for x in tokens)
    real = positions >= 0
    return Summary(
        low=jnp.where(real, positions, jnp.iinfo(jnp.int32).max).min(-1),
        high=jnp.where(real, positions, -1).max(-1),
        whole=real.all(-1),
        segment_low=segments.min(-1),
        segment_high=segments.max(-1),
    )


def classify(q: Summary, kv: Summary, tile: Tile) -> Int8[Array, "..."]:
    """EMPTY, PARTIAL or FULL for pairs of blocks; q and kv broadcast against each other.

    EMPTY and FULL are certain; PARTIAL may be either. So a tile may be masked in vain, but never
    left out, and never left unmasked.
    """
    empty = (q.high < 0) | (kv.high < 0)
    full = q.whole & kv.whole
    if tile.right is not None:
        empty |= kv.low - q.high > _distance(tile.right)
        full &= kv.high - q.low <= _distance(tile.right)
    if tile.left is not None:
        empty |= q.low - kv.high > _distance(tile.left)
        full &= q.high - kv.low <= _distance(tile.left)
    apart = (q.segment_high < kv.segment_low) | (kv.segment_high < q.segment_low)
    one = (q.segment_low == kv.segment_high) & (q.segment_high == kv.segment_low)
    one &= q.segment_low == q.segment_high
    empty |= apart.any(0)
    full &= one.all(0)
    return jnp.where(empty, EMPTY, jnp.where(full, FULL, PARTIAL)).astype(jnp.int8)


def _distance(limit: int) -> int:
    """A side of a window: beyond int32 it is none, since positions do not differ by more."""
    return min(limit, 2**31 - 1)


def visible(q: Tokens, kv: Tokens, tile: Tile) -> Bool[Array, "*batch q kv"]:
    """Which pairs of single tokens count. Tokens have shapes [..., n] and [C, ..., n]."""
    q_position, kv_position = q.positions[..., :, None], kv.positions[..., None, :]
    seen = (q_position >= 0) & (kv_position >= 0)
    if tile.right is not None:
        seen &= kv_position - q_position <= _distance(tile.right)
    if tile.left is not None:
        seen &= q_position - kv_position <= _distance(tile.left)
    return seen & (q.segments[..., :, None] == kv.segments[..., None, :]).all(0)


def accumulator_dtype(dtype: DTypeLike) -> jnp.dtype:
    """float64 for float64, float32 for everything narrower."""
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)
