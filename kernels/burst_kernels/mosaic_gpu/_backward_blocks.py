"""What the two backward kernels for Hopper share: geometry, loading, the mathematics of a score.

Both keep a block of keys in a CTA while its active blocks of queries pass by, brought by a loading
warpgroup, for all G query heads of the kv head. How two computing warpgroups share the work differs
with the head dim: `_backward_kv` and `_backward_wide`.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from burst_kernels._active import Marks, visible
from burst_kernels.mosaic_gpu._memory import registers, scalar
from burst_kernels.mosaic_gpu._scores import Scores

# Compute warpgroups of a CTA, and the rows that one `wgmma` of a warpgroup has.
WARPGROUPS = 2
ROWS = 64
# Registers a thread: 2 x 240 + 24 <= 504, what three warpgroups have.
_REGISTERS_COMPUTE, _REGISTERS_LOAD = 240, 24

# The first axis of accumulators of scores^T counts keys, the second queries.
_WGMMA = plgpu.Layout.WGMMA
_KEYS, _QUERIES = _WGMMA.reduce(1), _WGMMA.reduce(0)


class Cut(NamedTuple):
    """The static geometry of one call.

    Attributes:
        batch, kv_heads, heads_per_kv: B, K, G.
        t, s: padded to whole blocks.
        block_q, block_kv: queries in a block, keys in a block.
        stages: blocks of queries in flight.
        H, Hv: head dims.
        shared_rows: whether all sequences share the rows of the mask.
        scores: how scores are made.
        marks: rows of the marks; None: no mask.
        dtype: of q, k, v and do.
        v_at: sequences before the first of v: B where k and v are one array, else 0.
    """

    batch: int
    kv_heads: int
    heads_per_kv: int
    t: int
    s: int
    block_q: int
    block_kv: int
    stages: int
    H: int
    Hv: int
    shared_rows: bool
    scores: Scores
    marks: Marks | None
    dtype: Any
    v_at: int = 0

    @property
    def wide(self) -> bool:
        """Whether one warpgroup makes dk and the other dv: of ROWS keys it may hold but one."""
        return self.block_kv == ROWS


class Operands(NamedTuple):
    """What the kernel reads. None: not needed.

    Attributes:
        q, k, v, do: [B, N, t, H], [B, K, s, H], [B, K, s, Hv], [B, N, t, Hv].
        bound: lse in base 2, +inf where a row takes no part, [B, N, t].
        delta: [B, N, t], times scale, or times powers[0].
        blocks, counts: `_active.Active` of the blocks of keys.
        q_marks, kv_marks: [b, U, t], [b, W, s].
        powers: float16 only, [2]: factor on score gradients, scale and what keeps them in range;
            the inverse of the latter.
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


class Places(NamedTuple):
    """Shared memory and barriers for what is loaded; leading axis: slots.

    Attributes:
        k, v, kv_marks: the block of keys.
        q, do, bound, delta, q_marks: blocks of queries.
        resident: the block of keys is there.
        loaded, consumed: a slot holds a block of queries; both warpgroups are done with it.
    """

    k: Any
    v: Any
    kv_marks: Any
    q: Any
    do: Any
    bound: Any
    delta: Any
    q_marks: Any
    resident: Any
    loaded: Any
    consumed: Any

    @classmethod
    def of(cls, c: Cut) -> "Places":
        """The types, for `plgpu.kernel`."""
        kv_marks = q_marks = None
        if c.marks is not None:
            kv_marks = plgpu.SMEM((c.marks.key_rows, c.block_kv), jnp.int32)
            q_marks = plgpu.SMEM((c.stages, c.marks.query_rows, c.block_q), jnp.int32)
        row = plgpu.SMEM((c.stages, c.block_q), jnp.float32)
        masked = int(c.marks is not None)
        return cls(
            k=tiled(c.dtype, c.block_kv, c.H),
            v=tiled(c.dtype, c.block_kv, c.Hv),
            kv_marks=kv_marks,
            q=tiled(c.dtype, c.stages, c.block_q, c.H),
            do=tiled(c.dtype, c.stages, c.block_q, c.Hv),
            bound=row,
            delta=row,
            q_marks=q_marks,
            resident=plgpu.Barrier(num_arrivals=2 + masked),
            loaded=plgpu.Barrier(num_arrivals=4 + masked, num_barriers=c.stages),
            consumed=plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=c.stages),
        )


class Here(NamedTuple):
    """Where a warpgroup is: warpgroup, block of keys, kv head, sequence, row of the mask."""

    wg: Any
    j: jax.Array
    kv_head: jax.Array
    b: jax.Array
    row: jax.Array


class Visits(NamedTuple):
    """The pairs of blocks of one class that a CTA visits, each for all query heads.

    Attributes:
        first, number: of the list of blocks.
        before: visits made before these.
        masked: whether the mask is needed.
    """

    first: jax.Array
    number: jax.Array
    before: jax.Array
    masked: bool


