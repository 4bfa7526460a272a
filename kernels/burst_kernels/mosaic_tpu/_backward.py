"""Backward tile: dq, dk and dv from one pass over the scores (FlashAttention-2, Alg. 2).

The grid walks (sequence, kv head, active pair of blocks, query head of the kv head); pairs lie
in the order of their key block, so a key block stays while its queries pass:

    for each block of keys                    k, v fetched once; dk, dv stay in VMEM
      for each active block of queries,
      for each query head of the kv head      q, do, lse, delta come one step ahead
        scores^T, p^T      dv += p^T do
        dp^T = v do^T      ds^T              dk += ds^T q
        dq^T = k^T ds^T, turned               its block of dq comes from HBM one step ahead, and
                                              goes back under the next step (`_accumulate`)
      dk, dv written

So k and v are never repeated for the heads that share them, dk and dv of a kv head are summed
where they lie, and memory beyond operands and results is a few blocks of VMEM. Sequences and kv
heads are shared out to the two cores of a chip that has two.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int32

from burst_kernels._config import TileConfig
from burst_kernels._problem import problem_of
from burst_kernels._tile import EMPTY, FULL, PARTIAL, Onto, Tile
from burst_kernels.mosaic_tpu._accumulate import Accumulator, Turn, Visit
from burst_kernels.mosaic_tpu._active import Active
from burst_kernels.mosaic_tpu._config import MAX_STEPS, chip_name, refuses
from burst_kernels.mosaic_tpu._config_backward import configure_backward
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
from burst_kernels.mosaic_tpu._scores import PLAIN, matmul
from burst_kernels.mosaic_tpu._split import by_queries


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
    """Gradients of one tile, given the whole row's lse and delta. See the tile contract."""
    g, config = _sizes(q, k, v, tile, config or TileConfig())
    rows = tile.queries(g.t).positions.shape[0] if tile.masked else 1
    if rows > 1 and rows * g.num_q * g.num_kv > MAX_STEPS:
        return _by_sequence((q, k, v, do, lse, delta), tile, config, onto)
    dq, dk, dv = onto or (None, None, None)
    x = Operands(q, k, v, do, lse[:, :, None], delta[:, :, None], dq=dq, dk=dk, dv=dv)
    if config.fused_backward:
        # Under vmap, one after the other: no block spec of a vmapped call leaves dq in HBM.
        leaves, tree = jax.tree.flatten((x, tile))

        @jax.custom_batching.sequential_vmap
        def fused(*leaves: Array) -> tuple[Array, ...]:
            x, tile = jax.tree.unflatten(tree, leaves)
            return by_keys(x, tile, g, config=config, with_dq=True)

        dk, dv, dq = fused(*leaves)
        return dq, dk, dv
    dk, dv = by_keys(x._replace(dq=None), tile, g, config=config, with_dq=False)
    return by_queries(x, tile, g, config=config), dk, dv


def _sizes(
    q: Array, k: Array, v: Array, tile: Tile, config: TileConfig
) -> tuple[Geometry, TileConfig]:
    """The sizes of a call, checked: what the config leaves open is chosen."""
    problem, chip = problem_of(q, k, v, tile), chip_name(config)
    if (reason := refuses(problem, chip)) is not None:
        raise NotImplementedError(reason)
    config = dataclasses.replace(configure_backward(problem, chip, config), chip=chip)
    assert config.block_q_backward and config.block_kv_backward and config.block_compute_backward
    sizes = {name: getattr(problem, name) for name in ("B", "t", "s", "N", "K", "H", "Hv")}
    g = Geometry(
        **sizes,
        block_q=config.block_q_backward,
        block_kv=config.block_kv_backward,
        block_compute=config.block_compute_backward,
    )
    return g, config


def _by_sequence(arrays: tuple, tile: Tile, config: TileConfig, onto: Onto | None) -> tuple:
    """One sequence after the other: where the lists of all of them overflow scalar memory."""

    def one(n: Int32[Array, ""]) -> tuple:
        def row(x: Array, axis: int = 0) -> Array:
            return x if x.shape[axis] == 1 else jax.lax.dynamic_slice_in_dim(x, n, 1, axis)

        def of_kinds(x: Array | None) -> Array | None:
            return None if x is None else row(x, 1)

        (q, k, v, do, lse, delta), before = jax.tree.map(row, (arrays, onto))
        of_row = dataclasses.replace(
            tile,
            q_positions=jax.tree.map(row, tile.q_positions),
            kv_positions=jax.tree.map(row, tile.kv_positions),
            q_segments=of_kinds(tile.q_segments),
            kv_segments=of_kinds(tile.kv_segments),
        )
        found = tile_backward(q, k, v, do, lse, delta, of_row, config, before)
        return jax.tree.map(lambda x: x[0], found)

    return jax.lax.map(one, jnp.arange(arrays[0].shape[0], dtype=jnp.int32))


