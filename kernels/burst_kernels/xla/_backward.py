"""Backward tile: dq, dk, dv from one pass over the scores (FlashAttention-2, Alg. 2), pure JAX.

For each block of keys, the active query blocks only. dk and dv of the block stay in the loop's
small carry; dq is one buffer that each step adds one block to. Scores are held transposed, [keys,
queries], and so is dq, [H, queries]: then no product has to transpose the large operand, which on
CPU costs more than the product (kernels/workbench/bench_products.py). The softmax is the whole
row's: lse and delta come from outside.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from burst_kernels._config import TileConfig
from burst_kernels._tile import FULL, PARTIAL, Tile, accumulator_dtype
from burst_kernels.xla._blocks import (
    MaskBlocks,
    choose,
    for_each,
    from_key_blocks,
    from_query_blocks,
    key_blocks,
    query_blocks,
)
from burst_kernels.xla._scores import cap_slope, capped, matmul, operand_dtype


def tile_backward(
    q: Float[Array, "B t N H"],
    k: Float[Array, "B s K H"],
    v: Float[Array, "B s K Hv"],
    do: Float[Array, "B t N Hv"],
    lse: Float[Array, "B t N"],
    delta: Float[Array, "B t N"],
    tile: Tile,
    config: TileConfig | None = None,
) -> tuple[Float[Array, "B t N H"], Float[Array, "B s K H"], Float[Array, "B s K Hv"]]:
    """Gradients of one tile, given the whole row's lse and delta. See the tile contract.

    ``p = exp(scores - lse); dv = p^T do; ds = p (do v^T - delta); dq = scale ds k;
    dk = scale ds^T q``
    """
    b = choose(q, k, tile, config)
    dtype = accumulator_dtype(q.dtype)
    mask = MaskBlocks.of(tile, b, like=q)
    # exp(scores - inf) = 0: a row that sees nothing takes part in no gradient, and no NaN arises.
    lse = jnp.where(jnp.isneginf(lse), jnp.inf, lse)
    qs, dos = query_blocks(q, b), query_blocks(do, b)
    lses, deltas = (query_blocks(x[..., None], b)[..., 0] for x in (lse, delta))

    def block(dq, x):
        at, k_block, v_block = x
        group, j = at // b.num_kv, at % b.num_kv
        k_columns = k_block.swapaxes(1, 2)
        zeros = [jnp.zeros_like(x, dtype=dtype) for x in (k_block, v_block)]

        def visit(carry, i: Int[Array, ""], masked: bool):
            dq, dk, dv = carry
            row = group * b.num_q + i
            q, do, lse, delta = (
                jax.lax.dynamic_index_in_dim(x, row, keepdims=False)
                for x in (qs, dos, lses, deltas)
            )
            seen = None
            if masked:
                seen = jnp.tile(mask.visible(group, i, j).T, (1, b.heads_per_kv))[None]
            dq_part, dk_part, dv_part = _gradients(
                q, k_block, k_columns, v_block, do, lse, delta, seen, tile
            )
            old = jax.lax.dynamic_index_in_dim(dq, row, keepdims=False)
            dq = jax.lax.dynamic_update_index_in_dim(dq, old + dq_part, row, 0)
            return dq, dk + dk_part, dv + dv_part

        carry = (dq, *zeros)
        if mask is None:
            carry = jax.lax.fori_loop(0, b.num_q, lambda i, c: visit(c, i, False), carry)
        else:
            classes = mask.classes_of_keys(group, j)
            carry = for_each(classes == FULL, lambda i, c: visit(c, i, False), carry)
            carry = for_each(classes == PARTIAL, lambda i, c: visit(c, i, True), carry)
        dq, dk, dv = carry
        return dq, (dk * tile.scale, dv)

    indices = jax.lax.broadcasted_iota(jnp.int32, (b.groups * b.num_kv,), 0)
    dq = jnp.zeros_like(qs, dtype=dtype, shape=(*qs.shape[:2], qs.shape[3], qs.shape[2]))
    dq, (dk, dv) = jax.lax.scan(block, dq, (indices, key_blocks(k, b), key_blocks(v, b)))
    dq = dq.swapaxes(2, 3)
    return from_query_blocks(dq, b) * tile.scale, from_key_blocks(dk, b), from_key_blocks(dv, b)


def _gradients(
    q: Float[Array, "h r H"],
    k: Float[Array, "h c H"],
    k_columns: Float[Array, "h H c"],
    v: Float[Array, "h c Hv"],
    do: Float[Array, "h r Hv"],
    lse: Float[Array, "h r"],
    delta: Float[Array, "h r"],
    seen: Array | None,
    tile: Tile,
) -> tuple[Float[Array, "h H r"], Float[Array, "h c H"], Float[Array, "h c Hv"]]:
    """Contributions of one pair of blocks to dq^T / scale, dk / scale and dv."""
    dtype, operand = lse.dtype, operand_dtype(q.dtype)
    scores = capped(matmul(k, q, (2, 2), dtype), tile)
    p = jnp.exp(scores - lse[:, None, :])
    if seen is not None:
        p = jnp.where(seen, p, 0.0)
    ds = p * (matmul(v, do, (2, 2), dtype) - delta[:, None, :])
    slope = cap_slope(scores, tile)
    if slope is not None:
        ds = ds * slope
    p, ds = p.astype(operand), ds.astype(operand)
    dv = matmul(p, do.astype(operand), (2, 1), dtype)
    dk = matmul(ds, q.astype(operand), (2, 1), dtype)
    dq = matmul(k_columns.astype(operand), ds, (2, 1), dtype)
    return dq, dk, dv
