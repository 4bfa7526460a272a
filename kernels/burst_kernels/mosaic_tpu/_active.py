"""Which pairs of blocks a kernel visits, and in which order: a compacted list, made on the device.

A TPU kernel runs a grid of steps, and a step that does nothing still costs its turn. So the grid
has one step per active pair: position summaries classify all pairs (`burst_kernels._tile`), the
EMPTY ones are sorted behind the rest, and the number of the others is the size of the grid, known
only at run time. The list lies in scalar memory; index maps and kernel read their step from it.
It is O((t / block_q) (s / block_kv)) int32, 64 KiB for 128K queries and keys in blocks of 1024.
"""

import dataclasses
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Int32

from burst_kernels._tile import EMPTY, FULL, Tile, Tokens, classify, summarize

# A packed step, from the least bit up: class (2 bits), four flags, inner block, outer block, row.
# The sign bit stays 0, so that sorting the integers sorts the steps.
_FLAG_BITS = 6
_INDEX_BITS = 31 - _FLAG_BITS
_NOWHERE = np.iinfo(np.int32).max

Order = Literal["q", "kv"]


class Step(NamedTuple):
    """One step of the grid, unpacked: int32 scalars.

    Attributes:
        row: which row of the tokens; 0 where the whole batch shares one.
        i, j: the block of queries and the block of keys.
        kind: FULL, PARTIAL, or EMPTY: nothing to compute, only to begin and to end.
        first_of_q, last_of_q: 1 where no earlier (later) step of this row has query block i.
        first_of_kv, last_of_kv: the same of key block j. Steps of kind EMPTY do not count for the
            inner side, and have 0 there.
    """

    row: Int[Array, ""]
    i: Int[Array, ""]
    j: Int[Array, ""]
    kind: Int[Array, ""]
    first_of_q: Int[Array, ""]
    last_of_q: Int[Array, ""]
    first_of_kv: Int[Array, ""]
    last_of_kv: Int[Array, ""]


@dataclasses.dataclass(frozen=True)
class Active:
    """The steps of a grid.

    Attributes:
        steps: packed, to be handed over as scalar prefetch. Those from `count` on mean nothing.
        count: how many there are, at least 1: the size of the grid dimension. A Python integer
            where every pair counts, whatever the data.
        rows: how many rows of tokens the list spans. With one, the batch is a grid dimension of its
            own and every sequence walks this list; else the list names the sequence.
        order: "q": all steps of a block of queries follow each other, by block of keys; "kv": the
            other way round. The block that stays is the outer one.
        inner_bits, outer_bits: widths of the packed indices.
    """

    steps: Int32[Array, " P"]
    count: Int32[Array, ""] | int
    rows: int
    order: Order
    inner_bits: int
    outer_bits: int

    def at(self, steps, n: Int[Array, ""] | int) -> Step:
        """Step n. `steps`: the array or, inside the kernel, its reference."""
        return self.unpack(steps[n])

    def unpack(self, x: Int[Array, "..."]) -> Step:
        """The fields of packed steps."""
        kind, flags = x & 3, [(x >> bit) & 1 for bit in range(2, _FLAG_BITS)]
        x = x >> _FLAG_BITS
        inner = x & (2**self.inner_bits - 1)
        outer = (x >> self.inner_bits) & (2**self.outer_bits - 1)
        row = x >> (self.inner_bits + self.outer_bits)
        i, j = (outer, inner) if self.order == "q" else (inner, outer)
        return Step(row, i, j, kind, *flags)


def padded_tokens(tokens: Tokens, block: int, *, repeat: bool = False) -> Tokens:
    """Tokens up to a multiple of `block`.

    Those added are padding, which sees nothing and is never seen; or, with `repeat`, the last token
    again: for queries whose results are thrown away, so that their block can still be FULL.
    """
    missing = -tokens.positions.shape[-1] % block
    if not missing:
        return tokens
    if repeat:
        widths = [[(0, 0)] * (x.ndim - 1) + [(0, missing)] for x in tokens]
        return Tokens(*(jnp.pad(x, w, mode="edge") for x, w in zip(tokens, widths, strict=True)))
    positions = jnp.pad(tokens.positions, ((0, 0), (0, missing)), constant_values=-1)
    return Tokens(positions, jnp.pad(tokens.segments, ((0, 0), (0, 0), (0, missing))))


def of_equal_rows(q: Tokens, kv: Tokens) -> tuple[Tokens, Tokens]:
    """Both sides with a row for each sequence where one side has: kernels read row by row."""
    rows = max(q.positions.shape[0], kv.positions.shape[0])

    def spread(tokens: Tokens) -> Tokens:
        positions, segments = tokens
        n, kinds = positions.shape[1], segments.shape[0]
        return Tokens(
            jnp.broadcast_to(positions, (rows, n)), jnp.broadcast_to(segments, (kinds, rows, n))
        )

    return spread(q), spread(kv)


def stacked(tokens: Tokens) -> Int32[Array, "b rows n"]:
    """Positions and then the segment ids of each kind, of one row of tokens side by side."""
    parts = (tokens.positions[None], tokens.segments)
    return jnp.concatenate(parts).swapaxes(0, 1).astype(jnp.int32)


