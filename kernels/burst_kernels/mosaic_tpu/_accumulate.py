"""dq in HBM, added to in place while the kernel walks the blocks of keys.

A block of queries is visited once for each of its blocks of keys, and between two visits its dq
lies in HBM. One float32 array, so memory does not grow with the number of key blocks:

    step            n - 1            n                n + 1
    fetch (DMA)     block of n       block of n + 1   ...
    add             to block n - 1   to block n       to block n + 1
    write (DMA)     block n - 2      block n - 1      block n

Three buffers take turns. Steps that follow each other on the same block share one visit, and keep
it in its buffer. A block whose write is still under way is not fetched before that has ended, and
the first visit of a block, where nothing was given to add to, starts from zero without a fetch.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Int

BUFFERS = 3
SUBLANES = 8


class Visit(NamedTuple):
    """Where a step adds: int32 scalars, and what is known of the block.

    Attributes:
        batch, head, block: which block of dq.
        real: whether the step adds anything.
        fresh: whether the block starts from zero.
    """

    batch: Int[Array, ""]
    head: Int[Array, ""]
    block: Int[Array, ""]
    real: Bool[Array, ""]
    fresh: Bool[Array, ""]

    def same(self, other: "Visit") -> Bool[Array, ""]:
        """Whether both add to one block."""
        equal = (self.batch == other.batch) & (self.head == other.head)
        return equal & (self.block == other.block) & self.real & other.real


class Turn(NamedTuple):
    """Three steps in a row, and whether there are a step before and a step after."""

    before: Visit
    now: Visit
    after: Visit
    first: Bool[Array, ""]
    last: Bool[Array, ""]


@dataclasses.dataclass(frozen=True)
class Accumulator:
    """The buffers and their state; references inside a kernel.

    Attributes:
        hbm: [B, N, t, H] in HBM.
        buffers: [3, block_q, H] in VMEM.
        state: [1 + 3 * 4] in SMEM: the buffer in use; for each buffer whether its write is under
            way, and of which block.
        fetched, written: DMA semaphores, one a buffer.
        t: query tokens; the last block may be shorter.
        whole_tiles: whether a shorter last block is moved with the rows that fill up its last tile
            of 8, which a TPU's memory has behind every array; the interpreter's has not.
    """

    hbm: jax.Ref
    buffers: jax.Ref
    state: jax.Ref
    fetched: jax.Ref
    written: jax.Ref
    t: int
    whole_tiles: bool

    @staticmethod
    def scratch(block_q: int, width: int) -> list:
        """What to ask of `pallas_call`, in the order of the fields."""
        return [
            pltpu.VMEM((BUFFERS, block_q, width), jnp.float32),
            pltpu.SMEM((1 + 4 * BUFFERS,), jnp.int32),
            pltpu.SemaphoreType.DMA((BUFFERS,)),
            pltpu.SemaphoreType.DMA((BUFFERS,)),
        ]

    def open(self, turn: Turn) -> Int[Array, ""]:
        """Before a step computes: the next block is on its way. The buffer to add to."""
        begins = turn.now.real & (turn.first | ~turn.now.same(turn.before))

        @pl.when(turn.first)
        def _() -> None:
            self.state[0] = jnp.int32(BUFFERS - 1)
            for buffer in range(BUFFERS):
                self.state[1 + 4 * buffer] = jnp.int32(0)

            @pl.when(turn.now.real & ~turn.now.fresh)
            def _() -> None:
                self._fetch(turn.now, jnp.int32(0), start=True)

        @pl.when(begins)
        def _() -> None:
            self.state[0] = self._after(self.state[0])

        here = self.state[0]

        @pl.when(~turn.last & turn.after.real & ~turn.after.same(turn.now))
        def _() -> None:
            there = self._after(here)
            for buffer in range(BUFFERS):
                self._finish(buffer, (there == buffer) | self._writes(buffer, turn.after))

            @pl.when(~turn.after.fresh)
            def _() -> None:
                self._fetch(turn.after, there, start=True)

        @pl.when(begins & turn.now.fresh)
        def _() -> None:
            self.buffers[here] = jnp.zeros(self.buffers.shape[1:], self.buffers.dtype)

        @pl.when(begins & ~turn.now.fresh)
        def _() -> None:
            self._fetch(turn.now, here, start=False)

        return here

    def close(self, turn: Turn, here: Int[Array, ""]) -> None:
        """After a step has added: the block goes home, unless the next step adds to it too."""
        now = turn.now

        @pl.when(now.real & (turn.last | ~turn.after.same(now)))
        def _() -> None:
            self._write(now.batch, now.head, now.block, here, start=True)
            for n, x in enumerate((jnp.int32(1), now.batch, now.head, now.block)):
                self.state[1 + 4 * here + n] = x

        @pl.when(turn.last)
        def _() -> None:
            for buffer in range(BUFFERS):
                self._finish(buffer, True)

    def _after(self, buffer: Int[Array, ""]) -> Int[Array, ""]:
        return jnp.where(buffer == BUFFERS - 1, 0, buffer + 1).astype(jnp.int32)

    def _writes(self, buffer: int, visit: Visit) -> Bool[Array, ""]:
        """Whether what a buffer is writing, or last wrote, is the visit's block."""
        where = (self.state[1 + 4 * buffer + n] for n in range(1, 4))
        equal = (a == b for a, b in zip(where, (visit.batch, visit.head, visit.block), strict=True))
        first, second, third = equal
        return first & second & third

    def _finish(self, buffer: int, wanted: Bool[Array, ""] | bool) -> None:
        """Waits for a buffer's write, where that is wanted and under way."""
        base = 1 + 4 * buffer

        @pl.when((self.state[base] == 1) & wanted)
        def _() -> None:
            batch, head, block = (self.state[base + n] for n in range(1, 4))
            self._write(batch, head, block, jnp.int32(buffer), start=False)
            self.state[base] = jnp.int32(0)

    def _fetch(self, visit: Visit, buffer: Int[Array, ""], *, start: bool) -> None:
        def move(block, rows: int) -> None:
            there, here = self._sides(visit.batch, visit.head, block, buffer, rows)
            copy = pltpu.make_async_copy(there, here, self.fetched.at[buffer])
            copy.start() if start else copy.wait()

        self._in_its_size(visit.block, move)

    def _write(self, batch, head, block, buffer: Int[Array, ""], *, start: bool) -> None:
        def move(block, rows: int) -> None:
            there, here = self._sides(batch, head, block, buffer, rows)
            copy = pltpu.make_async_copy(here, there, self.written.at[buffer])
            copy.start() if start else copy.wait()

        self._in_its_size(block, move)

    def _sides(self, batch, head, block, buffer: Int[Array, ""], rows: int):
        start = pl.multiple_of(block * self.buffers.shape[1], self.buffers.shape[1])
        there = self.hbm.at[batch, head, pl.ds(start, rows), :]
        return there, self.buffers.at[buffer, pl.ds(0, rows), :]

    def _in_its_size(self, block: Int[Array, ""], move) -> None:
        """`move(block, rows)` with as many rows as the block has: the size of a DMA is static."""
        block_q = self.buffers.shape[1]
        last, tail = self.t // block_q, self.t % block_q
        if self.whole_tiles:
            tail = -(-tail // SUBLANES) * SUBLANES
        if not tail:
            move(block, block_q)
            return
        if last:
            pl.when(block < last)(lambda: move(block, block_q))
        pl.when(block == last)(lambda: move(block, tail))
