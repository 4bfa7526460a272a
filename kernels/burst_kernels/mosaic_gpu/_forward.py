"""Forward tile on Hopper: FlashAttention-3 (arXiv 2407.08608, Alg. 2) in Pallas Mosaic GPU.

One CTA computes `block_q` queries of one head with three warpgroups that share two rings of
`stages` buffers, one for k and one for v:

    load   (1 warpgroup, few registers)      attend   (2 warpgroups, block_q / 2 rows each)
    for each active block n of keys:         for each active block n of keys:
      wait   k_free[n]                         wait    k_ready[n], v_ready[n - 1], the own turn
      TMA    k -> ring, signals k_ready[n]     start   scores = q k[n]^T        (wgmma)
      wait   v_free[n]                         start   out += p v[n - 1]        (wgmma)
      TMA    v -> ring, signals v_ready[n]     signal  the other's turn
                                               wait    scores; signal k_free[n]
                                               softmax of the scores: new p, and what shrinks out
                                               wait    out; signal v_free[n - 1]
                                             out, lse: registers -> global memory

So the softmax of a block overlaps with the values of the one before it, and, since the attending
warpgroups take turns at starting products, with both products of the other warpgroup. The first
block has no values to multiply, the last block's are multiplied after the loop. A ring's n is taken
modulo `stages`.

We differ in that the blocks come from a list (`_active`), first those without a mask, so that no
mask known only as data costs what its EMPTY blocks would; in that the softmax starts from what the
ring has found before; and in that the scale is applied after the maximum is taken off.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from burst_kernels._chips import chip_at_hand
from burst_kernels._config import TileConfig
from burst_kernels._tile import Tile
from burst_kernels.mosaic_gpu._active import Marks, block_mask, visible, whole
from burst_kernels.mosaic_gpu._config import Blocks, blocks_of, configure, problem_of, refuses
from burst_kernels.mosaic_gpu._memory import registers, scalar
from burst_kernels.mosaic_gpu._scores import LN_2, Scores

_ATTENDING = 2  # warpgroups
# Registers of a thread, of 65536 / 384 = 168 each as launched: what FlashAttention-3 gives them.
_REGISTERS_ATTEND, _REGISTERS_LOAD = 240, 24

# Rows that TMA takes together, see `_scratch`; an array's tokens must be a multiple of them.
_TILE = 8

_WGMMA, _ROWS, _COLUMNS = (
    plgpu.Layout.WGMMA,
    plgpu.Layout.WGMMA.reduce(1),
    plgpu.Layout.WGMMA.reduce(0),
)


class Forward(NamedTuple):
    """All that is static about one forward kernel.

    Attributes:
        batch, heads, kv_heads: B, N, K.
        t, s: tokens.
        head_dim, value_dim: H and Hv, multiples of 64.
        dtype: of q, k and v.
        blocks: block sizes.
        scores: scale and soft cap.
        marks: what the mask compares; None: no mask.
        mask_per_sequence: False where all sequences share one mask.
        continued: whether there is something to merge with.
    """

    batch: int
    heads: int
    kv_heads: int
    t: int
    s: int
    head_dim: int
    value_dim: int
    dtype: Any
    blocks: Blocks
    scores: Scores
    marks: Marks | None
    mask_per_sequence: bool
    continued: bool

    @property
    def rows(self) -> int:
        """Queries of one warpgroup."""
        return self.blocks.block_q // _ATTENDING

    @property
    def num_q(self) -> int:
        return -(-self.t // self.blocks.block_q)

    @property
    def num_kv(self) -> int:
        return -(-self.s // self.blocks.block_kv)


class Refs(NamedTuple):
    """Global memory."""

    q: Any
    k: Any
    v: Any
    q_marks: Any = None
    kv_marks: Any = None
    active: Any = None
    counts: Any = None
    before_out: Any = None
    before_lse: Any = None
    out: Any = None
    lse: Any = None


class Running(NamedTuple):
    """Online softmax of a warpgroup's queries.

    Attributes:
        maximum: of each row's scores, in units of 1 / factor.
        total: sum of exp(score - maximum).
        out: sum of exp(score - maximum) v.
    """

    maximum: Float[Array, " r"]
    total: Float[Array, " r"]
    out: Float[Array, "r Hv"]


class Found(NamedTuple):
    """`Running`, but for the values of the last block.

    Attributes:
        shrink: factor that `out` is still to be multiplied with.
        p: exp(score - maximum) of the last block, still to be multiplied with its values.
    """

    maximum: Float[Array, " r"]
    total: Float[Array, " r"]
    out: Float[Array, "r Hv"]
    shrink: Float[Array, " r"]
    p: Float[Array, "r kv"]


@dataclasses.dataclass(frozen=True)
class Ring:
    """The rings of keys and values, as an attending warpgroup sees them."""

    me: Array
    stages: int
    k_smem: Any
    v_smem: Any
    k_ready: Any
    v_ready: Any
    k_free: Any
    v_free: Any
    turn: Any

    def slot(self, n: Array) -> Array:
        """Where the n-th active block lies."""
        return lax.rem(n, jnp.int32(self.stages))


Mask = Callable[[Array], Callable[[], Array]]


def tile_forward(
    q: Float[Array, "B N t H"],
    k: Float[Array, "B K s H"],
    v: Float[Array, "B K s Hv"],
    tile: Tile,
    config: TileConfig | None = None,
    onto: tuple[Float[Array, "B N t Hv"], Float[Array, "B N t"]] | None = None,
) -> tuple[Float[Array, "B N t Hv"], Float[Array, "B N t"]]:
    """Attention of t queries to s keys. See the tile contract in `burst_kernels._tile`."""
    config = config or TileConfig()
    problem, chip = problem_of(q, k, v, tile), config.chip or chip_at_hand().name
    if (reason := refuses(problem, chip)) is not None:
        raise NotImplementedError(f"mosaic_gpu refuses: {reason}")
    blocks = blocks_of(configure(problem, chip, config))
    (batch, heads, t, _), (_, kv_heads, s, value_dim) = q.shape, v.shape
    q, k, v = (whole(whole(x, 2, _TILE), 3, 64) for x in (q, k, v))
    mask = block_mask(tile, t, s, blocks.block_q, blocks.block_kv, like=q)
    f = Forward(
        batch=batch,
        heads=heads,
        kv_heads=kv_heads,
        t=t,
        s=s,
        head_dim=q.shape[-1],
        value_dim=v.shape[-1],
        dtype=q.dtype,
        blocks=blocks,
        scores=Scores.of(tile),
        marks=None if mask is None else mask.marks,
        mask_per_sequence=mask is not None and mask.q.shape[0] > 1,
        continued=onto is not None,
    )
    refs = {"q": q, "k": k, "v": v}
    if mask is not None:
        active = mask.keys_of_queries()
        refs |= {"q_marks": mask.q, "kv_marks": mask.kv}
        refs |= {"active": active.blocks, "counts": active.counts}
    if onto is not None:
        out, lse = onto
        refs |= {"before_out": whole(whole(out, 2, blocks.block_q), 3, 64)}
        refs |= {"before_lse": whole(lse, 2, blocks.block_q)}
    out, lse = _call(f, refs)
    return out[:, :, :t, :value_dim], lse[:, :, :t]


def _call(f: Forward, refs: dict[str, Array]) -> tuple[Array, Array]:
    """Runs the kernel; out and lse have rows for whole blocks of queries."""
    names = (*refs, "out", "lse")

    def forward_kernel(*args: Any, **scratch: Any) -> None:
        _kernel(f, Refs(**dict(zip(names, args, strict=True))), **scratch)

    rows = (f.batch, f.heads, f.num_q * f.blocks.block_q)
    varying = jax.typeof(refs["q"]).manual_axis_type
    out_type = [
        jax.ShapeDtypeStruct(shape, jnp.float32, manual_axis_type=varying)
        for shape in ((*rows, f.value_dim), rows)
    ]
    out, lse = plgpu.kernel(
        forward_kernel,
        out_type=out_type,
        scratch_types=_scratch(f),
        # The first is the fastest: CTAs that run together read the same keys.
        grid=(f.num_q, f.heads, f.batch),
        grid_names=("q_block", "head", "sequence"),
        num_threads=_ATTENDING + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(*refs.values())
    return out, lse


def _scratch(f: Forward) -> dict[str, Any]:
    """Shared memory and barriers."""
    # 8 rows of 128 bytes: what wgmma reads and TMA writes without bank conflicts.
    layout = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    stages, block_kv = f.blocks.stages, f.blocks.block_kv

    def buffer(*shape: int) -> Any:
        return plgpu.SMEM(shape, f.dtype, transforms=layout)

    return dict(
        q_smem=buffer(_ATTENDING, f.rows, f.head_dim),
        k_smem=buffer(stages, block_kv, f.head_dim),
        v_smem=buffer(stages, block_kv, f.value_dim),
        q_ready=plgpu.Barrier(num_barriers=_ATTENDING),
        k_ready=plgpu.Barrier(num_barriers=stages),
        v_ready=plgpu.Barrier(num_barriers=stages),
        k_free=plgpu.Barrier(num_arrivals=_ATTENDING, num_barriers=stages),
        v_free=plgpu.Barrier(num_arrivals=_ATTENDING, num_barriers=stages),
        turn=plgpu.Barrier(num_barriers=_ATTENDING),
    )


def _kernel(f: Forward, g: Refs, **scratch: Any) -> None:
    """One CTA: a block of queries of one head."""
    warpgroup = lax.axis_index("warpgroup")
    block, head, sequence = (lax.axis_index(x) for x in ("q_block", "head", "sequence"))
    row = sequence if f.mask_per_sequence else jnp.int32(0)
    if f.marks is None:
        full = total = jnp.int32(f.num_kv)
    else:
        full, total = (scalar(g.counts, row, block, i) for i in (0, 1))

    @pl.when(warpgroup == _ATTENDING)
    def load() -> None:
        plgpu.set_max_registers(_REGISTERS_LOAD, action="decrease")
        kv_head = lax.div(head, jnp.int32(f.heads // f.kv_heads))
        _load(f, g, (sequence, kv_head), (row, block), total, **_only(scratch, "k", "v"))

    @pl.when(warpgroup < _ATTENDING)
    def attend() -> None:
        plgpu.set_max_registers(_REGISTERS_ATTEND, action="increase")
        _attend(f, g, warpgroup, (sequence, head, block), row, full, total, **scratch)


def _only(scratch: dict[str, Any], *first: str) -> dict[str, Any]:
    return {name: ref for name, ref in scratch.items() if name.startswith(first)}


def _load(
    f: Forward,
    g: Refs,
    keys: tuple[Array, Array],
    queries: tuple[Array, Array],
    total: Array,
    *,
    k_smem: Any,
    v_smem: Any,
    k_ready: Any,
    v_ready: Any,
    k_free: Any,
    v_free: Any,
) -> None:
    """The loading warpgroup: each active block of keys, as soon as a slot is free."""
    stages, block_kv = f.blocks.stages, f.blocks.block_kv

    def step(n: Array, _: None) -> None:
        j = n if f.marks is None else scalar(g.active, *queries, n)
        slot = lax.rem(n, jnp.int32(stages))
        where = (*keys, pl.ds(j * block_kv, block_kv))
        for source, smem, ready, free in (
            (g.k, k_smem, k_ready, k_free),
            (g.v, v_smem, v_ready, v_free),
        ):
            pl.when(n >= stages)(functools.partial(plgpu.barrier_wait, free.at[slot]))
            plgpu.copy_gmem_to_smem(source.at[where], smem.at[slot], ready.at[slot])

    lax.fori_loop(jnp.int32(0), total, step, None)


def _attend(
    f: Forward,
    g: Refs,
    warpgroup: Array,
    where: tuple[Array, Array, Array],
    row: Array,
    full: Array,
    total: Array,
    *,
    q_smem: Any,
    q_ready: Any,
    **scratch: Any,
) -> None:
    """An attending warpgroup: its queries against all active blocks of keys."""
    sequence, head, block = where
    first = block * f.blocks.block_q + warpgroup * f.rows
    mine = (sequence, head, pl.ds(first, f.rows))
    q, ready = q_smem.at[warpgroup], q_ready.at[warpgroup]
    plgpu.copy_gmem_to_smem(g.q.at[mine], q, ready)
    marks = ()
    if f.marks is not None:
        rows = [g.q_marks.at[row, i, pl.ds(first, f.rows)] for i in range(f.marks.query_rows)]
        marks = tuple(registers(x, _ROWS) for x in rows)
    ring = Ring(warpgroup, f.blocks.stages, **scratch)
    # The first warpgroup has the first turn.
    pl.when(warpgroup == 1)(functools.partial(plgpu.barrier_arrive, ring.turn.at[0]))
    plgpu.barrier_wait(ready)

    def seen(n: Array) -> Callable[[], Array]:
        return _seen(f, g, marks, row, scalar(g.active, row, block, n))

    def visit(n: Array, found: Found, masked: bool) -> Found:
        return _visit_kernel(f, ring, n, found, q, seen if masked else None)

    @pl.when(total > 0)
    def some() -> None:
        # A mask on the first block, be it FULL, saves a copy of the code.
        maximum, total_, shrink, p = _first(
            f, ring, *_start(f, g, mine), q, None if f.marks is None else seen
        )
        # Read this late, and not kept for `none`, it takes no registers from the scores.
        found = Found(maximum, total_, _start_out(f, g, mine), shrink, p)
        ahead = lax.fori_loop(jnp.int32(1), full, functools.partial(visit, masked=False), found)
        if f.marks is not None:
            after = jnp.maximum(full, 1)
            ahead = lax.fori_loop(after, total, functools.partial(visit, masked=True), ahead)
        _finish(f, g, mine, _last(ring, ahead, total - 1))

    @pl.when(total == 0)
    def none() -> None:
        _finish(f, g, mine, Running(*_start(f, g, mine), _start_out(f, g, mine)))


def _first(
    f: Forward, ring: Ring, maximum: Array, total: Array, q: Any, mask: Mask | None
) -> tuple[Array, Array, Array, Array]:
    """Scores and probabilities of the first block: see `_softmax`."""
    seen = None if mask is None else mask(jnp.int32(0))
    plgpu.barrier_wait(ring.k_ready.at[0])
    plgpu.barrier_wait(ring.turn.at[ring.me])

    def scores(acc: Any) -> Array:
        plgpu.wgmma(acc, q, ring.k_smem.at[0].transpose((1, 0)))
        plgpu.barrier_arrive(ring.turn.at[1 - ring.me])
        return plgpu.wgmma_accumulator_load(acc, wait_n=0)

    shape = (f.rows, f.blocks.block_kv)
    raw = lax.optimization_barrier(pl.run_scoped(scores, plgpu.ACC(shape, jnp.float32)))
    plgpu.barrier_arrive(ring.k_free.at[0])
    *softmax, p = _softmax(f, raw, seen, maximum, total)
    return *softmax, p.astype(f.dtype)


def _visit_kernel(
    f: Forward, ring: Ring, n: Array, found: Found, q: Any, mask: Mask | None
) -> Found:
    """Scores and probabilities of the n-th active block; values of the one before it."""
    slot, before, shape = ring.slot(n), ring.slot(n - 1), (f.rows, f.blocks.block_kv)
    # Read early, so that the latency of global memory hides behind the products.
    seen = None if mask is None else mask(n)  # compared later: see _seen
    plgpu.barrier_wait(ring.k_ready.at[slot])
    plgpu.barrier_wait(ring.v_ready.at[before])
    plgpu.barrier_wait(ring.turn.at[ring.me])

    def products(acc: Any) -> tuple[Array, ...]:
        plgpu.wgmma(acc, q, ring.k_smem.at[slot].transpose((1, 0)))
        out = found.out * lax.broadcast_in_dim(found.shrink, found.out.shape, (0,))

        def values(refs: tuple[Any, ...]) -> None:
            out, *softmax = refs
            plgpu.wgmma(out, found.p, ring.v_smem.at[before])
            plgpu.barrier_arrive(ring.turn.at[1 - ring.me])
            raw = plgpu.wgmma_accumulator_load(acc, wait_n=1)
            raw = lax.optimization_barrier(raw)  # nothing is read before it is there
            plgpu.barrier_arrive(ring.k_free.at[slot])
            new = _softmax(f, raw, seen, found.maximum, found.total)
            for ref, x in zip(softmax, new, strict=True):
                ref[...] = x

        start = (found.maximum, found.total, found.shrink, jnp.zeros(shape, jnp.float32))
        return pl.run_state(values)((plgpu.ACC.init(out), *start))

    out, maximum, total, shrink, p = pl.run_scoped(products, plgpu.ACC(shape, jnp.float32))
    plgpu.barrier_arrive(ring.v_free.at[before])
    return Found(maximum, total, out, shrink, p.astype(f.dtype))


def _last(ring: Ring, found: Found, n: Array) -> Running:
    """Values of the last block."""
    slot = ring.slot(n)
    plgpu.barrier_wait(ring.v_ready.at[slot])

    def multiply_values(acc: Any) -> None:
        plgpu.wgmma(acc, found.p, ring.v_smem.at[slot])

    out = found.out * lax.broadcast_in_dim(found.shrink, found.out.shape, (0,))
    out = pl.run_state(multiply_values)(plgpu.ACC.init(out))
    return Running(found.maximum, found.total, out)


def _softmax(
    f: Forward, raw: Array, seen: Array | None, before: Array, total: Array
) -> tuple[Array, Array, Array, Array]:
    """Maximum, sum, what shrinks that which was found before, and exp(score - maximum)."""
    scores = f.scores.capped(raw)
    if seen is not None:
        scores = jnp.where(seen(), scores, -jnp.inf)
    maximum = jnp.maximum(before, scores.max(1))
    finite = maximum
    if seen is not None:  # a row that has seen nothing yet
        finite = jnp.where(maximum == -jnp.inf, 0.0, maximum)
    p = f.scores.probability(scores, finite)
    shrink = jnp.exp2((before - finite) * f.scores.factor_2)
    return maximum, total * shrink + p.sum(1), shrink, p


def _seen(
    f: Forward, g: Refs, q_marks: tuple[Array, ...], row: Array, j: Array
) -> Callable[[], Array]:
    """Reads the marks of a PARTIAL pair of blocks; what is returned then says which pairs count."""
    assert f.marks is not None
    columns = pl.ds(j * f.blocks.block_kv, f.blocks.block_kv)
    rows = [g.kv_marks.at[row, i, columns] for i in range(f.marks.key_rows)]
    kv_marks = tuple(registers(x, _COLUMNS) for x in rows)
    shape = (f.rows, f.blocks.block_kv)
    return lambda: visible(f.marks, q_marks, kv_marks, shape)


def _start(f: Forward, g: Refs, mine: Any) -> tuple[Array, Array]:
    """Maximum and sum of what was found before, or of nothing."""
    if not f.continued:
        return _constant(-jnp.inf, _ROWS, f.rows), _constant(0.0, _ROWS, f.rows)
    # A softmax whose sum, scaled by its maximum, is one.
    lse = registers(g.before_lse.at[mine], _ROWS)
    one = jnp.where(lse == -jnp.inf, 0.0, jnp.ones_like(lse))
    return lse * (1.0 / f.scores.factor), one


def _start_out(f: Forward, g: Refs, mine: Any) -> Array:
    """The output found before, or zero."""
    if not f.continued:
        return _constant(0.0, _WGMMA, f.rows, f.value_dim)
    return registers(g.before_out.at[mine], _WGMMA)


def _constant(value: float, layout: Any, *shape: int) -> Array:
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def _finish(f: Forward, g: Refs, mine: Any, running: Running) -> None:
    """Output and lse; rows that saw nothing get 0 and -inf."""
    saw = running.total > 0.0
    total = jnp.where(saw, running.total, 1.0)
    lse = running.maximum * f.scores.factor + jnp.log2(total) * LN_2
    inverse = lax.broadcast_in_dim(1.0 / total, running.out.shape, (0,))
    g.out.at[mine][...] = running.out * inverse
    g.lse.at[mine][...] = jnp.where(saw, lse, -jnp.inf)
