"""Backward kernel for Hopper, head dims to 256: dk, dv of 64 keys and their part of dq at once.

From head dim 129 on a float32 dk or dv of 64 keys takes over 64 registers a thread, so one
warpgroup cannot hold both, as in `_backward_kv`. Each has a role, and both make the probabilities,
for six products in place of five, three a warpgroup:

    values      for each (query head, active block of queries)
                  [loaded]
                  scores^T = k q^T, p                   dv += p^T do
                  [ready] -> dq part = ds k -> [free]   by 64 columns
                  dq part -> shared memory -> added to dq in global memory by TMA
                  -> [consumed]
    gradients   [loaded]
                  scores^T = k q^T, dp^T = v do^T, p, ds
                  [free] -> ds -> shared memory -> [ready]
                  dk += ds^T q
                  -> [consumed]

The third warpgroup loads.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from burst_kernels.mosaic_gpu._backward_blocks import (
    ROWS,
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

# Columns of dq made at once, as many as shared memory swizzles together in 16 bit; and written.
_COLUMNS, _WRITTEN = 64, 32
_ALL = pl.ds(0, ROWS)


class Scratch(NamedTuple):
    """What the roles exchange.

    Attributes:
        ds: ds^T.
        ready, free: it has been written; it has been read.
        dq: columns of a part of dq on their way out, two in turn.
    """

    ds: Any
    ready: Any
    free: Any
    dq: Any


def backward_wide(
    c: Cut, operands: Operands, dq: Any, out_type: Callable[..., Any]
) -> tuple[jax.Array, jax.Array]:
    """dk and dv; dq is added to. See `_backward_blocks.call`."""
    assert c.block_q == c.block_kv == ROWS

    def compute(
        here: Here, x: Operands, dq: Any, dk: Any, dv: Any, s: Places, scratch: Scratch
    ) -> None:
        keys = pl.ds(here.j * ROWS, ROWS)
        plgpu.barrier_wait(s.resident)

        def summed(visit: Callable[..., None], width: int, *more: Any) -> jax.Array:
            def accumulate(acc: Any) -> jax.Array:
                for some in visits(c, here, x):
                    visit(c, here, some, x, s, scratch, acc, *more)
                return acc[...]

            return pl.run_scoped(accumulate, accumulator(width))

        @pl.when(here.wg == 0)
        def _values():
            store(here, keys, summed(_visit_for_values, c.Hv, dq), x.dv, dv)
            plgpu.wait_smem_to_gmem(0)

        @pl.when(here.wg == 1)
        def _gradients():
            store(here, keys, unscaled(x, summed(_visit_for_gradients, c.H)), x.dk, dk)

    scratch = Scratch(
        ds=tiled(c.dtype, ROWS, ROWS),
        ready=plgpu.Barrier(),
        free=plgpu.Barrier(),
        dq=tiled(jnp.float32, 2, ROWS, _WRITTEN),
    )
    return call(c, compute, scratch, operands, dq, out_type)


def _visit_for_values(
    c: Cut, here: Here, some: Visits, x: Operands, s: Places, scratch: Scratch, dv_acc: Any, dq: Any
) -> None:
    def visit(n: jax.Array, slot: jax.Array) -> None:
        plgpu.barrier_wait(s.loaded.at[slot])

        def scores(acc: Any) -> jax.Array:
            plgpu.wgmma(acc, s.k, s.q.at[slot].transpose((1, 0)))
            return acc[...]

        raw = pl.run_scoped(scores, accumulator(c.block_q))
        p, _ = probabilities(c, raw, some.masked, _ALL, slot, s)
        plgpu.wgmma(dv_acc, p.astype(c.dtype), s.do.at[slot])
        head, i = target(c, here, some, x, n)
        plgpu.barrier_wait(scratch.ready)
        for start in range(0, c.H, _COLUMNS):
            part = pl.run_scoped(
                lambda acc, start=start: _query_gradients(start, s, scratch, acc),
                accumulator(_COLUMNS),
            )
            part = unscaled(x, part)
            for half in range(_COLUMNS // _WRITTEN):
                out, columns = scratch.dq.at[half], pl.ds(start + half * _WRITTEN, _WRITTEN)
                plgpu.wait_smem_to_gmem(1, wait_read_only=True)
                out[...] = part[:, half * _WRITTEN : (half + 1) * _WRITTEN]
                plgpu.commit_smem()
                result = dq.at[here.b, head, pl.ds(i * ROWS, ROWS), columns]
                plgpu.copy_smem_to_gmem(out, result, reduction_op="add")
        # All products are finished, and all threads have passed a `commit_smem` since they read.
        plgpu.barrier_arrive(scratch.free)
        plgpu.barrier_arrive(s.consumed.at[slot])

    each(c, some, visit)


def _query_gradients(start: int, s: Places, scratch: Scratch, acc: Any) -> jax.Array:
    """Columns of dq of a pair of blocks."""
    columns = s.k.at[:, pl.ds(start, _COLUMNS)]
    plgpu.wgmma(acc, scratch.ds.transpose((1, 0)), columns)
    return acc[...]


def _visit_for_gradients(
    c: Cut, here: Here, some: Visits, x: Operands, s: Places, scratch: Scratch, dk_acc: Any
) -> None:
    def visit(n: jax.Array, slot: jax.Array) -> None:
        plgpu.barrier_wait(s.loaded.at[slot])

        def score_gradient(scores_acc: Any, dp_acc: Any) -> jax.Array:
            plgpu.wgmma(scores_acc, s.k, s.q.at[slot].transpose((1, 0)))
            plgpu.wgmma(dp_acc, s.v, s.do.at[slot].transpose((1, 0)))
            raw = plgpu.wgmma_accumulator_load(scores_acc, wait_n=1)
            p, slope = probabilities(c, raw, some.masked, _ALL, slot, s)
            return score_gradients(c, p, slope, dp_acc[...], x, slot, s).astype(c.dtype)

        ds = pl.run_scoped(score_gradient, accumulator(c.block_q), accumulator(c.block_q))

        @pl.when(some.before + n > 0)
        def _():
            plgpu.barrier_wait(scratch.free)

        scratch.ds[...] = ds
        plgpu.commit_smem()
        plgpu.barrier_arrive(scratch.ready)
        plgpu.wgmma(dk_acc, ds, s.q.at[slot])
        plgpu.wgmma_wait(0)
        plgpu.barrier_arrive(s.consumed.at[slot])

    each(c, some, visit)
