"""Backward tile on Hopper: what the kernel needs is made ready, what it gives is put in shape.

dq is a buffer of zeros that CTAs add to (`_backward_kv`, `_backward_wide`): a `jax.Ref`, so that
the kernel writes where it reads.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from burst_kernels._active import BlockMask, block_mask, whole
from burst_kernels._chips import chip_at_hand
from burst_kernels._config import TileConfig
from burst_kernels._tile import Onto, Tile
from burst_kernels.mosaic_gpu._backward_blocks import Cut, Operands
from burst_kernels.mosaic_gpu._backward_kv import backward_kv
from burst_kernels.mosaic_gpu._backward_wide import backward_wide
from burst_kernels.mosaic_gpu._config import (
    Blocks,
    backward_blocks_of,
    configure,
    problem_of,
    refuses,
)
from burst_kernels.mosaic_gpu._memory import apart, together, varying_as
from burst_kernels.mosaic_gpu._scores import LOG2_E, Scores

# Columns of 16-bit numbers in a row of swizzled shared memory.
_COLUMNS = 64
# Score gradients of float16 are scaled to stay below 2 to this power; its greatest is 2**16 - 32.
_FLOAT16_POWER = 15


def tile_backward(
    q: Float[Array, "B N t H"],
    k: Float[Array, "B K s H"] | Float[Array, "2 B K s H"],
    v: Float[Array, "B K s Hv"] | None,
    do: Float[Array, "B N t Hv"],
    lse: Float[Array, "B N t"],
    delta: Float[Array, "B N t"],
    tile: Tile,
    config: TileConfig | None = None,
    onto: Onto | None = None,
) -> tuple[Float[Array, "B N t H"], Float[Array, "B K s H"], Float[Array, "B K s Hv"]]:
    """Gradients of one tile, given the whole row's lse and delta. See the tile contract.

    CTAs add to dq in no fixed order, so its last bits may differ from run to run.

    Raises:
        NotImplementedError: a chip, dtype or head dim that it does not do, with the reason.
        ValueError: block sizes of `config` that do not fit.
    """
    stacked, (k, v) = k, apart(k, v)
    problem, config = problem_of(q, k, v, tile), config or TileConfig()
    chip = config.chip or chip_at_hand().name
    if (reason := refuses(problem, chip)) is not None:
        raise NotImplementedError(f"mosaic_gpu refuses: {reason}")
    blocks = backward_blocks_of(configure(problem, chip, config))
    both = together(stacked, blocks.block_kv, _COLUMNS) if stacked.ndim > q.ndim else None
    (H, t), (Hv, s) = q.shape[:1:-1], v.shape[:1:-1]
    like, onto = q, onto or (None, None, None)
    q, k, v, do = (whole(x, 3, _COLUMNS) for x in (q, k, v, do))
    c = _cut(q, k, v, tile, blocks)._replace(v_at=0 if both is None else q.shape[0])
    mask = block_mask(tile, t, s, c.block_q, c.block_kv, like=like)
    if mask is not None:
        c = c._replace(marks=mask.marks, shared_rows=mask.q.shape[0] == 1)
    scale = c.scores.scale
    powers = _powers(do, v, lse, delta, scale) if q.dtype == jnp.float16 else None
    blind = jnp.isneginf(lse)
    bound = jnp.where(blind, jnp.inf, lse * LOG2_E)
    delta = jnp.where(blind, 0.0, delta * (scale if powers is None else powers[0]))
    k, v = (whole(x, 2, c.block_kv) for x in (k, v)) if both is None else (both, both)
    operands = Operands(
        q=whole(q, 2, c.block_q),
        k=k,
        v=v,
        do=whole(do, 2, c.block_q),
        bound=whole(bound, 2, c.block_q, constant_values=jnp.inf),
        delta=whole(delta, 2, c.block_q),
        powers=powers,
        dk=None if onto[1] is None else _filled(onto[1], c.block_kv),
        dv=None if onto[2] is None else _filled(onto[2], c.block_kv),
        **_mask_operands(mask),
    )
    dq, dk, dv = _call(c, operands, like)
    dq = dq[:, :, :t, :H]
    return dq if onto[0] is None else dq + onto[0], dk[:, :, :s, :H], dv[:, :, :s, :Hv]


def _cut(q: Array, k: Array, v: Array, tile: Tile, blocks: Blocks) -> Cut:
    (batch, heads, t, H), (_, kv_heads, s, Hv) = q.shape, v.shape
    return Cut(
        batch=batch,
        kv_heads=kv_heads,
        heads_per_kv=heads // kv_heads,
        t=-(-t // blocks.block_q) * blocks.block_q,
        s=-(-s // blocks.block_kv) * blocks.block_kv,
        block_q=blocks.block_q,
        block_kv=blocks.block_kv,
        stages=blocks.stages,
        H=H,
        Hv=Hv,
        shared_rows=True,
        scores=Scores.of(tile),
        marks=None,
        dtype=q.dtype,
    )


def _filled(x: Float[Array, "B K s H"], block: int) -> Float[Array, "B K s_ H_"]:
    return whole(whole(x, 2, block), 3, _COLUMNS)


def _mask_operands(mask: BlockMask | None) -> dict[str, Array]:
    if mask is None:
        return {}
    active = mask.queries_of_keys()
    return dict(q_marks=mask.q, kv_marks=mask.kv, blocks=active.blocks, counts=active.counts)


def _powers(
    do: Float[Array, "B N t Hv"],
    v: Float[Array, "B K s Hv"],
    lse: Float[Array, "B N t"],
    delta: Float[Array, "B N t"],
    scale: float,
) -> Float[Array, "2"]:
    """A power of two that brings score gradients into float16's range, times scale; its inverse.

    |ds| <= |do v| + |delta| <= max |do| max |v| + max |delta|, all times scale, of rows' Euclidean
    lengths. So neither large gradients overflow nor those of a mean over many tokens vanish.
    """

    def longest(x: Array) -> Array:
        return jnp.sqrt(jnp.square(x.astype(jnp.float32)).sum(-1)).max()

    bound = longest(do) * longest(v) + jnp.where(jnp.isneginf(lse), 0.0, jnp.abs(delta)).max()
    bound = scale * bound
    bound = jnp.where((bound > 0.0) & jnp.isfinite(bound), bound, 1.0)
    power = jnp.clip(_FLOAT16_POWER - jnp.ceil(jnp.log2(bound)), -100.0, 100.0)
    return jnp.stack((scale * jnp.exp2(power), jnp.exp2(-power)))


def _call(c: Cut, x: Operands, like: Array) -> tuple[Array, Array, Array]:
    """dq, dk, dv in whole blocks."""
    varying = jax.typeof(like).manual_axis_type

    def out_type(shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.float32, manual_axis_type=varying)

    # XLA would pull a slice of an operand, or the writing of a result into a larger array, into one
    # operation with the kernel, and that operation no longer says that dq is changed in place.
    x = jax.lax.optimization_barrier(x)
    # A kernel takes no Ref of a type that varies over mesh axes; zeros do not.
    shape = (c.batch, c.kv_heads * c.heads_per_kv, c.t, c.H)
    dq_ref = jax.new_ref(jnp.zeros(shape, jnp.float32))
    run = backward_wide if c.wide else backward_kv
    dk, dv = run(c, x, dq_ref, out_type)
    dq, dk, dv = jax.lax.optimization_barrier((jax.freeze(dq_ref), dk, dv))
    return varying_as(dq, like), varying_as(dk, like), varying_as(dv, like)
