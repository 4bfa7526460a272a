"""Backward kernel for Hopper: dk and dv of a block of keys, and its part of dq, in one pass.

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
                  dq part = ds k                        each warpgroup one half of it
                  -> [consumed]
                  dq part -> shared memory -> added to dq in global memory by TMA
    store       dk, dv (and what was found before) -> shared memory -> global memory

We differ in that blocks come from a list (`_active`), FULL ones first, so that no mask known only
as data costs what its EMPTY blocks would; in that the query heads of a kv head are summed in
registers; and in that score gradients of float16 are kept in its range by a power of two. CTAs add
to dq in no fixed order: its last bits may differ from run to run.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from burst_kernels.mosaic_gpu._active import Marks, visible
from burst_kernels.mosaic_gpu._memory import registers, scalar
from burst_kernels.mosaic_gpu._scores import Scores

# Compute warpgroups of a CTA, and the rows that one `wgmma` of a warpgroup has.
WARPGROUPS = 2
ROWS = 64
# Registers a thread: 2 x 240 + 24 <= 504, what three warpgroups have.
_REGISTERS_COMPUTE, _REGISTERS_LOAD = 240, 24


class Cut(NamedTuple):
    """The static geometry of one call.

    Attributes:
        batch, kv_heads, heads_per_kv: B, K, G.
        t, s: padded to whole blocks.
        block_q: queries in a block; a block of keys has WARPGROUPS * ROWS.
        stages: blocks of queries in flight.
        H, Hv: head dims.
        shared_rows: whether all sequences share the rows of the mask.
        scores: how scores are made.
        marks: rows of the marks; None: no mask.
        dtype: of q, k, v and do.
    """

    batch: int
    kv_heads: int
    heads_per_kv: int
    t: int
    s: int
    block_q: int
    stages: int
    H: int
    Hv: int
    shared_rows: bool
    scores: Scores
    marks: Marks | None
    dtype: Any

    @property
    def block_kv(self) -> int:
        """Keys in a block."""
        return WARPGROUPS * ROWS

    @property
    def split_rows(self) -> bool:
        """Whether the warpgroups share dq of a pair of blocks by queries, not by columns."""
        return self.block_q == WARPGROUPS * ROWS

    @property
    def dq_part(self) -> tuple[int, int]:
        """Queries and columns of dq that one warpgroup makes of a pair of blocks."""
        return (ROWS, self.H) if self.split_rows else (self.block_q, self.H // WARPGROUPS)


class Operands(NamedTuple):
    """What the kernel reads. None: not needed.

    Attributes:
        q, k, v, do: [B, N, t, H], [B, K, s, H], [B, K, s, Hv], [B, N, t, Hv].
        bound: lse in units of 1 / factor, +inf where a row takes no part, [B, N, t].
        delta: [B, N, t], times powers[0].
        blocks, counts: `_active.Active` of the blocks of keys.
        q_marks, kv_marks: [b, U, t], [b, W, s].
        powers: float16 only, [2]: factor on score gradients that keeps them in range, its inverse.
        dk, dv: gradients found before, float32.
    """

    q: Any
    k: Any
    v: Any
    do: Any
    bound: Any
    delta: Any
    blocks: Any = None
    counts: Any = None
    q_marks: Any = None
    kv_marks: Any = None
    powers: Any = None
    dk: Any = None
    dv: Any = None


class Scratch(NamedTuple):
    """Shared memory and barriers of a CTA; leading axis: slots, or warpgroups."""

    k: Any
    v: Any
    q: Any
    do: Any
    bound: Any
    delta: Any
    ds: Any
    out: Any
    q_marks: Any
    kv_marks: Any
    resident: Any
    loaded: Any
    consumed: Any
    exchanged: Any
    before: Any


def _scratch(c: Cut) -> Scratch:
    def tiled(*shape: int, dtype: Any = c.dtype) -> Any:
        width = 128 // jnp.dtype(dtype).itemsize  # a swizzled row has 128 bytes
        tiling = plgpu.TilingTransform((8, width))
        return plgpu.SMEM(shape, dtype, transforms=(tiling, plgpu.SwizzleTransform(128)))

    masked = c.marks is not None
    return Scratch(
        k=tiled(c.block_kv, c.H),
        v=tiled(c.block_kv, c.Hv),
        q=tiled(c.stages, c.block_q, c.H),
        do=tiled(c.stages, c.block_q, c.Hv),
        bound=plgpu.SMEM((c.stages, c.block_q), jnp.float32),
        delta=plgpu.SMEM((c.stages, c.block_q), jnp.float32),
        ds=tiled(2, c.block_q // ROWS, c.block_kv, ROWS),
        out=tiled(WARPGROUPS, *c.dq_part, dtype=jnp.float32),
        q_marks=plgpu.SMEM((c.stages, c.marks.query_rows, c.block_q), jnp.int32)
        if masked
        else None,
        kv_marks=plgpu.SMEM((c.marks.key_rows, c.block_kv), jnp.int32) if masked else None,
        resident=plgpu.Barrier(num_arrivals=3 if masked else 2),
        loaded=plgpu.Barrier(num_arrivals=5 if masked else 4, num_barriers=c.stages),
        consumed=plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=c.stages),
        exchanged=plgpu.Barrier(num_arrivals=WARPGROUPS),
        before=plgpu.Barrier(num_barriers=WARPGROUPS),
    )


class _Here(NamedTuple):
    """Where a warpgroup is: warpgroup, block of keys, kv head, sequence, row of the mask."""

    wg: jax.Array
    j: jax.Array
    kv_head: jax.Array
    b: jax.Array
    row: jax.Array


class _Visits(NamedTuple):
    """The pairs of blocks of one class that a CTA visits, each for all query heads.

    Attributes:
        first, count: of the list of blocks.
        before: visits made before these.
        masked: whether the mask is needed.
    """

    first: jax.Array
    count: jax.Array
    before: jax.Array
    masked: bool


def backward_kv(
    c: Cut, operands: Operands, dq: Any, out_type: Callable[..., Any]
) -> tuple[jax.Array, jax.Array]:
    """dk and dv; the part of dq is added to `dq`, a `jax.Ref`.

    Args:
        c: the geometry.
        operands: see there.
        dq: a `jax.Ref` [B, N, t, H], float32.
        out_type: (shape) -> float32 type of a result.
    """

    def kernel(x: Operands, dq: Any, dk: Any, dv: Any, s: Scratch) -> None:
        b = lax.axis_index("batch")
        here = _Here(
            wg=lax.axis_index("wg"),
            j=lax.axis_index("block"),
            kv_head=lax.axis_index("head"),
            b=b,
            row=jnp.zeros_like(b) if c.shared_rows else b,
        )

        @pl.when(here.wg == WARPGROUPS)
        def _load():
            plgpu.set_max_registers(_REGISTERS_LOAD, action="decrease")
            _load_keys(c, here, x, s)
            for visits in _visits(c, here, x):
                _load_queries(c, here, visits, x, s)

        @pl.when(here.wg < WARPGROUPS)
        def _compute():
            plgpu.set_max_registers(_REGISTERS_COMPUTE, action="increase")

            def accumulate(dk_acc, dv_acc):
                plgpu.barrier_wait(s.resident)
                for visits in _visits(c, here, x):
                    _visit_queries(c, here, visits, x, s, dq, dk_acc, dv_acc)
                return dk_acc[...], dv_acc[...]

            dk_sum, dv_sum = pl.run_scoped(
                accumulate,
                plgpu.ACC((ROWS, c.H), jnp.float32),
                plgpu.ACC((ROWS, c.Hv), jnp.float32),
            )
            scale = jnp.float32(c.scores.scale)
            if x.powers is not None:
                dk_sum = dk_sum * _power(x, 1)
            _store(c, here, dk_sum * scale, x.dk, dk, s)
            _store(c, here, dv_sum, x.dv, dv, s)

    dk, dv = plgpu.kernel(
        kernel,
        out_type=[
            out_type((c.batch, c.kv_heads, c.s, c.H)),
            out_type((c.batch, c.kv_heads, c.s, c.Hv)),
        ],
        scratch_types=[_scratch(c)],
        # Blocks of one head lie side by side in time: what they read is then in the L2 cache.
        grid=(c.s // c.block_kv, c.kv_heads, c.batch),
        grid_names=("block", "head", "batch"),
        num_threads=WARPGROUPS + 1,
        thread_name="wg",
        kernel_name="burst_backward",
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(operands, dq)
    return dk, dv


def _visits(c: Cut, here: _Here, x: Operands) -> Iterator[_Visits]:
    """FULL pairs of blocks, then PARTIAL ones."""
    zero = jnp.zeros_like(here.j)
    if c.marks is None:
        yield _Visits(zero, jnp.int32(c.t // c.block_q), zero, False)
        return
    full, active = (scalar(x.counts, here.row, here.j, i) for i in (0, 1))
    yield _Visits(zero, full, zero, False)
    yield _Visits(full, active - full, full * c.heads_per_kv, True)


def _each(c: Cut, visits: _Visits, body: Callable[[jax.Array, jax.Array], None]) -> None:
    """Runs `body(n, slot)` for every visit, n from 0; the slots of all visits go round."""

    @pl.loop(jnp.zeros_like(visits.count), visits.count * c.heads_per_kv)
    def _(n):
        body(n, lax.rem(visits.before + n, jnp.int32(c.stages)))


def _target(
    c: Cut, here: _Here, visits: _Visits, x: Operands, n: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Query head and block of queries of a visit."""
    m = lax.rem(n, visits.count)
    head = here.kv_head * c.heads_per_kv + lax.div(n, visits.count)
    return head, m if x.blocks is None else scalar(x.blocks, here.row, here.j, visits.first + m)


