"""dq alone: with dk and dv from a kernel of their own, for where the fused one does not fit.

    for each block of queries               q, do, lse, delta fetched once; dq stays in VMEM
      for each active block of keys         k, v come one step ahead
        scores^T, p^T, dp^T, ds^T           dq^T = k^T ds^T, turned
      dq written

The scores are made twice, once here and once for dk and dv: seven products instead of five.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from burst_kernels._config import TileConfig
from burst_kernels._tile import FULL, PARTIAL, Tile
from burst_kernels.mosaic_tpu._active import Active
from burst_kernels.mosaic_tpu._gradients import (
    Geometry,
    Operands,
    Place,
    active_steps,
    block_specs,
    cost,
    launch,
    parts,
)


def by_queries(
    x: Operands, tile: Tile, g: Geometry, *, config: TileConfig
) -> Float[Array, "B N t H"]:
    """dq.

    Args:
        x: operands, yet without masks.
        tile: the mask, and how scores are made.
        g: sizes.
        config: for the chip, and whether to interpret.
    """
    active, q_mask, kv_mask = active_steps(g, tile, x.q, "q", cover=x.dq is None)
    x = x._replace(q_mask=q_mask, kv_mask=kv_mask, dk=None, dv=None)

    def place(b, head, n, steps) -> Place:
        step = active.at(steps, n)
        batch = b if active.rows == 1 else step.row
        return Place(batch, step.row, head, jax.lax.div(head, jnp.int32(g.G)), step.i, step.j)

    (dq,) = launch(
        functools.partial(_dq_kernel, tile=tile, g=g, active=active),
        active,
        x,
        dict(dq=x.q),
        grid=(g.B if active.rows == 1 else 1, g.N, active.count),
        specs=block_specs(g, x, place),
        scratch=[],
        config=config,
        cost=_cost(g, x.q.dtype.itemsize),
        name="burst_backward_dq",
    )
    return dq


def _cost(g: Geometry, itemsize: int) -> pl.CostEstimate:
    """Keys pass once for each block of queries."""
    queries = g.B * g.N * g.t * ((g.H + g.Hv) * itemsize + 4 * g.H)
    keys = g.B * g.N * g.s * (g.H + g.Hv) * itemsize
    return cost(g, 2 * g.H + g.Hv, queries + keys * g.num_q)


def _dq_kernel(
    steps: jax.Ref, x: Operands, dq: jax.Ref, *, tile: Tile, g: Geometry, active: Active
) -> None:
    """One active pair of blocks, for one query head."""
    step = active.at(steps, pl.program_id(2))

    @pl.when(step.first_of_q == 1)
    def begin() -> None:
        dq[...] = jnp.zeros(dq.shape, dq.dtype)

    def accumulate(*, masked: bool) -> None:
        columns = [p.dq_columns() for p in parts(g, x, tile, step.i, step.j, masked=masked)]
        dq[...] += functools.reduce(jnp.add, columns).T

    pl.when(step.kind == FULL)(lambda: accumulate(masked=False))
    if x.q_mask is not None:
        pl.when(step.kind == PARTIAL)(lambda: accumulate(masked=True))

    @pl.when(step.last_of_q == 1)
    def end() -> None:
        dq[...] = dq[...] * tile.scale + (0.0 if x.dq is None else x.dq[...])