def call(
    c: Cut,
    compute: Callable[..., None],
    scratch: Any,
    operands: Operands,
    dq: Any,
    out_type: Callable[..., Any],
) -> tuple[jax.Array, jax.Array]:
    """Runs a kernel: dk and dv; dq is added to.

    Args:
        c: the geometry.
        compute: (here, operands, dq, dk, dv, places, scratch) -> None, what a computing warpgroup
            does.
        scratch: types of what it needs beyond `Places`.
        operands: see there.
        dq: a `jax.Ref` [B, N, t, H], float32.
        out_type: (shape) -> float32 type of a result.
    """

    def kernel(x: Operands, dq: Any, dk: Any, dv: Any, s: Places, scratch: Any) -> None:
        b = lax.axis_index("batch")
        here = Here(
            wg=lax.axis_index("wg"),
            j=lax.axis_index("block"),
            kv_head=lax.axis_index("head"),
            b=b,
            row=jnp.int32(0) if c.shared_rows else b,
        )

        @pl.when(here.wg == WARPGROUPS)
        def _load():
            plgpu.set_max_registers(_REGISTERS_LOAD, action="decrease")
            _load_keys(c, here, x, s)
            for some in visits(c, here, x):
                _load_queries(c, here, some, x, s)

        # Code for each warpgroup: its places are then constants, which take no registers.
        for w in range(WARPGROUPS):

            @pl.when(here.wg == w)
            def _compute(w=w):
                plgpu.set_max_registers(_REGISTERS_COMPUTE, action="increase")
                compute(here._replace(wg=w), x, dq, dk, dv, s, scratch)

    shape = (c.batch, c.kv_heads, c.s)
    return _launch(
        kernel,
        [Places.of(c), scratch],
        [out_type((*shape, c.H)), out_type((*shape, c.Hv))],
        # The last is the fastest: CTAs that run together read the same queries from the L2 cache.
        grid=(c.batch, c.kv_heads, c.s // c.block_kv),
        grid_names=("batch", "head", "block"),
        num_threads=WARPGROUPS + 1,
        thread_name="wg",
        kernel_name="burst_backward",
    )(operands, dq)


def _launch(
    body: Callable[..., None], scratch: list[Any], out_type: list[Any], **mesh: Any
) -> Callable[[Operands, Any], tuple[jax.Array, jax.Array]]:
    # What a warpgroup writes to shared memory only wgmma and TMA read, after a `commit_smem`; it
    # writes there again after a barrier. More barriers than these are not needed.
    params = plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True)
    if jax.__version_info__ >= (0, 11):
        run: Any = plgpu.kernel(
            body, out_type=out_type, scratch_types=scratch, compiler_params=params, **mesh
        )
    else:
        # There plgpu.kernel takes no Ref, for the sake of vmap: this is what it calls.
        ctas = vars(plgpu)["Mesh"](**mesh)  # by name: a mesh of CTAs, this package knows no other

        def scoped(*refs: Any) -> None:
            inside = functools.partial(body, *refs)
            pl.run_scoped(inside, *scratch, collective_axes=mesh["thread_name"])

        run = pl.kernel(
            scoped, out_type=out_type, mesh=ctas, compiler_params=params,
            name=mesh["kernel_name"],
        )  # fmt: skip

    def results(operands: Operands, dq: Any) -> tuple[jax.Array, jax.Array]:
        dk, dv = run(operands, dq)
        return dk, dv

    return results


def tiled(dtype: Any, *shape: int) -> Any:
    """Shared memory as `wgmma` reads and TMA writes it without bank conflicts."""
    width = 128 // jnp.dtype(dtype).itemsize  # a swizzled row has 128 bytes
    tiling = plgpu.TilingTransform((8, width))  # pyright: ignore[reportAbstractUsage]
    swizzle = plgpu.SwizzleTransform(128)  # pyright: ignore[reportAbstractUsage]
    return plgpu.SMEM(shape, dtype, transforms=(tiling, swizzle))


def accumulator(columns: int) -> Any:
    """Float32 sums of products of ROWS rows, in a warpgroup's registers."""
    return plgpu.WGMMAAccumulatorRef((ROWS, columns), jnp.float32)