def _load_keys(c: Cut, here: _Here, x: Operands, s: Scratch) -> None:
    keys = pl.ds(here.j * c.block_kv, c.block_kv)
    plgpu.copy_gmem_to_smem(x.k.at[here.b, here.kv_head, keys], s.k, s.resident)
    plgpu.copy_gmem_to_smem(x.v.at[here.b, here.kv_head, keys], s.v, s.resident)
    if c.marks is not None:
        plgpu.copy_gmem_to_smem(x.kv_marks.at[here.row, :, keys], s.kv_marks, s.resident)


def _load_queries(c: Cut, here: _Here, visits: _Visits, x: Operands, s: Scratch) -> None:
    def load(n: jax.Array, slot: jax.Array) -> None:
        head, i = _target(c, here, visits, x, n)
        at = (here.b, head, pl.ds(i * c.block_q, c.block_q))
        loaded = s.loaded.at[slot]

        @pl.when(visits.before + n >= c.stages)
        def _():
            plgpu.barrier_wait(s.consumed.at[slot])

        for source, place in ((x.q, s.q), (x.do, s.do), (x.bound, s.bound), (x.delta, s.delta)):
            plgpu.copy_gmem_to_smem(source.at[at], place.at[slot], loaded)
        if c.marks is not None:
            marks = x.q_marks.at[here.row, :, at[2]]
            plgpu.copy_gmem_to_smem(marks, s.q_marks.at[slot], loaded)

    _each(c, visits, load)


