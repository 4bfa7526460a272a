"""Forward tile for TPU: FlashAttention-2's loop order (arXiv 2307.08691, Alg. 1) in Pallas.

One step of the grid (sequence, kv head, query head of its group, step of the active list) is one
pair of blocks. Pallas fetches the blocks of step n + 1 and writes those of n - 1 while step n runs:

    load        q block: once a block of queries.  k, v blocks: each step.  onto: with q.
    begin       m, l, acc <- nothing seen, or `onto`               first step of a block of queries
    scores      s = q k^T, piece by piece of the block of keys     matrix unit
    softmax     m' = max(m, rowmax s); p = 2^(c (s - m'))          vector and transcendental units
    accumulate  acc = 2^(c (m - m')) acc + p v                     matrix unit
    end         out = acc / sum l, lse                             last step of a block of queries

A pair of blocks is computed in pieces, some queries against some keys, whose stages are independent
but for m: so the compiler fills the matrix unit with one piece while the vector unit is busy with
another. We differ from the paper, and from JAX's splash attention, in three things. Scale and base
of the exponential are one factor, applied after the maximum is taken off. The sum of a row stays
128 partial sums, one a lane, until the row is done: no reduction across lanes but the maximum's.
And the grid is the list of active pairs (`_active`), so what is masked costs no step, also where
positions are known only as data.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int32, Shaped

from burst_kernels._config import TileConfig
from burst_kernels._problem import problem_of
from burst_kernels._tile import FULL, PARTIAL, Tile
from burst_kernels.mosaic_tpu import _config
from burst_kernels.mosaic_tpu._active import (
    Active,
    active_pairs,
    every_pair,
    of_equal_rows,
    padded_tokens,
)
from burst_kernels.mosaic_tpu._config import Piece, Sizes
from burst_kernels.mosaic_tpu._scores import (
    LANES,
    PLAIN,
    ROWS,
    across,
    capped,
    column,
    exponent,
    factor,
    key_mask,
    matmul,
    query_mask,
    seen,
)

# The maximum of a row that saw nothing. Finite, and yet far from what is masked (-inf), whose
# probability is then 0 without a guard: -inf - _FLOOR is -inf, _FLOOR - _FLOOR is 0.
_FLOOR = -0.5 * float(np.finfo(np.float32).max)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Refs:
    """What the kernel reads and writes; None where a call has no such thing.

    Blocks of operands and results: q [bq, H], k [bkv, H], v [bkv, Hv], q_mask [rows, bq], kv_mask
    [rows, bkv], onto_out, out [bq, Hv], onto_lse, lse [1, bq]. Scratch of a block of queries:
    maximum m, the same in every lane, and partial sums l [bq, 128]; acc [bq, Hv].
    """

    q: jax.Ref
    k: jax.Ref
    v: jax.Ref
    out: jax.Ref
    lse: jax.Ref
    m: jax.Ref
    l: jax.Ref
    acc: jax.Ref
    q_mask: jax.Ref | None = None
    kv_mask: jax.Ref | None = None
    onto_out: jax.Ref | None = None
    onto_lse: jax.Ref | None = None


def tile_forward(
    q: Float[Array, "B N t H"],
    k: Float[Array, "B K s H"],
    v: Float[Array, "B K s Hv"],
    tile: Tile,
    config: TileConfig | None = None,
    onto: tuple[Float[Array, "B N t Hv"], Float[Array, "B N t"]] | None = None,
) -> tuple[Float[Array, "B N t Hv"], Float[Array, "B N t"]]:
    """Attention of t queries to s keys. See the tile contract in `burst_kernels._tile`.

    `onto` is written over where it lies, if nothing else holds it; queries that see none of these
    keys are neither read nor written then.
    """
    sizes, config = _sizes(q, k, v, tile, config)
    active, q_mask, kv_mask = _pairs(sizes, tile, q, cover=onto is None)
    if active.steps.size > _config.MAX_STEPS and active.rows > 1:
        return _by_sequence(q, k, v, tile, config, onto)
    # The interpreter cannot alias arrays whose last block is shorter; a TPU can.
    t = sizes.num_q * sizes.block_q if config.interpret and onto is not None else sizes.t
    operands = dict(q=_grouped(q, sizes), k=k, v=v, q_mask=q_mask, kv_mask=kv_mask)
    if onto is not None:
        out, lse = (_grouped(_lengthened(x, t), sizes) for x in onto)
        operands |= dict(onto_out=out, onto_lse=lse[..., None, :])
    operands = {name: x for name, x in operands.items() if x is not None}
    heads = (sizes.B, sizes.K, sizes.N // sizes.K)
    results = {"out": _like(q, (*heads, t, sizes.Hv)), "lse": _like(q, (*heads, 1, t))}
    specs = _specs(sizes, active, {n: x.shape for n, x in (operands | results).items()})
    # Operand 0 is the list of steps.
    places = {name: place for place, name in enumerate(operands, start=1)}
    aliases = {places["onto_out"]: 0, places["onto_lse"]: 1} if onto is not None else {}
    out, lse = pl.pallas_call(
        functools.partial(
            _forward_kernel, names=(*operands, *results), active=active, sizes=sizes, tile=tile
        ),
        out_shape=list(results.values()),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(sizes.B if active.rows == 1 else 1, *heads[1:], active.count),
            in_specs=[specs[name] for name in operands],
            out_specs=[specs[name] for name in results],
            scratch_shapes=[
                pltpu.VMEM((sizes.block_q, width), jnp.float32)
                for width in (LANES, LANES, sizes.Hv)
            ],
        ),
        input_output_aliases=aliases,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=_config.vmem_limit(_config.chip_name(config)),
        ),
        cost_estimate=_cost(sizes, q.dtype.itemsize),
        interpret=pltpu.InterpretParams() if config.interpret else False,
        name="burst_forward",
    )(active.steps, *operands.values())
    out, lse = (x.reshape(sizes.B, sizes.N, *x.shape[3:]) for x in (out, lse))
    return out[:, :, : sizes.t], lse[:, :, 0, : sizes.t]


def _sizes(q, k, v, tile: Tile, config: TileConfig | None) -> tuple[Sizes, TileConfig]:
    """The sizes of a call, checked; what the config leaves open is chosen."""
    config = config or TileConfig()
    problem = problem_of(q, k, v, tile)
    chip = _config.chip_name(config)
    if (reason := _config.refuses(problem, chip)) is not None:
        raise NotImplementedError(reason)
    config = _config.configure_forward(problem, chip, dataclasses.replace(config, chip=chip))
    assert config.block_q and config.block_kv and config.block_compute and config.block_compute_q
    sizes = Sizes(
        **{name: getattr(problem, name) for name in ("B", "t", "s", "N", "K", "H", "Hv")},
        block_q=config.block_q,
        block_kv=config.block_kv,
        compute_q=config.block_compute_q,
        compute_kv=config.block_compute,
        ahead=_config.GENERATIONS[chip].pieces.ahead,
    )
    return sizes, config


def _grouped(x: Shaped[Array, "B N ..."], sizes: Sizes) -> Shaped[Array, "B K G ..."]:
    """With query heads by kv head: index maps then need no arithmetic to find the one they read."""
    return x.reshape(sizes.B, sizes.K, sizes.N // sizes.K, *x.shape[2:])


def _lengthened(x: Shaped[Array, "B N t ..."], t: int) -> Shaped[Array, "B N t_ ..."]:
    widths = [(0, 0)] * x.ndim
    widths[2] = (0, t - x.shape[2])
    return jnp.pad(x, widths) if widths[2][1] else x


def _like(x: Array, shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
    """A float32 result that varies over the mesh axes that x varies over."""
    varying = jax.typeof(x).manual_axis_type
    return jax.ShapeDtypeStruct(shape, jnp.float32, manual_axis_type=varying)


def _pairs(
    sizes: Sizes, tile: Tile, like: Array, cover: bool
) -> tuple[Active, Array | None, Array | None]:
    """The steps of the grid; what masks ask of the tokens, where some pairs are masked."""
    if not tile.masked and sizes.s % sizes.block_kv == 0:
        return every_pair(sizes.num_q, sizes.num_kv, "q"), None, None
    q, kv = of_equal_rows(tile.queries(sizes.t), tile.keys(sizes.s))
    if not tile.masked:  # Fresh constants would lack the mesh axes of the operands.
        q, kv = jax.tree.map(lambda x: jnp.zeros_like(like, shape=x.shape, dtype=x.dtype), (q, kv))
    q, kv = of_equal_rows(q, kv)
    q = padded_tokens(q, sizes.block_q, repeat=True)
    kv = padded_tokens(kv, sizes.block_kv)
    blocks = (sizes.block_q, sizes.block_kv)
    active = active_pairs(q, kv, tile, blocks=blocks, order="q", cover=cover)
    return active, query_mask(q, tile), key_mask(kv)


def _by_sequence(q, k, v, tile: Tile, config: TileConfig, onto):
    """One sequence after the other: where the lists of all of them overflow scalar memory."""

    def one(n: Int32[Array, ""]):
        def row(x: Array, axis: int = 0) -> Array:
            return x if x.shape[axis] == 1 else jax.lax.dynamic_slice_in_dim(x, n, 1, axis)

        def maybe(x: Array | None, axis: int) -> Array | None:
            return None if x is None else row(x, axis)

        of_row = dataclasses.replace(
            tile,
            q_positions=maybe(tile.q_positions, 0),
            kv_positions=maybe(tile.kv_positions, 0),
            q_segments=maybe(tile.q_segments, 1),
            kv_segments=maybe(tile.kv_segments, 1),
        )
        before = None if onto is None else (row(onto[0]), row(onto[1]))
        out, lse = tile_forward(row(q), row(k), row(v), of_row, config, before)
        return out[0], lse[0]

    return jax.lax.map(one, jnp.arange(q.shape[0], dtype=jnp.int32))


def _specs(sizes: Sizes, active: Active, shapes: dict[str, tuple]) -> dict[str, pl.BlockSpec]:
    """The block of each operand and result that a step of the grid works on."""

    def block(size: tuple[int | None, ...], place) -> pl.BlockSpec:
        def index(b, k, g, p, steps):
            step = active.at(steps, p)
            at = place(b if active.rows == 1 else step.row, k, g, step)
            # With x64 on, an index that is a Python integer would be an int64, which no TPU has.
            return tuple(map(jnp.int32, at))

        return pl.BlockSpec(size, index)

    def queries(width: int) -> pl.BlockSpec:
        size = (None, None, None, sizes.block_q, width)
        return block(size, lambda b, k, g, step: (b, k, g, step.i, 0))

    def keys(width: int) -> pl.BlockSpec:
        return block((None, None, sizes.block_kv, width), lambda b, k, g, step: (b, k, step.j, 0))

    rows = block((None, None, None, 1, sizes.block_q), lambda b, k, g, step: (b, k, g, 0, step.i))
    specs = dict(
        q=queries(sizes.H), k=keys(sizes.H), v=keys(sizes.Hv),
        onto_out=queries(sizes.Hv), onto_lse=rows, out=queries(sizes.Hv), lse=rows,
    )  # fmt: skip
    if "q_mask" in shapes:
        masks = (None, shapes["q_mask"][1], sizes.block_q)
        specs["q_mask"] = block(masks, lambda b, k, g, step: (step.row, 0, step.i))
        masks = (None, shapes["kv_mask"][1], sizes.block_kv)
        specs["kv_mask"] = block(masks, lambda b, k, g, step: (step.row, 0, step.j))
    return specs


def _cost(sizes: Sizes, itemsize: int) -> pl.CostEstimate:
    """What XLA's scheduler may hide behind the kernel: as if nothing were masked."""
    z = sizes
    pairs = z.B * z.N * z.t * z.s
    read = z.B * z.N * (z.t * z.H + z.num_q * z.s * (z.H + z.Hv)) * itemsize
    return pl.CostEstimate(
        flops=2 * pairs * (z.H + z.Hv),
        transcendentals=pairs,
        bytes_accessed=read + 4 * z.B * z.N * z.t * (z.Hv + 1),
    )


