"""What all kernels take: constants, the mask's lists and marks; and what vmap makes of it."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from burst_kernels._active import Active, BlockMask, block_mask
from burst_kernels._problem import Problem
from burst_kernels._tile import Tile
from burst_kernels.triton._sizes import Sizes

# Score gradients of float16 are scaled to stay below 2 to this power; its greatest is 2**16 - 32.
_FLOAT16_POWER = 15


class Mask(NamedTuple):
    """Operands of a kernel for the mask; b as in `BlockMask`."""

    q_marks: Int[Array, "b U t_"]
    kv_marks: Int[Array, "b W s_"]
    active: Int[Array, "b n m"]
    counts: Int[Array, "b n 2"]
    order: Int[Array, "b n"]


def mask_of(
    tile: Tile, problem: Problem, block_q: int, block_kv: int, like: Array
) -> BlockMask | None:
    """The tile's mask in blocks, as many rows on the side of keys as on that of queries."""
    mask = block_mask(tile, problem.t, problem.s, block_q, block_kv, like=like)
    if mask is None:
        return None
    q, kv = mask.q, mask.kv
    rows = max(q.shape[0], kv.shape[0])
    return mask._replace(
        q=jnp.broadcast_to(q, (rows, *q.shape[1:])), kv=jnp.broadcast_to(kv, (rows, *kv.shape[1:]))
    )


def mask_operands(mask: BlockMask | None, active: Active | None, q: Array) -> tuple[Array, ...]:
    """`Mask`; q where there is none, since a kernel has no optional parameter."""
    if mask is None or active is None:
        return (q,) * len(Mask._fields)
    return Mask(mask.q, mask.kv, active.blocks, active.counts, active.heaviest_first())


def sizes_of(
    problem: Problem, tile: Tile, mask: BlockMask | None, block_q: int, block_kv: int, **rest: Any
) -> Sizes:
    """Constants of a kernel; `rest` are those that the mask and the tile do not know."""
    p, marks = problem, None if mask is None else mask.marks
    return Sizes(
        B=p.B, N=p.N, K=p.K, T=p.t, S=p.s, H=p.H, Hv=p.Hv,
        block_q=block_q,
        block_kv=block_kv,
        scale=float(tile.scale),
        soft_cap=float(tile.logits_soft_cap or 0.0),
        listed=mask is not None,
        per_sequence=mask is not None and mask.q.shape[0] > 1,
        last=marks is not None and marks.last,
        first=marks is not None and marks.first,
        kinds=0 if marks is None else marks.segments,
        **rest,
    )  # fmt: skip


def mapped(
    function: Callable[..., tuple[Array, ...]], arrays: tuple, tile: Tile
) -> tuple[Array, ...]:
    """`function(arrays, tile)`, for `jax.vmap` to map: the mapped axis becomes sequences.

    Args:
        function: gives arrays, sequences first.
        arrays: a tree, sequences first; but the second, k, is [2, B, ...] where the third, v, is
            None: see the tile contract.
        tile: the tile.
    """
    stacked = arrays[2] is None
    names = ("q_positions", "kv_positions", "q_segments", "kv_segments")

    @jax.custom_batching.custom_vmap
    def call(arrays: tuple, mask: dict[str, Array]) -> tuple[Array, ...]:
        return function(arrays, dataclasses.replace(tile, **mask))

    @call.def_vmap
    def rule(axis_size: int, batched: Any, arrays: Any, mask: Any) -> tuple[Any, Any]:
        B = arrays[0].shape[batched[0][0]]
        fold = functools.partial(_fold, axis_size)
        folded = list(jax.tree.map(fold, arrays, batched[0]))
        if stacked:
            folded[1] = fold(arrays[1], batched[0][1], axis=1)

        def fold_rows(name: str) -> Array:
            """Of the mask; a row that all sequences share stays one."""
            x, is_mapped, axis = mask[name], batched[1][name], int(name.endswith("segments"))
            rows = axis + is_mapped
            if x.shape[rows] == 1 and not is_mapped:
                return x
            of_each = (*x.shape[:rows], B, *x.shape[rows + 1 :])
            return fold(jnp.broadcast_to(x, of_each), is_mapped, axis=axis)

        found = call(tuple(folded), {name: fold_rows(name) for name in mask})
        found = jax.tree.map(lambda x: x.reshape(axis_size, B, *x.shape[1:]), found)
        return found, jax.tree.map(lambda _: True, found)

    mask = {name: getattr(tile, name) for name in names if getattr(tile, name) is not None}
    return call(arrays, mask)


def _fold(axis_size: int, x: Array, is_mapped: bool, axis: int = 0) -> Array:
    """The mapped axis, which is the first, put before `axis` and merged with it."""
    x = x if is_mapped else jnp.broadcast_to(x, (axis_size, *x.shape))
    x = jnp.moveaxis(x, 0, axis)
    return x.reshape(*x.shape[:axis], axis_size * x.shape[axis + 1], *x.shape[axis + 2 :])


def powers_of_two(
    do: Float[Array, "B N t Hv"],
    v: Float[Array, "B K s Hv"],
    lse: Float[Array, "B N t"],
    delta: Float[Array, "B N t"],
) -> Float[Array, "2"]:
    """A power of two that brings score gradients into float16's range, and its inverse.

    |ds| <= |do v| + |delta| <= max |do| max |v| + max |delta|: rows of Euclidean length. So neither
    large gradients overflow nor those of a mean over many tokens vanish.
    """

    def longest(x: Array) -> Array:
        return jnp.sqrt(jnp.square(x.astype(jnp.float32)).sum(-1)).max()

    bound = longest(do) * longest(v) + jnp.where(jnp.isneginf(lse), 0.0, jnp.abs(delta)).max()
    bound = jnp.where((bound > 0.0) & jnp.isfinite(bound), bound, 1.0)
    power = jnp.clip(_FLOAT16_POWER - jnp.ceil(jnp.log2(bound)), -100.0, 100.0)
    return jnp.exp2(jnp.stack((power, -power)))
