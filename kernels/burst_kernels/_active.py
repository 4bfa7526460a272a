"""The mask as the kernels read it: lists of active blocks, and marks of every token.

A kernel never classifies. For each block of one side it gets the blocks of the other side that
count, compacted: FULL ones first, then PARTIAL ones, EMPTY ones nowhere. So EMPTY pairs are
neither fetched nor computed, and the loop over FULL pairs holds no mask arithmetic.

Inside a PARTIAL pair three comparisons decide, on marks made once a call in O(t + s):

    query i sees key j  iff  first_i <= position_j <= last_i  and all segment ids agree

`last = position + right` and `first = position - left` are saturated to int32, and padding is put
into them: a padded query has last = -2**31, a padded key position 2**31 - 1, which no `last` of a
real query reaches. A comparison that no mask of this tile needs is not made (`Marks`, static).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Int8, Shaped

from burst_kernels._tile import EMPTY, FULL, PARTIAL, Summary, Tile, Tokens, classify, summarize

_LEAST, _GREATEST = -(2**31), 2**31 - 1


class Marks(NamedTuple):
    """Which rows the marks of a token have, in this order; static.

    Attributes:
        last: query: the last position it sees; key: its position. Also keeps padding out.
        first: query: the first position it sees; the key's position is that of `last`.
        segments: kinds of segment ids; query and key: one row a kind.
    """

    last: bool
    first: bool
    segments: int

    @property
    def query_rows(self) -> int:
        """Rows of the queries' marks."""
        return self.last + self.first + self.segments

    @property
    def key_rows(self) -> int:
        """Rows of the keys' marks."""
        return (self.last or self.first) + self.segments


class Active(NamedTuple):
    """For each of n blocks of one side, the blocks of the other that count.

    Attributes:
        blocks: FULL ones first, then PARTIAL ones, each in ascending order; what follows is junk.
        counts: how many are FULL, and how many are FULL or PARTIAL.
    """

    blocks: Int[Array, "b n m"]
    counts: Int[Array, "b n 2"]

    def heaviest_first(self) -> Int[Array, "b n"]:
        """The n blocks by falling number of pairs: started so, the last to end end together."""
        index = jax.lax.broadcasted_iota(jnp.int32, self.counts.shape[:2], 1)
        return jax.lax.sort((-self.counts[:, :, 1], index), dimension=1, num_keys=1)[1]


class BlockMask(NamedTuple):
    """The mask of a tile cut into blocks; `b` is B, or 1 where all sequences share it.

    Attributes:
        marks: what the rows of `q` and `kv` are; static.
        q: marks of the queries, padded to whole blocks.
        kv: marks of the keys, padded to whole blocks.
        classes: EMPTY, PARTIAL or FULL for each pair of blocks.
    """

    marks: Marks
    q: Int[Array, "b U t_"]
    kv: Int[Array, "b W s_"]
    classes: Int8[Array, "b n m"]

    def keys_of_queries(self) -> Active:
        """For each block of queries the blocks of keys to visit."""
        return _compact(self.classes)

    def queries_of_keys(self) -> Active:
        """For each block of keys the blocks of queries to visit."""
        return _compact(self.classes.swapaxes(1, 2))


def block_mask(
    tile: Tile, t: int, s: int, block_q: int, block_kv: int, like: Shaped[Array, "..."]
) -> BlockMask | None:
    """The mask of a tile in blocks; None where every pair counts, so that nothing need be read.

    Queries beyond t are copies of the last one, so that they turn no FULL pair into a PARTIAL one:
    a kernel drops their rows (forward), or gives them lse = inf (backward). Keys beyond s are
    padding, since a zero key has a score like any other.

    Args:
        tile: the tile.
        t, s: its tokens.
        block_q, block_kv: tokens of a block.
        like: an array whose mesh axes constants shall take.
    """
    if not tile.masked and s % block_kv == 0:
        return None
    q, kv = tile.queries(t), tile.keys(s)
    if not tile.masked:
        q, kv = jax.tree.map(lambda x: jnp.zeros_like(like, shape=x.shape, dtype=x.dtype), (q, kv))
    q = Tokens(*(whole(x, -1, block_q, mode="edge") for x in q))
    kv = Tokens(
        whole(kv.positions, -1, block_kv, constant_values=-1), whole(kv.segments, -1, block_kv)
    )
    marks = Marks(
        last=tile.q_positions is not None or s % block_kv != 0,
        first=tile.left is not None and tile.q_positions is not None,
        segments=q.segments.shape[0],
    )
    q_summary, kv_summary = summarize(q, block_q), summarize(kv, block_kv)
    return BlockMask(
        marks,
        _query_marks(q, tile, marks),
        _key_marks(kv, marks),
        classify(_expand(q_summary, -1), _expand(kv_summary, -2), tile),
    )


