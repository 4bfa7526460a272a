"""Backward tile: dq, dk, dv from one pass over the scores (FlashAttention-2, Alg. 2), pure JAX.

For each block of keys, the active query blocks only. dk and dv of the block stay in the loop's
small carry; dq is one buffer that each step adds one block to. Scores are held transposed, [keys,
queries], and a block of dq is made transposed, [H, queries]: then no product has to transpose its
large operand, which on CPU costs more than the product itself. The softmax is the whole row's: lse
and delta come from outside.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from burst_kernels._config import TileConfig
from burst_kernels._tile import FULL, PARTIAL, Onto, Tile, accumulator_dtype
from burst_kernels.xla._blocks import MaskBlocks, choose, for_each, fori
from burst_kernels.xla._scores import (
    cap_slope,
    capped,
    factor,
    matmul,
    operand_dtype,
    probability,
)


def tile_backward(
    q: Float[Array, "B N t H"],
    k: Float[Array, "B K s H"],
    v: Float[Array, "B K s Hv"],
    do: Float[Array, "B N t Hv"],
    lse: Float[Array, "B N t"],
    delta: Float[Array, "B N t"],
    tile: Tile,
    config: TileConfig | None = None,
    onto: Onto | None = None,
) -> tuple[Float[Array, "B N t H"], Float[Array, "B K s H"], Float[Array, "B K s Hv"]]:
    """Gradients of one tile, given the whole row's lse and delta. See the tile contract.

    ``p = exp(scores - lse); dv = p^T do; ds = p (do v^T - delta); dq = scale ds k;
    dk = scale ds^T q``
    """
    b = choose(q, k, tile, config)
    mask = MaskBlocks.of(tile, b, like=q)
    # exp(scores - inf) = 0: a row that sees nothing takes part in no gradient, and no NaN arises.
    lse = jnp.where(jnp.isneginf(lse), jnp.inf, lse)
    sides = tuple(b.rows(x) for x in (q, do, lse, delta))
    ks, vs = b.columns(k), b.columns(v)
    dtype = accumulator_dtype(q.dtype)

    def block(n: Int[Array, ""], found):
        dq, dk, dv = found
        group, j = n // b.num_kv, n % b.num_kv
        k_block, v_block = b.take_columns(ks, group, j), b.take_columns(vs, group, j)
        k_columns = k_block.swapaxes(1, 2)

        def visit(i: Int[Array, ""], carry, mask: MaskBlocks | None):
            dq, dk, dv = carry
            q_i, do_i, lse_i, delta_i = (b.take_rows(x, group, i) for x in sides)
            seen = None
            if mask is not None:
                seen = jnp.tile(mask.visible(group, i, j).T, (1, b.heads_per_kv))[None]
            dq_part, dk_part, dv_part = _gradients(
                q_i, do_i, lse_i, delta_i, k_block, k_columns, v_block, seen, tile
            )
            dq_block = b.take_rows(dq, group, i) + dq_part.swapaxes(1, 2) * tile.scale
            return b.put_rows(dq, dq_block, group, i), dk + dk_part, dv + dv_part

        carry = (dq, jnp.zeros_like(k_block, dtype=dtype), jnp.zeros_like(v_block, dtype=dtype))
        if mask is None:
            carry = fori(b.num_q, lambda i, c: visit(i, c, None), carry)
        else:
            classes = mask.classes_of_keys(group, j)
            carry = for_each(classes == FULL, lambda i, c: visit(i, c, None), carry)
            carry = for_each(classes == PARTIAL, lambda i, c: visit(i, c, mask), carry)
        dq, dk_block, dv_block = carry
        dk_block = b.take_columns(dk, group, j) + dk_block * tile.scale
        dv_block = b.take_columns(dv, group, j) + dv_block
        return dq, b.put_columns(dk, dk_block, group, j), b.put_columns(dv, dv_block, group, j)

    given = onto or (None, None, None)
    start = tuple(
        jnp.zeros_like(x, dtype=dtype) if y is None else y
        for x, y in zip((q, k, v), given, strict=True)
    )
    start = (b.rows(start[0]), b.columns(start[1]), b.columns(start[2]))
    dq, dk, dv = fori(b.groups * b.num_kv, block, start)
    return b.unrow(dq), dk[:, :, : b.s], dv[:, :, : b.s]


def _gradients(
    q: Float[Array, "h r H"],
    do: Float[Array, "h r Hv"],
    lse: Float[Array, "h r"],
    delta: Float[Array, "h r"],
    k: Float[Array, "h c H"],
    k_columns: Float[Array, "h H c"],
    v: Float[Array, "h c Hv"],
    seen: Array | None,
    tile: Tile,
) -> tuple[Float[Array, "h H r"], Float[Array, "h c H"], Float[Array, "h c Hv"]]:
    """Contributions of one pair of blocks to dq^T / scale, dk / scale and dv."""
    dtype, operand = lse.dtype, operand_dtype(q.dtype)
    scores = capped(matmul(k, q, (2, 2), dtype), tile)
    p = probability(scores, lse[:, None, :] / factor(tile), tile)
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
