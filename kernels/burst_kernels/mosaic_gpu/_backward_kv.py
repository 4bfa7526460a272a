"""Backward kernel for Hopper, head dims to 128: dk and dv of 128 keys and their part of dq at once.

FlashAttention-3's backward (arXiv 2407.08608, Alg. 2) with a global lse and delta. One CTA keeps a
block of keys; its active query blocks, of all G query heads of the kv head, pass by:

    load        for each (query head, active block of queries)      the third warpgroup
                  [consumed] -> q, do, lse, delta, marks -> [loaded]    by TMA, `stages` deep
    compute     two warpgroups, 64 keys each
                  [loaded]
                  scores^T = k q^T, dp^T = v do^T       both under way while p is made
                  p = exp(scores - lse), ds = p (dp - delta)
                  ds -> shared memory -> [exchanged]    all keys of the block, for dq
                  dv += p^T do, dk += ds^T q            p and ds from registers
                  dq part = ds k                        each warpgroup one half
                  -> [consumed]
                  dq part -> shared memory -> added to dq in global memory by TMA
    store       dk, dv, added to what was found before: registers -> global memory

We differ in that blocks come from a list (`_active`), FULL ones first, so that no mask known only
as data costs what its EMPTY blocks would; in that the query heads of a kv head are summed in
registers; and in that score gradients of float16 are kept in its range by a power of two. CTAs add
to dq in no fixed order: its last bits may differ from run to run.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from burst_kernels.mosaic_gpu._backward_blocks import (
    ROWS,
    WARPGROUPS,
    Cut,
    Here,
    Operands,
    Places,
    Visits,
    accumulator,
    call,
    each,
    probabilities,
    score_gradients,
    store,
    target,
    tiled,
    unscaled,
    visits,
)


class Scratch(NamedTuple):
    """What the warpgroups exchange.

    Attributes:
        ds: ds^T by columns of 64, two of them in turn.
        exchanged: both warpgroups have written their keys' rows of it.
        dq: each warpgroup's part of dq, on its way out.
    """

    ds: Any
    exchanged: Any
    dq: Any


def backward_kv(
    c: Cut, operands: Operands, dq: Any, out_type: Callable[..., Any]
) -> tuple[jax.Array, jax.Array]:
    """dk and dv; dq is added to. See `_backward_blocks.call`."""

    def compute(
        here: Here, x: Operands, dq: Any, dk: Any, dv: Any, s: Places, scratch: Scratch
    ) -> None:
        def accumulate(dk_acc, dv_acc):
            plgpu.barrier_wait(s.resident)
            for some in visits(c, here, x):
                _visit_queries(c, here, some, x, s, scratch, (dq, dk_acc, dv_acc))
            return dk_acc[...], dv_acc[...]

        dk_sum, dv_sum = pl.run_scoped(accumulate, accumulator(c.H), accumulator(c.Hv))
        keys = pl.ds(here.j * c.block_kv + here.wg * ROWS, ROWS)
        store(here, keys, unscaled(x, dk_sum), x.dk, dk)
        store(here, keys, dv_sum, x.dv, dv)
        plgpu.wait_smem_to_gmem(0)

    scratch = Scratch(
        ds=tiled(c.dtype, 2, c.block_q // ROWS, c.block_kv, ROWS),
        exchanged=plgpu.Barrier(num_arrivals=WARPGROUPS),
        dq=tiled(jnp.float32, WARPGROUPS, ROWS, _dq_columns(c)),
    )
    return call(c, compute, scratch, operands, dq, out_type)


def _split_rows(c: Cut) -> bool:
    """Whether the warpgroups share dq of a pair of blocks by queries, not by columns."""
    return c.block_q == WARPGROUPS * ROWS


def _dq_columns(c: Cut) -> int:
    """Columns of dq that one warpgroup makes, of 64 queries."""
    return c.H if _split_rows(c) else c.H // WARPGROUPS


def _visit_queries(
    c: Cut,
    here: Here,
    some: Visits,
    x: Operands,
    s: Places,
    scratch: Scratch,
    sums: tuple[Any, Any, Any],
) -> None:
    dq, dk_acc, dv_acc = sums
    mine = pl.ds(here.wg * ROWS, ROWS)

    # The invariant: all products of earlier visits are finished, their slots given back, and this
    # warpgroup's part of dq is on its way to global memory at the latest.
    def visit(n: jax.Array, slot: jax.Array) -> None:
        plgpu.barrier_wait(s.loaded.at[slot])
        p, ds = pl.run_scoped(
            lambda *accs: _scores(c, mine, some.masked, slot, x, s, *accs),
            accumulator(c.block_q),
            accumulator(c.block_q),
        )
        # Two places for ds, so that the other warpgroup may still be reading the last one.
        place = scratch.ds.at[lax.rem(some.before + n, jnp.int32(2))]
        for i in range(c.block_q // ROWS):
            place[i, mine] = ds[:, i * ROWS : (i + 1) * ROWS]
        plgpu.commit_smem()
        plgpu.barrier_arrive(scratch.exchanged)
        plgpu.wgmma(dv_acc, p, s.do.at[slot])
        plgpu.wgmma(dk_acc, ds, s.q.at[slot])
        plgpu.barrier_wait(scratch.exchanged)
        part = pl.run_scoped(
            lambda acc: _query_gradients(c, here, place, s, acc),
            accumulator(_dq_columns(c)),
        )
        plgpu.barrier_arrive(s.consumed.at[slot])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        out = scratch.dq.at[here.wg]
        out[...] = unscaled(x, part)
        plgpu.commit_smem()
        head, i = target(c, here, some, x, n)
        start, columns = i * c.block_q, pl.ds(0, c.H)
        if _split_rows(c):
            start += here.wg * ROWS
        else:
            columns = pl.ds(here.wg * _dq_columns(c), _dq_columns(c))
        result = dq.at[here.b, head, pl.ds(start, ROWS), columns]
        plgpu.copy_smem_to_gmem(out, result, reduction_op="add")

    each(c, some, visit)


def _scores(
    c: Cut,
    mine: Any,
    masked: bool,
    slot: jax.Array,
    x: Operands,
    s: Places,
    scores_acc: Any,
    dp_acc: Any,
) -> tuple[jax.Array, jax.Array]:
    """p^T and ds^T of this warpgroup's keys, in the operands' dtype."""
    plgpu.wgmma(scores_acc, s.k.at[mine], s.q.at[slot].transpose((1, 0)))
    plgpu.wgmma(dp_acc, s.v.at[mine], s.do.at[slot].transpose((1, 0)))
    raw = plgpu.wgmma_accumulator_load(scores_acc, wait_n=1)
    p, slope = probabilities(c, raw, masked, mine, slot, s)
    ds = score_gradients(c, p, slope, dp_acc[...], x, slot, s)
    return p.astype(c.dtype), ds.astype(c.dtype)


def _query_gradients(c: Cut, here: Here, ds: Any, s: Places, acc: Any) -> jax.Array:
    """This warpgroup's part of dq of a pair of blocks."""
    if _split_rows(c):
        ds, k = ds.at[here.wg], s.k
    else:
        ds, k = ds.at[0], s.k.at[:, pl.ds(here.wg * _dq_columns(c), _dq_columns(c))]
    plgpu.wgmma(acc, ds.transpose((1, 0)), k)
    return acc[...]