def active_pairs(
    q: Tokens,
    kv: Tokens,
    tile: Tile,
    *,
    blocks: tuple[int, int],
    order: Order,
    cover: bool,
) -> Active:
    """The list of the pairs that are not EMPTY.

    Args:
        q, kv: the tokens, of lengths that the blocks divide (`padded_tokens`), with equal rows.
        tile: its window; static.
        blocks: query tokens and key tokens in a block.
        order: see `Active`.
        cover: also give each outer block without an active pair a step, of kind EMPTY and with
            inner block 0, so that its results are written. Without it such blocks are not visited.
    """
    classes = _classes(summarize(q, blocks[0]), summarize(kv, blocks[1]), tile)
    return _compacted(classes if order == "q" else classes.swapaxes(1, 2), order, cover)


def every_pair(num_q: int, num_kv: int, order: Order) -> Active:
    """The list where every pair counts, whatever the data: known to the compiler."""
    outer, inner = (num_q, num_kv) if order == "q" else (num_kv, num_q)
    inner_bits, outer_bits = _widths(1, outer, inner)
    o, n = np.indices((outer, inner), np.int32)
    flags = _flags(order, o == 0, o == outer - 1, n == 0, n == inner - 1)
    steps = _packed(FULL, flags, n, (o << inner_bits))
    steps = jnp.asarray(steps.reshape(-1), jnp.int32)
    return Active(steps, outer * inner, 1, order, inner_bits, outer_bits)


def _classes(q, kv, tile: Tile) -> Int32[Array, "b i j"]:
    q, kv = (
        jax.tree.map(lambda x, axis=axis: jnp.expand_dims(x, axis), summary)
        for summary, axis in ((q, -1), (kv, -2))
    )
    return classify(q, kv, tile).astype(jnp.int32)


def _compacted(classes: Int32[Array, "b outer inner"], order: Order, cover: bool) -> Active:
    rows, outer, inner = classes.shape
    inner_bits, outer_bits = _widths(*classes.shape)
    seen = classes != EMPTY
    # Which step is the first (last) of its block on either side: the only ones before (after) it
    # in its line or column are EMPTY. An outer block that sees nothing begins and ends in one step.
    before_in, after_in = _any_before(seen, 2), _any_after(seen, 2)
    before_out, after_out = _any_before(seen, 1), _any_after(seen, 1)
    flags = _flags(
        order, seen & ~before_out, seen & ~after_out, seen & ~before_in, seen & ~after_in
    )
    row, o, n = (jax.lax.broadcasted_iota(jnp.int32, classes.shape, axis) for axis in range(3))
    place = (row << (inner_bits + outer_bits)) | (o << inner_bits)
    steps = jnp.where(seen, _packed(classes, flags, n, place), _NOWHERE)
    # What stands in for an outer block without a step, at its inner block 0.
    on_outer = _flags(order, False, False, True, True)
    alone = _packed(EMPTY, on_outer, n, place)
    lonely = ~seen.any(2, keepdims=True) & (n == 0)
    if not cover:  # An empty grid is none that a TPU runs: the first block then stands for all.
        lonely &= ~seen.any() & (row == 0) & (o == 0)
    steps = jnp.sort(jnp.where(lonely, alone, steps).reshape(-1))
    count = (steps != _NOWHERE).sum(dtype=jnp.int32)
    # Steps behind the end are not run, but may be looked at: let them be a place that exists.
    steps = jnp.where(steps == _NOWHERE, 0, steps)
    return Active(steps, count, rows, order, inner_bits, outer_bits)


def _any_before(seen, axis: int):
    """Whether any earlier element along the axis is true."""
    return jnp.cumsum(seen, axis=axis, dtype=jnp.int32) > seen.astype(jnp.int32)


def _any_after(seen, axis: int):
    return jnp.flip(_any_before(jnp.flip(seen, axis), axis), axis)


def _flags(order: Order, first_inner, last_inner, first_outer, last_outer) -> tuple:
    """The flags in the order of `Step`. First of the inner block: no earlier outer block has it."""
    inner, outer = (first_inner, last_inner), (first_outer, last_outer)
    return (*outer, *inner) if order == "q" else (*inner, *outer)


def _packed(kind, flags: tuple, inner, place):
    """One int32 a step; NumPy arrays stay NumPy arrays."""
    x = (place | inner) << _FLAG_BITS | kind
    for bit, flag in enumerate(flags, start=2):
        x = x | ((int(flag) if isinstance(flag, bool) else flag.astype(x.dtype)) << bit)
    return x


def _widths(rows: int, outer: int, inner: int) -> tuple[int, int]:
    inner_bits, outer_bits = (inner - 1).bit_length(), (outer - 1).bit_length()
    used = inner_bits + outer_bits + (rows - 1).bit_length()
    if used > _INDEX_BITS:
        raise NotImplementedError(
            f"{rows} rows of tokens in {outer} by {inner} blocks take {used} bits to number, and a "
            f"step has {_INDEX_BITS}: larger blocks would do."
        )
    return inner_bits, outer_bits