def visible(
    marks: Marks,
    q: tuple[Shaped[Array, " q"], ...],
    kv: tuple[Shaped[Array, " kv"], ...],
    shape: tuple[int, int],
    q_axis: int = 0,
) -> Bool[Array, "_rows _columns"]:
    """Which pairs of tokens of a PARTIAL pair of blocks count; for use inside a kernel.

    Args:
        marks: what the rows are.
        q: the rows of the queries' marks, each [queries].
        kv: the rows of the keys' marks, each [keys].
        shape: of the result.
        q_axis: the axis of `shape` that counts queries; 1 for transposed scores.
    """

    def queries(x: Array) -> Array:
        return jax.lax.broadcast_in_dim(x, shape, (q_axis,))

    def keys(x: Array) -> Array:
        return jax.lax.broadcast_in_dim(x, shape, (1 - q_axis,))

    q_rows, kv_rows = list(q), list(kv)
    tests = []
    if marks.last or marks.first:
        position = keys(kv_rows.pop(0))
        if marks.last:
            tests.append(position <= queries(q_rows.pop(0)))
        if marks.first:
            tests.append(position >= queries(q_rows.pop(0)))
    tests += [keys(b) == queries(a) for a, b in zip(q_rows, kv_rows, strict=True)]
    seen = tests[0]
    for test in tests[1:]:
        seen = seen & test
    return seen


def _query_marks(q: Tokens, tile: Tile, marks: Marks) -> Int[Array, "b U t_"]:
    position = q.positions
    rows = []
    if marks.last:
        right = _GREATEST if tile.right is None else min(tile.right, _GREATEST)
        room = jnp.int32(_GREATEST - 1) - position  # at least 0: positions are below 2**31 - 1
        last = position + jnp.minimum(room, right)
        rows.append(jnp.where(position < 0, _LEAST, last))
    if marks.first:
        rows.append(position - min(tile.left or 0, _GREATEST))
    return jnp.stack([*rows, *q.segments], 1).astype(jnp.int32)


def _key_marks(kv: Tokens, marks: Marks) -> Int[Array, "b W s_"]:
    rows = []
    if marks.last or marks.first:
        rows.append(jnp.where(kv.positions < 0, _GREATEST, kv.positions))
    return jnp.stack([*rows, *kv.segments], 1).astype(jnp.int32)


def _compact(classes: Int8[Array, "b n m"]) -> Active:
    # One sort of one operand: the class stands above the index.
    assert (EMPTY, PARTIAL, FULL) == (0, 1, 2)
    index = jax.lax.broadcasted_iota(jnp.int32, classes.shape, 2)
    keys = (jnp.int32(FULL) - classes.astype(jnp.int32)) << 28 | index
    blocks = jax.lax.sort(keys, dimension=2) & (2**28 - 1)
    counts = jnp.stack([(classes == FULL).sum(2), (classes != EMPTY).sum(2)], 2)
    return Active(blocks, counts.astype(jnp.int32))


def _expand(summary: Summary, axis: int) -> Summary:
    return jax.tree.map(lambda x: jnp.expand_dims(x, axis), summary)


def whole(x: Shaped[Array, "..."], axis: int, block: int, **how: Any) -> Shaped[Array, "..."]:
    """x with `axis` filled up to a multiple of `block`: zeros, or as `jnp.pad` is told.

    Where nothing is missing nothing is copied.
    """
    short = -x.shape[axis] % block
    if not short:
        return x
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, short)
    return jnp.pad(x, widths, **how)