def _forward_kernel(
    steps: jax.Ref,
    *refs: jax.Ref,
    names: tuple[str, ...],
    active: Active,
    sizes: Sizes,
    tile: Tile,
) -> None:
    """One pair of blocks; the stages are drawn at the head of this file."""
    r = Refs(**dict(zip((*names, "m", "l", "acc"), refs, strict=True)))
    step = active.at(steps, pl.program_id(3))
    pl.when(step.first_of_q == 1)(lambda: _begin(r, tile))
    if r.q_mask is None:
        _attend(r, sizes, tile, None)
    else:
        pl.when(step.kind == FULL)(lambda: _attend(r, sizes, tile, None))
        pl.when(step.kind == PARTIAL)(lambda: _attend(r, sizes, tile, step.j))
    pl.when(step.last_of_q == 1)(lambda: _end(r, tile))


def _begin(r: Refs, tile: Tile) -> None:
    """A block of queries saw nothing yet, or what it saw is a softmax whose sum is one."""
    if r.onto_out is None:
        r.m[...] = jnp.full(r.m.shape, _FLOOR, jnp.float32)
        r.l[...] = jnp.zeros(r.l.shape, jnp.float32)
        r.acc[...] = jnp.zeros(r.acc.shape, jnp.float32)
        return
    assert r.onto_lse is not None
    lse = column(r.onto_lse[...])
    saw = lse != -jnp.inf
    r.m[...] = jnp.where(saw, lse * (1 / factor(tile)), _FLOOR)
    r.l[...] = jnp.where(saw, jnp.float32(1 / LANES), 0.0)
    r.acc[...] = r.onto_out[...]


