"""An attending warpgroup of the forward: products and softmax. `_forward` draws the pipeline."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from burst_kernels._active import Marks, visible
from burst_kernels.mosaic_gpu._config import ATTENDING, Blocks
from burst_kernels.mosaic_gpu._memory import registers, scalar
from burst_kernels.mosaic_gpu._scores import LN_2, LOG2_E, Scores

_Accumulator = plgpu.WGMMAAccumulatorRef
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
        v_at: sequences before the first of v: B where k and v are one array, else 0.
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
    v_at: int
    dtype: Any
    blocks: Blocks
    scores: Scores
    marks: Marks | None
    mask_per_sequence: bool
    continued: bool

    @property
    def rows(self) -> int:
        """Queries of one warpgroup."""
        return self.blocks.block_q // ATTENDING

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
    order: Any = None
    before_out: Any = None
    before_lse: Any = None
    out: Any = None
    lse: Any = None


class Running(NamedTuple):
    """Online softmax of a warpgroup's queries.

    Attributes:
        maximum: of each row's scores, in base 2.
        total: sum of 2^(score - maximum).
        out: sum of 2^(score - maximum) v.
    """

    maximum: Float[Array, " r"]
    total: Float[Array, " r"]
    out: Float[Array, "r Hv"]


class Found(NamedTuple):
    """`Running`, but for the values of the last block.

    Attributes:
        shrink: factor that `out` is still to be multiplied with.
        p: 2^(score - maximum) of the last block, still to be multiplied with its values.
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


def attend(
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
    raw = lax.optimization_barrier(pl.run_scoped(scores, _Accumulator(shape, jnp.float32)))
    plgpu.barrier_arrive(ring.k_free.at[0])
    maximum, total, shrink, p = _softmax(f, raw, seen, maximum, total)
    plgpu.barrier_wait(ring.v_ready.at[0])
    return maximum, total, shrink, p.astype(f.dtype)


def _visit_kernel(
    f: Forward, ring: Ring, n: Array, found: Found, q: Any, mask: Mask | None
) -> Found:
    """Scores and probabilities of the n-th active block; values of the one before it."""
    slot, before, shape = ring.slot(n), ring.slot(n - 1), (f.rows, f.blocks.block_kv)
    # Read early, so that the latency of global memory hides behind the products.
    seen = None if mask is None else mask(n)  # compared later: see _seen
    plgpu.barrier_wait(ring.k_ready.at[slot])
    plgpu.barrier_wait(ring.turn.at[ring.me])

    def step(refs: tuple[Any, ...]) -> None:
        out, *softmax = refs

        def products(acc: Any) -> Array:
            plgpu.wgmma(acc, q, ring.k_smem.at[slot].transpose((1, 0)))
            plgpu.wgmma(out, found.p, ring.v_smem.at[before])
            plgpu.barrier_arrive(ring.turn.at[1 - ring.me])
            return plgpu.wgmma_accumulator_load(acc, wait_n=1)

        raw = pl.run_scoped(products, _Accumulator(shape, jnp.float32))
        raw = lax.optimization_barrier(raw)  # nothing is read before it is there
        plgpu.barrier_arrive(ring.k_free.at[slot])
        new = _softmax(f, raw, seen, found.maximum, found.total)
        new = lax.optimization_barrier(new)
        plgpu.barrier_wait(ring.v_ready.at[slot])  # here, and not later: see `_forward`
        for ref, x in zip(softmax, new, strict=True):
            ref[...] = x

    shrunk = found.out * lax.broadcast_in_dim(found.shrink, found.out.shape, (0,))
    softmax = (found.maximum, found.total, found.shrink, jnp.zeros(shape, jnp.float32))
    state: Any = (_Accumulator.init(shrunk), *softmax)
    out, maximum, total, shrink, p = pl.run_state(step)(state)
    plgpu.barrier_arrive(ring.v_free.at[before])
    return Found(maximum, total, out, shrink, p.astype(f.dtype))


def _last(ring: Ring, found: Found, n: Array) -> Running:
    """Values of the last block."""
    slot = ring.slot(n)

    def multiply_values(acc: Any) -> None:
        plgpu.wgmma(acc, found.p, ring.v_smem.at[slot])

    shrunk = found.out * lax.broadcast_in_dim(found.shrink, found.out.shape, (0,))
    out: Any = pl.run_state(multiply_values)(_Accumulator.init(shrunk))
    return Running(found.maximum, found.total, out)


def _softmax(
    f: Forward, raw: Array, seen: Callable[[], Array] | None, before: Array, total: Array
) -> tuple[Array, Array, Array, Array]:
    """Maximum, sum, what shrinks that which was found before, and 2^(score - maximum)."""
    scores = f.scores.capped(raw)
    if seen is not None:
        scores = jnp.where(seen(), scores, -jnp.inf)
    maximum = jnp.maximum(before, scores.max(1) * f.scores.factor_2)
    finite = maximum
    if seen is not None:  # a row that has seen nothing yet
        finite = jnp.where(maximum == -jnp.inf, 0.0, maximum)
    p = f.scores.probability(scores, finite)
    shrink = jnp.exp2(before - finite)
    return maximum, total * shrink + p.sum(1), shrink, p


def _seen(
    f: Forward, g: Refs, q_marks: tuple[Array, ...], row: Array, j: Array
) -> Callable[[], Array]:
    """Reads the marks of a PARTIAL pair of blocks; what is returned then says which pairs count."""
    compared = f.marks
    assert compared is not None
    columns = pl.ds(j * f.blocks.block_kv, f.blocks.block_kv)
    rows = [g.kv_marks.at[row, i, columns] for i in range(compared.key_rows)]
    kv_marks = tuple(registers(x, _COLUMNS) for x in rows)
    shape = (f.rows, f.blocks.block_kv)
    return lambda: visible(compared, q_marks, kv_marks, shape)


def _start(f: Forward, g: Refs, mine: Any) -> tuple[Array, Array]:
    """Maximum and sum of what was found before, or of nothing."""
    if not f.continued:
        return _constant(-jnp.inf, _ROWS, f.rows), _constant(0.0, _ROWS, f.rows)
    # A softmax whose sum, scaled by its maximum, is one.
    lse = registers(g.before_lse.at[mine], _ROWS)
    one = jnp.where(lse == -jnp.inf, 0.0, jnp.ones_like(lse))
    return lse * LOG2_E, one


def _start_out(f: Forward, g: Refs, mine: Any) -> Array:
    """The output found before, or zero."""
    if not f.continued:
        return _constant(0.0, _WGMMA, f.rows, f.value_dim)
    return registers(g.before_out.at[mine], _WGMMA)


def _constant(value: float, layout: Any, *shape: int) -> Array:
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def _finish(f: Forward, g: Refs, mine: Any, running: Running) -> None:
    """Output and lse; rows that saw nothing get 0 and -inf."""
    saw = running.maximum != -jnp.inf  # not by `total`: see `_scores` on scores beyond 2**29
    total = jnp.where(saw, running.total, 1.0)
    lse = (running.maximum + jnp.log2(total)) * LN_2
    inverse = lax.broadcast_in_dim(1.0 / total, running.out.shape, (0,))
    g.out.at[mine][...] = running.out * inverse
    g.lse.at[mine][...] = jnp.where(saw, lse, -jnp.inf)