def visits(c: Cut, here: Here, x: Operands) -> Iterator[Visits]:
    """FULL pairs of blocks, then PARTIAL ones."""
    zero = jnp.int32(0)
    if c.marks is None:
        # Were the number known, the compiler would keep so many addresses that it spills them.
        number = lax.optimization_barrier(jnp.int32(c.t // c.block_q))
        yield Visits(zero, number, zero, False)
        return
    full, active = (scalar(x.counts, here.row, here.j, i) for i in (0, 1))
    yield Visits(zero, full, zero, False)
    yield Visits(full, active - full, full * c.heads_per_kv, True)


def each(c: Cut, some: Visits, body: Callable[[jax.Array, jax.Array], None]) -> None:
    """Runs `body(n, slot)` for every visit, n from 0; the slots of all visits go round."""

    @pl.loop(jnp.int32(0), some.number * c.heads_per_kv)
    def _(n):
        body(n, lax.rem(some.before + n, jnp.int32(c.stages)))


def target(
    c: Cut, here: Here, some: Visits, x: Operands, n: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Query head and block of queries of a visit."""
    m, head = n, here.kv_head
    if c.heads_per_kv > 1:
        m = lax.rem(n, some.number)
        head = here.kv_head * c.heads_per_kv + lax.div(n, some.number)
    return head, m if x.blocks is None else scalar(x.blocks, here.row, here.j, some.first + m)


def _load_keys(c: Cut, here: Here, x: Operands, s: Places) -> None:
    keys = pl.ds(here.j * c.block_kv, c.block_kv)
    plgpu.copy_gmem_to_smem(x.k.at[here.b, here.kv_head, keys], s.k, s.resident)
    plgpu.copy_gmem_to_smem(x.v.at[here.b + c.v_at, here.kv_head, keys], s.v, s.resident)
    if c.marks is not None:
        plgpu.copy_gmem_to_smem(x.kv_marks.at[here.row, :, keys], s.kv_marks, s.resident)


def _load_queries(c: Cut, here: Here, some: Visits, x: Operands, s: Places) -> None:
    def load(n: jax.Array, slot: jax.Array) -> None:
        head, i = target(c, here, some, x, n)
        at = (here.b, head, pl.ds(i * c.block_q, c.block_q))
        loaded = s.loaded.at[slot]

        @pl.when(some.before + n >= c.stages)
        def _():
            plgpu.barrier_wait(s.consumed.at[slot])

        for source, place in ((x.q, s.q), (x.do, s.do), (x.bound, s.bound), (x.delta, s.delta)):
            plgpu.copy_gmem_to_smem(source.at[at], place.at[slot], loaded)
        if c.marks is not None:
            marks = x.q_marks.at[here.row, :, at[2]]
            plgpu.copy_gmem_to_smem(marks, s.q_marks.at[slot], loaded)

    each(c, some, load)


def probabilities(
    c: Cut, raw: jax.Array, masked: bool, keys: Any, slot: jax.Array, s: Places
) -> tuple[jax.Array, jax.Array | None]:
    """p^T from k q^T, and what the soft cap does to a gradient.

    Args:
        c: the geometry.
        raw: k q^T, [keys, queries].
        masked: whether the mask is needed.
        keys: which of the block's keys these are.
        slot: where the queries are.
        s: shared memory.
    """
    scores = c.scores.capped(raw)
    slope = c.scores.cap_slope(scores)
    p = c.scores.probability(scores, _of_queries(s.bound.at[slot]), axis=1)
    if masked:
        assert c.marks is not None
        q = tuple(_of_queries(s.q_marks.at[slot, u]) for u in range(c.marks.query_rows))
        kv = tuple(registers(s.kv_marks.at[w, keys], _KEYS) for w in range(c.marks.key_rows))
        # Where unseen, a score may lie above the bound and p be infinite: it is not multiplied.
        p = jnp.where(visible(c.marks, q, kv, (p.shape[0], c.block_q), q_axis=1), p, 0.0)
    return p, slope


def score_gradients(
    c: Cut,
    p: jax.Array,
    slope: jax.Array | None,
    dp: jax.Array,
    x: Operands,
    slot: jax.Array,
    s: Places,
) -> jax.Array:
    """ds^T, times scale; float16's times powers[0], which has the scale in it."""
    dp = dp * (jnp.float32(c.scores.scale) if x.powers is None else power(x, 0))
    delta = lax.broadcast_in_dim(_of_queries(s.delta.at[slot]), dp.shape, (1,))
    ds = p * (dp - delta)
    return ds if slope is None else ds * slope


def unscaled(x: Operands, product: jax.Array) -> jax.Array:
    """dq or dk from ds k or ds^T q, where ds is what `score_gradients` returned."""
    return product if x.powers is None else product * power(x, 1)


def power(x: Operands, i: int) -> jax.Array:
    """One of `Operands.powers`."""
    return x.powers[i] * jnp.float32(1.0)


def store(here: Here, keys: Any, total: jax.Array, found: Any, result: Any) -> None:
    """Writes dk or dv of some keys, added to what was found before."""
    at = (here.b, here.kv_head, keys)
    if found is not None:
        total = total + registers(found.at[at], _WGMMA)
    result.at[at][...] = total


def _of_queries(x: Any) -> jax.Array:
    return registers(x, _QUERIES)