def _attend(r: Refs, sizes: Sizes, tile: Tile, masked_at: Int32[Array, ""] | None) -> None:
    """Adds a block of keys to the online softmax; masked_at: its index, if some are masked."""
    waiting = None
    for piece, after in itertools.zip_longest(sizes.pieces, sizes.pieces[1:]):
        here = _scores(r, piece, tile, masked_at) if waiting is None else waiting
        waiting = _scores(r, after, tile, masked_at) if sizes.ahead and after else None
        _accumulate(r, piece, here, sizes, tile, masked_at)


def _scores(
    r: Refs, piece: Piece, tile: Tile, masked_at: Int32[Array, ""] | None
) -> Float[Array, "pq pkv"]:
    """The scores of a piece, -inf where a pair does not count."""
    q_at, kv_at = pl.ds(*piece.q), pl.ds(*piece.kv)
    scores = capped(matmul(r.q[q_at], r.k[kv_at], ROWS), tile)
    if masked_at is None:
        return scores
    assert r.q_mask is not None and r.kv_mask is not None
    q_mask = [
        across(column(r.q_mask[n : n + 1, q_at]), piece.kv[1]) for n in range(r.q_mask.shape[0])
    ]
    kv_mask = [r.kv_mask[n : n + 1, kv_at] for n in range(r.kv_mask.shape[0])]
    return jnp.where(seen(q_mask, kv_mask, tile), scores, -jnp.inf)


