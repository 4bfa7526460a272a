"""Forward tile: FlashAttention-2's loop order (arXiv 2307.08691, Alg. 1) in pure JAX.

For each block of queries, the active key blocks only: first those that need no mask, then those
that do. We differ in that the list of active blocks is compacted from position summaries, on the
device, so masks known only as data cost the same as masks known to the compiler.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from burst_kernels._config import TileConfig
from burst_kernels._tile import FULL, PARTIAL, Tile, accumulator_dtype
from burst_kernels.xla._blocks import Blocks, MaskBlocks, choose, for_each, fori
from burst_kernels.xla._scores import capped, factor, matmul, operand_dtype, probability


class Running(NamedTuple):
    """Online softmax of a block of queries: row maximum (in units of 1 / `factor`), sum, output."""

    maximum: Float[Array, "h r"]
    total: Float[Array, "h r"]
    out: Float[Array, "h r Hv"]


def tile_forward(
    q: Float[Array, "B N t H"],
    k: Float[Array, "B K s H"],
    v: Float[Array, "B K s Hv"],
    tile: Tile,
    config: TileConfig | None = None,
    onto: tuple[Float[Array, "B N t Hv"], Float[Array, "B N t"]] | None = None,
) -> tuple[Float[Array, "B N t Hv"], Float[Array, "B N t"]]:
    """Attention of t queries to s keys. See the tile contract in `burst_kernels._tile`."""
    b = choose(q, k, tile, config)
    mask = MaskBlocks.of(tile, b, like=q)
    rows, ks, vs = b.rows(q), b.columns(k), b.columns(v)
    dtype = accumulator_dtype(q.dtype)
    if onto is None:
        onto = (
            jnp.zeros_like(q, dtype=dtype, shape=(*q.shape[:-1], v.shape[-1])),
            jnp.full_like(q, -jnp.inf, dtype=dtype, shape=q.shape[:-1]),
        )

    def block(n: Int[Array, ""], found):
        out, lse = found
        group, i = n // b.num_q, n % b.num_q
        before = (b.take_rows(out, group, i), b.take_rows(lse, group, i))
        running = _attend(b.take_rows(rows, group, i), before, ks, vs, group, i, mask, b, tile)
        block_out, block_lse = _normalize(running, tile)
        return b.put_rows(out, block_out, group, i), b.put_rows(lse, block_lse, group, i)

    out, lse = fori(b.groups * b.num_q, block, (b.rows(onto[0]), b.rows(onto[1])))
    return b.unrow(out), b.unrow(lse)


def _attend(
    q: Float[Array, "h r H"],
    before: tuple[Float[Array, "h r Hv"], Float[Array, "h r"]],
    ks: Shaped[Array, "B K s_ H"],
    vs: Shaped[Array, "B K s_ Hv"],
    group: Int[Array, ""],
    i: Int[Array, ""],
    mask: MaskBlocks | None,
    b: Blocks,
    tile: Tile,
) -> Running:
    """One block of queries against all its active key blocks, on top of what it saw before."""
    out, lse = before
    dtype = lse.dtype
    # What was found before is a softmax whose sum, scaled by its maximum, is one.
    start = Running(lse / factor(tile), jnp.where(jnp.isneginf(lse), 0.0, jnp.ones_like(lse)), out)

    def visit(running: Running, j: Int[Array, ""], mask: MaskBlocks | None) -> Running:
        k, v = b.take_columns(ks, group, j), b.take_columns(vs, group, j)
        scores = capped(matmul(q, k, (2, 2), dtype), tile)
        if mask is not None:
            seen = jnp.tile(mask.visible(group, i, j), (b.heads_per_kv, 1))[None]
            scores = jnp.where(seen, scores, -jnp.inf)
        return _update(running, scores, v, tile)

    if mask is None:
        return fori(b.num_kv, lambda j, r: visit(r, j, None), start)
    classes = mask.classes_of_queries(group, i)
    running = for_each(classes == FULL, lambda j, r: visit(r, j, None), start)
    return for_each(classes == PARTIAL, lambda j, r: visit(r, j, mask), running)


def _update(
    running: Running, scores: Float[Array, "h r c"], v: Float[Array, "h c Hv"], tile: Tile
) -> Running:
    """Adds one block of keys to the online softmax."""
    maximum = jnp.maximum(running.maximum, scores.max(-1))
    finite = jnp.where(jnp.isneginf(maximum), 0.0, maximum)  # a row that saw nothing yet
    p = probability(scores, finite[..., None], tile)
    shrink = jnp.exp((running.maximum - finite) * factor(tile))
    operand = operand_dtype(v.dtype)
    added = matmul(p.astype(operand), v.astype(operand), (2, 1), p.dtype)
    return Running(
        maximum,
        running.total * shrink + p.sum(-1),
        running.out * shrink[..., None] + added,
    )


def _normalize(running: Running, tile: Tile) -> tuple[Float[Array, "h r Hv"], Float[Array, "h r"]]:
    """Output and lse; rows that saw nothing get 0 and -inf."""
    saw = running.total != 0  # NaN is seen, and stays
    total = jnp.where(saw, running.total, 1.0)
    lse = jnp.where(saw, running.maximum * factor(tile) + jnp.log(total), -jnp.inf)
    return running.out / total[..., None], lse