def _visit_queries(
    c: Cut,
    here: _Here,
    visits: _Visits,
    x: Operands,
    s: Scratch,
    dq: Any,
    dk_acc: Any,
    dv_acc: Any,
) -> None:
    # The invariant: all products of earlier visits are finished, their slots given back, and this
    # warpgroup's part of dq is on its way to global memory at the latest.
    def visit(n: jax.Array, slot: jax.Array) -> None:
        plgpu.barrier_wait(s.loaded.at[slot])
        p, ds = pl.run_scoped(
            lambda *accs: _score_gradients(c, here, visits.masked, slot, x, s, *accs),
            plgpu.ACC((ROWS, c.block_q), jnp.float32),
            plgpu.ACC((ROWS, c.block_q), jnp.float32),
        )
        # Two places for ds, so that the other warpgroup may still be reading the last one.
        mine, place = pl.ds(here.wg * ROWS, ROWS), lax.rem(visits.before + n, jnp.int32(2))
        for part in range(c.block_q // ROWS):
            s.ds[place, part, mine] = ds[:, part * ROWS : (part + 1) * ROWS]
        plgpu.commit_smem()
        plgpu.barrier_arrive(s.exchanged)
        plgpu.wgmma(dv_acc, p, s.do.at[slot])
        plgpu.wgmma(dk_acc, ds, s.q.at[slot])
        plgpu.barrier_wait(s.exchanged)
        part = pl.run_scoped(
            lambda acc: _query_gradients(c, here, place, s, acc),
            plgpu.ACC(c.dq_part, jnp.float32),
        )
        plgpu.barrier_arrive(s.consumed.at[slot])
        if x.powers is not None:
            part = part * _power(x, 1)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        s.out[here.wg] = part * jnp.float32(c.scores.scale)
        plgpu.commit_smem()
        head, i = _target(c, here, visits, x, n)
        rows, columns = c.dq_part
        start = i * c.block_q
        at = (pl.ds(start, rows), pl.ds(here.wg * columns, columns))
        if c.split_rows:
            at = (pl.ds(start + here.wg * ROWS, ROWS), slice(None))
        plgpu.copy_smem_to_gmem(s.out.at[here.wg], dq.at[here.b, head, *at], reduction_op="add")

    _each(c, visits, visit)


def _score_gradients(
    c: Cut,
    here: _Here,
    masked: bool,
    slot: jax.Array,
    x: Operands,
    s: Scratch,
    scores_acc: Any,
    dp_acc: Any,
) -> tuple[jax.Array, jax.Array]:
    """p^T and ds^T of this warpgroup's keys, in the operands' dtype."""
    mine = pl.ds(here.wg * ROWS, ROWS)
    plgpu.wgmma(scores_acc, s.k.at[mine], s.q.at[slot].transpose((1, 0)))
    plgpu.wgmma(dp_acc, s.v.at[mine], s.do.at[slot].transpose((1, 0)))
    scores = c.scores.capped(plgpu.wgmma_accumulator_load(scores_acc, wait_n=1))
    slope = c.scores.cap_slope(scores)
    if masked:
        scores = jnp.where(_seen(c, here, slot, s), scores, -jnp.inf)
    p = c.scores.probability(scores, _of_queries(s.bound.at[slot]), axis=1)
    dp = dp_acc[...]
    if x.powers is not None:
        dp = dp * _power(x, 0)
    ds = p * (dp - lax.broadcast_in_dim(_of_queries(s.delta.at[slot]), dp.shape, (1,)))
    if slope is not None:
        ds = ds * slope
    return p.astype(c.dtype), ds.astype(c.dtype)


def _query_gradients(c: Cut, here: _Here, place: jax.Array, s: Scratch, acc: Any) -> jax.Array:
    """This warpgroup's half of dq of a pair of blocks, without scale."""
    if c.split_rows:
        ds, k = s.ds.at[place, here.wg], s.k
    else:
        ds, k = s.ds.at[place, 0], s.k.at[:, pl.ds(here.wg * c.dq_part[1], c.dq_part[1])]
    plgpu.wgmma(acc, ds.transpose((1, 0)), k)
    return acc[...]


def _seen(c: Cut, here: _Here, slot: jax.Array, s: Scratch) -> jax.Array:
    q = [_of_queries(s.q_marks.at[slot, u]) for u in range(c.marks.query_rows)]
    mine = pl.ds(here.wg * ROWS, ROWS)
    kv = [_of_keys(s.kv_marks.at[w, mine]) for w in range(c.marks.key_rows)]
    return visible(c.marks, tuple(q), tuple(kv), (ROWS, c.block_q), q_axis=1)


def _power(x: Operands, i: int) -> jax.Array:
    return x.powers[i] * jnp.float32(1.0)


def _of_queries(x: Any) -> jax.Array:
    """A vector along the second axis of an accumulator."""
    return registers(x, plgpu.Layout.WGMMA.reduce(0))


def _of_keys(x: Any) -> jax.Array:
    """A vector along the first axis of an accumulator."""
    return registers(x, plgpu.Layout.WGMMA.reduce(1))


def _store(c: Cut, here: _Here, total: jax.Array, found: Any, result: Any, s: Scratch) -> None:
    """Writes this warpgroup's rows of dk or dv, in columns that fit the place of a part of dq."""
    rows, width = c.dq_part
    keys = pl.ds(here.j * c.block_kv + here.wg * ROWS, ROWS)
    place, before = s.out.at[here.wg], s.before.at[here.wg]
    for start in range(0, total.shape[1], width):
        columns = pl.ds(start, width)
        part = total[:, start : start + width]
        plgpu.wait_smem_to_gmem(0)
        if found is not None:
            plgpu.copy_gmem_to_smem(found.at[here.b, here.kv_head, keys, columns], place, before)
            plgpu.barrier_wait(before)
            part = part + place[...]
        place[...] = part
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(place, result.at[here.b, here.kv_head, keys, columns])
    plgpu.wait_smem_to_gmem(0)
