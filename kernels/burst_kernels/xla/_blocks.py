"""How the `xla` tile lays its operands out: [groups x blocks, heads, rows, H], one block contiguous.

A *group* is what one step of the loops computes together: some sequences of the batch (all of
them where they share one mask) and some kv heads. The G query heads of a kv head are stacked as
rows of one matrix product, so k and v are never repeated.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from burst_kernels._config import TileConfig
from burst_kernels._tile import Summary, Tile, Tokens, classify, summarize, visible

# Scores that one step holds, in elements. On CPU they should stay in a core's second-level cache
# (1 MiB of float32 here; 2x slower at 8 MiB, measured with kernels/workbench/bench_tile.py);
# elsewhere a step should be large enough to fill the chip. Both are empirical.
_STEP_SCORES = {"cpu": 2**18, "other": 2**22}
_BLOCK = 512

Carry = TypeVar("Carry")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Blocks:
    """The static geometry of one call. Sizes count tokens after padding to whole blocks."""

    batch: int
    batch_step: int
    kv_heads: int
    kv_heads_step: int
    heads_per_kv: int
    t: int
    s: int
    block_q: int
    block_kv: int

    @property
    def groups(self) -> int:
        return (self.batch // self.batch_step) * (self.kv_heads // self.kv_heads_step)

    @property
    def num_q(self) -> int:
        return -(-self.t // self.block_q)

    @property
    def num_kv(self) -> int:
        return -(-self.s // self.block_kv)

    @property
    def padded(self) -> bool:
        """Whether blocks reach beyond the tokens, so that a mask is needed where there was none."""
        return self.num_q * self.block_q != self.t or self.num_kv * self.block_kv != self.s


def choose(
    q: Float[Array, "B t N H"], k: Float[Array, "B s K H"], tile: Tile, config: TileConfig | None
) -> Blocks:
    """Block sizes from the shapes, where `config` does not give them."""
    config = config or TileConfig()
    (batch, t, heads, _), (_, s, kv_heads, _) = q.shape, k.shape
    shared = not tile.masked or tile.queries(t).positions.shape[0] == 1
    on_cpu = jax.default_backend() == "cpu"
    budget = _STEP_SCORES["cpu" if on_cpu else "other"]
    block_q = config.block_q or _even_block(t, _BLOCK)
    block_kv = config.block_kv or _even_block(s, _BLOCK)
    per_head = block_q * block_kv * (heads // kv_heads)
    step = config.kv_heads or _divisor(kv_heads, budget // per_head)
    if kv_heads % step:
        raise ValueError(f"TileConfig.kv_heads={step} does not divide the {kv_heads} kv heads.")
    together = _divisor(batch, budget // (per_head * step)) if shared else 1
    return Blocks(
        batch=batch,
        batch_step=together,
        kv_heads=kv_heads,
        kv_heads_step=step,
        heads_per_kv=heads // kv_heads,
        t=t,
        s=s,
        block_q=min(block_q, t),
        block_kv=min(block_kv, s),
    )


def _even_block(n: int, target: int) -> int:
    """A block of at most `target` tokens, one of an even number, dividing n where that is near.

    Even, because a zigzag shard is two chunks that lie far apart: a block across their boundary
    would be PARTIAL where its halves are EMPTY and FULL.
    """
    least = 2 * math.ceil(n / (2 * target))
    if n < 2 or (n % 2 and n <= target):
        return n
    for blocks in range(least, 2 * least + 1, 2):
        if n % blocks == 0:
            return n // blocks
    return math.ceil(n / least)


def _divisor(n: int, at_most: int) -> int:
    """The greatest divisor of n that is at most `at_most`, at least 1."""
    return max(d for d in range(1, n + 1) if n % d == 0 and (d <= at_most or d == 1))


def _pad(x: Array, axis: int, block: int, value: int | float = 0) -> Array:
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % block)
    return jnp.pad(x, widths, constant_values=value) if widths[axis][1] else x


def query_blocks(x: Float[Array, "B t N H"], b: Blocks) -> Float[Array, "gq h r H"]:
    """[B, t, N, H] -> [groups * num_q, sequences * kv heads, G * block_q, H]."""
    x = _pad(x, 1, b.block_q)
    x = x.reshape(
        b.batch // b.batch_step, b.batch_step, b.num_q, b.block_q,
        b.kv_heads // b.kv_heads_step, b.kv_heads_step, b.heads_per_kv, x.shape[-1],
    )  # fmt: skip
    x = x.transpose(0, 4, 2, 1, 5, 6, 3, 7)
    return x.reshape(
        b.groups * b.num_q, b.batch_step * b.kv_heads_step, b.heads_per_kv * b.block_q, -1
    )


def from_query_blocks(x: Float[Array, "gq h r H"], b: Blocks) -> Float[Array, "B t N H"]:
    """The inverse of `query_blocks`."""
    x = x.reshape(
        b.batch // b.batch_step, b.kv_heads // b.kv_heads_step, b.num_q, b.batch_step,
        b.kv_heads_step, b.heads_per_kv, b.block_q, x.shape[-1],
    )  # fmt: skip
    x = x.transpose(0, 3, 2, 6, 1, 4, 5, 7)
    heads = b.kv_heads * b.heads_per_kv
    return x.reshape(b.batch, b.num_q * b.block_q, heads, -1)[:, : b.t]


def key_blocks(x: Float[Array, "B s K H"], b: Blocks) -> Float[Array, "gk h c H"]:
    """[B, s, K, H] -> [groups * num_kv, sequences * kv heads, block_kv, H]."""
    x = _pad(x, 1, b.block_kv)
    x = x.reshape(
        b.batch // b.batch_step, b.batch_step, b.num_kv, b.block_kv,
        b.kv_heads // b.kv_heads_step, b.kv_heads_step, x.shape[-1],
    )  # fmt: skip
    x = x.transpose(0, 4, 2, 1, 5, 3, 6)
    return x.reshape(b.groups * b.num_kv, b.batch_step * b.kv_heads_step, b.block_kv, -1)


def from_key_blocks(x: Float[Array, "gk h c H"], b: Blocks) -> Float[Array, "B s K H"]:
    """The inverse of `key_blocks`."""
    x = x.reshape(
        b.batch // b.batch_step, b.kv_heads // b.kv_heads_step, b.num_kv, b.batch_step,
        b.kv_heads_step, b.block_kv, x.shape[-1],
    )  # fmt: skip
    x = x.transpose(0, 3, 2, 5, 1, 4, 6)
    return x.reshape(b.batch, b.num_kv * b.block_kv, b.kv_heads, -1)[:, : b.s]


@dataclasses.dataclass(frozen=True)
class MaskBlocks:
    """The mask by blocks: which pairs are active, and the pairs of tokens inside one of them."""

    tile: Tile
    blocks: Blocks
    q: Tokens
    kv: Tokens
    q_summary: Summary
    kv_summary: Summary

    @classmethod
    def of(cls, tile: Tile, b: Blocks, like: Array) -> "MaskBlocks | None":
        """None where every pair counts. `like`: an array whose mesh axes constants shall take."""
        if not tile.masked and not b.padded:
            return None
        q, kv = tile.queries(b.t), tile.keys(b.s)
        if not tile.masked:
            q, kv = (jax.tree.map(lambda x: jnp.zeros_like(like, shape=x.shape, dtype=x.dtype), y)
                     for y in (q, kv))  # fmt: skip
        q, kv = _pad_tokens(q, b.block_q), _pad_tokens(kv, b.block_kv)
        return cls(tile, b, q, kv, summarize(q, b.block_q), summarize(kv, b.block_kv))

    def _row(self, group: Int[Array, ""]) -> Int[Array, ""]:
        """Which row of the tokens, [b, ...], a group reads."""
        if self.q.positions.shape[0] == 1:
            return jnp.zeros_like(group)
        return group // (self.blocks.kv_heads // self.blocks.kv_heads_step)

    def classes_of_queries(self, group: Int[Array, ""], i: Int[Array, ""]) -> Array:
        """The class of query block i against each key block, [num_kv]."""
        row = self._row(group)
        q = _take(self.q_summary, row, i)
        return classify(q, _take(self.kv_summary, row), self.tile)

    def classes_of_keys(self, group: Int[Array, ""], j: Int[Array, ""]) -> Array:
        """The class of each query block against key block j, [num_q]."""
        row = self._row(group)
        kv = _take(self.kv_summary, row, j)
        return classify(_take(self.q_summary, row), kv, self.tile)

    def visible(
        self, group: Int[Array, ""], i: Int[Array, ""], j: Int[Array, ""]
    ) -> Bool[Array, "q kv"]:
        """Which pairs of tokens count in block pair (i, j)."""
        row, b = self._row(group), self.blocks
        q = Tokens(*(_cut(x, row, i, b.block_q) for x in self.q))
        kv = Tokens(*(_cut(x, row, j, b.block_kv) for x in self.kv))
        return visible(q, kv, self.tile)


def for_each(
    chosen: Bool[Array, "n"], body: Callable[[Int[Array, ""], Carry], Carry], carry: Carry
) -> Carry:
    """Runs `body(index, carry)` for every index chosen, in order; the others cost nothing.

    The next index is a minimum over n, which is cheaper to compile than a sorted list and, next to
    a pair of blocks, free to run.
    """
    indices = jax.lax.broadcasted_iota(jnp.int32, chosen.shape, 0)
    n = jnp.int32(chosen.shape[0])

    def after(last: Int[Array, ""]) -> Int[Array, ""]:
        return jnp.where(chosen & (indices > last[None]), indices, n[None]).min()

    def step(state):
        index, carry = state
        return after(index), body(index, carry)

    first = after(jnp.int32(-1))
    return jax.lax.while_loop(lambda state: state[0] < n, step, (first, carry))[1]


def _pad_tokens(x: Tokens, block: int) -> Tokens:
    return Tokens(_pad(x.positions, -1, block, -1), _pad(x.segments, -1, block))


def _take(summary: Summary, row: Int[Array, ""], i: Int[Array, ""] | None = None) -> Summary:
    """One row of the summaries; with i, one block, as a length-1 axis that broadcasts."""

    def pick(x: Array) -> Array:
        axis = x.ndim - 2
        x = jax.lax.dynamic_index_in_dim(x, row, axis, keepdims=False)
        return x if i is None else jax.lax.dynamic_slice_in_dim(x, i, 1, axis)

    return Summary(*map(pick, summary))


def _cut(x: Array, row: Int[Array, ""], i: Int[Array, ""], block: int) -> Array:
    x = jax.lax.dynamic_index_in_dim(x, row, x.ndim - 2, keepdims=False)
    return jax.lax.dynamic_slice_in_dim(x, i * block, block, x.ndim - 1)
