"""How the `xla` tile cuts its operands into blocks, and which pairs of blocks it has to visit.

A *group* is what one step of the loops computes together: some sequences of the batch (all of
them where they share one mask) and some kv heads. The G query heads of a kv head are stacked as
rows of one matrix product, so k and v are never repeated. A block is read where it lies: nothing
is transposed.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from burst_kernels._chips import chip_at_hand
from burst_kernels._config import TileConfig
from burst_kernels._problem import Problem
from burst_kernels._tile import Summary, Tile, Tokens, classify, summarize, visible

# Block sizes, and how many scores one step holds, in elements. On CPU those should stay in a core's
# second-level cache; elsewhere a step should be large enough to fill the chip. Empirical: the best
# of twelve on two cores of an AMD EPYC (benchmarks/cpu_attention.py); elsewhere not measured.
_BLOCK_Q = {"cpu": 128, "other": 512}
_BLOCK_KV = {"cpu": 128, "other": 512}
_STEP_SCORES = {"cpu": 2**15, "other": 2**22}

Carry = TypeVar("Carry")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Blocks:
    """The static geometry of one call.

    Attributes:
        batch, kv_heads, heads_per_kv: B, K, G.
        batch_step, kv_heads_step: how many of them a group takes.
        t, s: query and key tokens.
        block_q, block_kv: tokens of a block; the last block may reach beyond the tokens.
        dtype: of q, k, v and do.
    """

    batch: int
    batch_step: int
    kv_heads: int
    kv_heads_step: int
    heads_per_kv: int
    t: int
    s: int
    block_q: int
    block_kv: int
    dtype: jnp.dtype

    @property
    def head_groups(self) -> int:
        return self.kv_heads // self.kv_heads_step

    @property
    def groups(self) -> int:
        return (self.batch // self.batch_step) * self.head_groups

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

    def corner(self, group: Int[Array, ""]) -> tuple[Int[Array, ""], Int[Array, ""]]:
        """First sequence and first kv head of a group."""
        batch = group // self.head_groups * self.batch_step
        return batch, group % self.head_groups * self.kv_heads_step

    def rows(self, x: Float[Array, "B N t ..."]) -> Shaped[Array, "B K G t_ ..."]:
        """Query-side array with kv heads apart, padded to whole blocks."""
        x = x.reshape(self.batch, self.kv_heads, self.heads_per_kv, *x.shape[2:])
        return _pad(_as_bits(x), 3, self.block_q)

    def columns(self, x: Float[Array, "B K s H"]) -> Shaped[Array, "B K s_ H"]:
        """Key-side array, padded to whole blocks."""
        return _pad(_as_bits(x), 2, self.block_kv)

    def take_rows(
        self, x: Shaped[Array, "B K G t_ ..."], group: Int[Array, ""], i: Int[Array, ""]
    ) -> Float[Array, "h r ..."]:
        """Query block i of a group: [sequences * kv heads, G * block_q, ...]."""
        batch, head = self.corner(group)
        zero = jnp.zeros_like(group)
        start = (batch, head, zero, i * self.block_q, *[zero] * (x.ndim - 4))
        size = (self.batch_step, self.kv_heads_step, self.heads_per_kv, self.block_q, *x.shape[4:])
        x = self._as_floats(jax.lax.dynamic_slice(x, start, size))
        return x.reshape(size[0] * size[1], size[2] * size[3], *size[4:])

    def put_rows(
        self,
        x: Shaped[Array, "B K G t_ ..."],
        block: Float[Array, "h r ..."],
        group: Int[Array, ""],
        i: Int[Array, ""],
    ) -> Shaped[Array, "B K G t_ ..."]:
        """x with query block i of a group replaced."""
        batch, head = self.corner(group)
        zero = jnp.zeros_like(group)
        block = block.reshape(
            self.batch_step, self.kv_heads_step, self.heads_per_kv, self.block_q, *x.shape[4:]
        )
        start = (batch, head, zero, i * self.block_q, *[zero] * (x.ndim - 4))
        return jax.lax.dynamic_update_slice(x, block, start)

    def take_columns(
        self, x: Shaped[Array, "B K s_ H"], group: Int[Array, ""], j: Int[Array, ""]
    ) -> Float[Array, "h c H"]:
        """Key block j of a group: [sequences * kv heads, block_kv, H]."""
        batch, head = self.corner(group)
        start = (batch, head, j * self.block_kv, jnp.zeros_like(group))
        size = (self.batch_step, self.kv_heads_step, self.block_kv, x.shape[3])
        return self._as_floats(jax.lax.dynamic_slice(x, start, size)).reshape(-1, *size[2:])

    def _as_floats(self, x: Array) -> Array:
        """A block of what `rows` or `columns` made, as numbers again."""
        bits = jnp.issubdtype(x.dtype, jnp.unsignedinteger)
        return jax.lax.bitcast_convert_type(x, self.dtype) if bits else x

    def put_columns(
        self,
        x: Shaped[Array, "B K s_ H"],
        block: Float[Array, "h c H"],
        group: Int[Array, ""],
        j: Int[Array, ""],
    ) -> Shaped[Array, "B K s_ H"]:
        """x with key block j of a group replaced."""
        batch, head = self.corner(group)
        block = block.reshape(self.batch_step, self.kv_heads_step, self.block_kv, x.shape[3])
        start = (batch, head, j * self.block_kv, jnp.zeros_like(group))
        return jax.lax.dynamic_update_slice(x, block, start)

    def unrow(self, x: Shaped[Array, "B K G t_ ..."]) -> Float[Array, "B N t ..."]:
        """The inverse of `rows`."""
        x = x.reshape(self.batch, self.kv_heads * self.heads_per_kv, *x.shape[3:])
        return x[:, :, : self.t]


def refuses(problem: Problem, chip: str) -> str | None:
    """Nothing: it computes every tile, on every chip."""
    del problem, chip
    return None


def configure(problem: Problem, chip: str, config: TileConfig) -> TileConfig:
    """The config as it is: `choose` fills in the rest for each tile that comes."""
    del problem, chip
    return config


def choose(
    q: Float[Array, "B N t H"], k: Float[Array, "B K s H"], tile: Tile, config: TileConfig | None
) -> Blocks:
    """Block sizes from the shapes, where `config` does not give them."""
    config = config or TileConfig()
    (batch, heads, t, _), (_, kv_heads, s, _) = q.shape, k.shape
    shared = not tile.masked or tile.queries(t).positions.shape[0] == 1
    chip = chip_at_hand().name if config.chip is None else config.chip
    kind = "cpu" if chip == "cpu" else "other"
    budget = _STEP_SCORES[kind]
    block_q = min(config.block_q or _even_block(t, _BLOCK_Q[kind]), t)
    block_kv = min(config.block_kv or _even_block(s, _BLOCK_KV[kind]), s)
    per_head = block_q * block_kv * (heads // kv_heads)
    step = config.kv_heads or _divisor(kv_heads, budget // per_head)
    if kv_heads % step:
        raise ValueError(f"TileConfig.kv_heads={step} does not divide the {kv_heads} kv heads.")
    return Blocks(
        batch=batch,
        batch_step=_divisor(batch, budget // (per_head * step)) if shared else 1,
        kv_heads=kv_heads,
        kv_heads_step=step,
        heads_per_kv=heads // kv_heads,
        t=t,
        s=s,
        block_q=block_q,
        block_kv=block_kv,
        dtype=q.dtype,
    )


def _even_block(n: int, target: int) -> int:
    """A block of at most `target` tokens, one of an even number, dividing n where that is near.

    Even, because a zigzag shard is two chunks that lie far apart: a block across their boundary
    would be PARTIAL where its halves are EMPTY and FULL.
    """
    if n < 2 or (n % 2 and n <= target):
        return n
    least = 2 * math.ceil(n / (2 * target))
    for blocks in range(least, 2 * least + 1, 2):
        if n % blocks == 0:
            return n // blocks
    return math.ceil(n / least)


def _divisor(n: int, at_most: int) -> int:
    """The greatest divisor of n that is at most `at_most`, at least 1."""
    return max(d for d in range(1, n + 1) if n % d == 0 and (d <= at_most or d == 1))


def _as_bits(x: Array) -> Array:
    """16-bit floats as bit patterns: XLA on CPU widens floats, the whole array before the loop."""
    return jax.lax.bitcast_convert_type(x, jnp.uint16) if x.dtype.itemsize == 2 else x


def _pad(x: Array, axis: int, block: int, value: int = 0) -> Array:
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % block)
    return jnp.pad(x, widths, constant_values=value) if widths[axis][1] else x


def fori(n: int, body: Callable[[Int[Array, ""], Carry], Carry], carry: Carry) -> Carry:
    """`lax.fori_loop` from 0 with an int32 index, also where Python integers are 64 bit."""
    return jax.lax.fori_loop(0, n, lambda i, c: body(jnp.asarray(i, jnp.int32), c), carry)


def for_each(
    chosen: Bool[Array, " n"], body: Callable[[Int[Array, ""], Carry], Carry], carry: Carry
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
            q, kv = jax.tree.map(
                lambda x: jnp.zeros_like(like, shape=x.shape, dtype=x.dtype), (q, kv)
            )
        q, kv = _pad_tokens(q, b.block_q), _pad_tokens(kv, b.block_kv)
        return cls(tile, b, q, kv, summarize(q, b.block_q), summarize(kv, b.block_kv))

    def _row(self, group: Int[Array, ""]) -> Int[Array, ""]:
        """Which row of the tokens a group reads."""
        if self.q.positions.shape[0] == 1:
            return jnp.zeros_like(group)
        return group // self.blocks.head_groups

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


def _pad_tokens(x: Tokens, block: int) -> Tokens:
    return Tokens(_pad(x.positions, 1, block, -1), _pad(x.segments, 2, block))


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