def by_keys(
    x: Operands, tile: Tile, g: Geometry, *, config: TileConfig, with_dq: bool
) -> tuple[Float[Array, "..."], ...]:
    """dk, dv and, where asked for, dq.

    Args:
        x: operands, yet without masks.
        tile: the mask, and how scores are made.
        g: sizes.
        config: for the chip, and whether to interpret.
        with_dq: whether dq is made too: the fused kernel.
    """
    cover = x.dk is None or x.dv is None
    active, q_mask, kv_mask = active_steps(g, tile, x.q, "kv", cover=cover)
    fresh = x.dq is None
    if with_dq and fresh and q_mask is not None:
        # Steps are listed by key blocks: a block of queries that sees none of them has no step.
        x = x._replace(dq=jnp.zeros_like(x.q, dtype=jnp.float32))
    x = x._replace(q_mask=q_mask, kv_mask=kv_mask)

    def place(b, h, n, head, steps) -> Place:
        step = active.at(steps, n)
        batch = b if active.rows == 1 else step.row
        return Place(batch, step.row, h * g.G + head, h, step.i, step.j)

    results = dict(dk=x.k, dv=x.v) | (dict(dq=x.q) if with_dq else {})
    found = launch(
        functools.partial(
            _backward_kernel,
            tile=tile,
            g=g,
            active=active,
            with_dq=with_dq,
            fresh=fresh,
            whole_tiles=not config.interpret,
        ),
        active,
        x,
        results,
        grid=(g.B if active.rows == 1 else 1, g.K, active.count, g.G),
        specs=block_specs(g, x, place) | dict(dq=pl.BlockSpec(memory_space=pl.ANY)),
        scratch=Accumulator.scratch(g.block_q, g.H) if with_dq else [],
        config=config,
        cost=_cost(g, x.q.dtype.itemsize, with_dq),
        name="burst_backward" if with_dq else "burst_backward_dkv",
    )
    return tuple(found)


def _cost(g: Geometry, itemsize: int, with_dq: bool) -> pl.CostEstimate:
    """Queries pass once for each block of keys, and float32 dq goes both ways with them."""
    queries = g.B * g.N * g.t * ((g.H + g.Hv) * itemsize + 8 * g.H * with_dq)
    keys = g.B * g.K * g.s * (g.H + g.Hv) * (itemsize + 4)
    return cost(g, 2 * (g.H + g.Hv) + g.H * with_dq, queries * g.num_kv + keys)


def _backward_kernel(
    steps,
    x: Operands,
    dk,
    dv,
    *rest,
    tile: Tile,
    g: Geometry,
    active: Active,
    with_dq: bool,
    fresh: bool,
    whole_tiles: bool,
) -> None:
    """One active pair of blocks, for one query head. `rest`: dq and its scratch."""
    n, head = pl.program_id(2), pl.program_id(3)
    step = active.at(steps, n)

    @pl.when((step.first_of_kv == 1) & (head == 0))
    def begin() -> None:
        dk[...] = jnp.zeros(dk.shape, dk.dtype)
        dv[...] = jnp.zeros(dv.shape, dv.dtype)

    turn = _turn(steps, active, g, fresh)
    dq = Accumulator(*rest, t=g.t, whole_tiles=whole_tiles) if with_dq else None
    here = None if dq is None else dq.open(turn)

    def accumulate(*, masked: bool) -> None:
        dq_columns = []
        for part in parts(g, x, tile, step.i, step.j, masked=masked):
            dv[part.keys, :] += matmul(part.p, part.do, PLAIN)
            dk[part.keys, :] += matmul(part.ds, part.q, PLAIN)
            if dq is not None:
                dq_columns.append(part.dq_columns())
        if dq is not None:
            dq.buffers[here] += functools.reduce(jnp.add, dq_columns).T * tile.scale

    pl.when(step.kind == FULL)(lambda: accumulate(masked=False))
    if x.q_mask is not None:
        pl.when(step.kind == PARTIAL)(lambda: accumulate(masked=True))

    if dq is not None and here is not None:
        dq.close(turn, here)

    @pl.when((step.last_of_kv == 1) & (head == g.G - 1))
    def end() -> None:
        dk[...] = dk[...] * tile.scale + (0.0 if x.dk is None else x.dk[...])
        if x.dv is not None:
            dv[...] += x.dv[...]


def _turn(steps, active: Active, g: Geometry, fresh: bool) -> Turn:
    """What this step, the one before and the one after add to dq."""
    b, h, n, head = (pl.program_id(axis) for axis in range(4))
    count = pl.num_programs(2)

    def visit(n, head) -> Visit:
        step = active.at(steps, n)
        batch = b if active.rows == 1 else step.row
        from_zero = (step.first_of_q == 1) if fresh else jnp.bool_(False)
        return Visit(batch, h * g.G + head, step.i, step.kind != EMPTY, from_zero)

    at_first_head, at_last_head = head == 0, head == g.G - 1
    before = visit(
        jnp.where(at_first_head, jnp.maximum(n - 1, 0), n),
        jnp.where(at_first_head, g.G - 1, head - 1),
    )
    after = visit(
        jnp.where(at_last_head, jnp.minimum(n + 1, count - 1), n),
        jnp.where(at_last_head, 0, head + 1),
    )
    first, last = (n == 0) & at_first_head, (n == count - 1) & at_last_head
    return Turn(before, visit(n, head), after, first, last)