def _accumulate(
    r: Refs,
    piece: Piece,
    scores: Float[Array, "pq pkv"],
    sizes: Sizes,
    tile: Tile,
    masked_at: Int32[Array, ""] | None,
) -> None:
    """Softmax and accumulation of a piece."""
    c, (start, width), at = exponent(tile), piece.kv, pl.ds(*piece.q)
    v = r.v[pl.ds(start, width)]
    if masked_at is not None and sizes.s % sizes.block_kv:  # Behind the last key lies anything.
        key = jax.lax.broadcasted_iota(jnp.int32, v.shape, 0)
        v = jnp.where(key < sizes.s - start - masked_at * sizes.block_kv, v, jnp.zeros_like(v))
    before = r.m[at]
    m = jnp.maximum(before, scores.max(1, keepdims=True))
    p = jnp.exp2((scores - across(m, width)) * c)
    shrink = jnp.exp2((before - m) * c)
    parts = [p[:, lane : lane + LANES] for lane in range(0, width, LANES)]
    r.m[at] = m
    r.l[at] = shrink * r.l[at] + functools.reduce(jnp.add, parts)
    r.acc[at] = across(shrink, sizes.Hv) * r.acc[at] + matmul(p.astype(v.dtype), v, PLAIN)


def _end(r: Refs, tile: Tile) -> None:
    """Output and natural-log lse of a block of queries; 0 and -inf where a row saw nothing."""
    total = jnp.broadcast_to(r.l[...].sum(1, keepdims=True), r.l.shape)
    saw = total != 0  # NaN is seen, and stays
    total = jnp.where(saw, total, 1.0)
    r.out[...] = r.acc[...] / across(total, r.acc.shape[1])
    lse = jnp.where(saw, r.m[...] * factor(tile) + jnp.log(total), -jnp.inf)
    r.lse[...] = lse.T[:1]
