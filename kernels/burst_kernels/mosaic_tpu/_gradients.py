"""What the backward kernels share: operands, block specs, and the scores of a pair of blocks.

Scores are held transposed, [keys, queries]: lse, delta and the mask's query side then lie along
lanes, as they come from memory, and dk and dv need no transposition.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float, Int

from burst_kernels._config import TileConfig
from burst_kernels._tile import Tile
from burst_kernels.mosaic_tpu._active import (
    Active,
    Order,
    active_pairs,
    every_pair,
    of_equal_rows,
    padded_tokens,
)
from burst_kernels.mosaic_tpu._config import chip_name, vmem_limit
from burst_kernels.mosaic_tpu._scores import (
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

# dot_general: columns against columns (k^T ds).
COLUMNS = (((0,), (0,)), ((), ()))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Geometry:
    """The static sizes of one call.

    Attributes:
        B, N, K, t, s, H, Hv: see the tile contract.
        block_q, block_kv: tokens of a block, at most t and s; the last block may be shorter.
        block_compute: keys whose scores are held at once.
    """

    B: int
    N: int
    K: int
    t: int
    s: int
    H: int
    Hv: int
    block_q: int
    block_kv: int
    block_compute: int

    @property
    def G(self) -> int:
        return self.N // self.K

    @property
    def num_q(self) -> int:
        return -(-self.t // self.block_q)

    @property
    def num_kv(self) -> int:
        return -(-self.s // self.block_kv)

    @property
    def ragged(self) -> bool:
        """Whether a block reaches beyond the tokens, so that a mask is needed in any case."""
        return bool(self.t % self.block_q or self.s % self.block_kv)


class Operands(NamedTuple):
    """Arrays in HBM or, inside a kernel, references to blocks; what is absent is None.

    Attributes:
        q, k, v, do: see the tile contract.
        lse, delta: [B, N, 1, t].
        q_mask, kv_mask: what masks ask of the tokens, [b, rows, n], where some pairs are masked.
        dq, dk, dv: what to add to.
    """

    q: Array
    k: Array
    v: Array
    do: Array
    lse: Array
    delta: Array
    q_mask: Array | None = None
    kv_mask: Array | None = None
    dq: Array | None = None
    dk: Array | None = None
    dv: Array | None = None


class Place(NamedTuple):
    """What a step of a grid computes: int32 scalars. `row`: of the tokens."""

    batch: Int[Array, ""]
    row: Int[Array, ""]
    head: Int[Array, ""]
    kv_head: Int[Array, ""]
    i: Int[Array, ""]
    j: Int[Array, ""]


def active_steps(
    g: Geometry, tile: Tile, like: Array, order: Order, *, cover: bool
) -> tuple[Active, Array | None, Array | None]:
    """The steps of a grid; what masks ask of the tokens, where some pairs are masked."""
    if not tile.masked and not g.ragged:
        return every_pair(g.num_q, g.num_kv, order), None, None
    q, kv = of_equal_rows(tile.queries(g.t), tile.keys(g.s))
    if not tile.masked:  # Constants must vary over the mesh axes that the operands vary over.
        q, kv = jax.tree.map(lambda x: jnp.zeros_like(like, shape=x.shape, dtype=x.dtype), (q, kv))
    q, kv = padded_tokens(q, g.block_q), padded_tokens(kv, g.block_kv)
    active = active_pairs(q, kv, tile, blocks=(g.block_q, g.block_kv), order=order, cover=cover)
    return active, query_mask(q, tile), key_mask(kv)


def block_specs(g: Geometry, x: Operands, place: Callable[..., Place]) -> dict[str, pl.BlockSpec]:
    """The block of each operand, absent ones too, at the step `place(*grid indices, steps)`."""

    def spec(block: tuple, index: Callable[[Place], tuple]) -> pl.BlockSpec:
        # With x64 on, an index that is a Python integer would be an int64, which no TPU has.
        return pl.BlockSpec(block, lambda *args: tuple(map(jnp.int32, index(place(*args)))))

    def of_queries(width: int) -> pl.BlockSpec:
        return spec((None, None, g.block_q, width), lambda p: (p.batch, p.head, p.i, 0))

    def of_keys(width: int) -> pl.BlockSpec:
        return spec((None, None, g.block_kv, width), lambda p: (p.batch, p.kv_head, p.j, 0))

    row = spec((None, None, 1, g.block_q), lambda p: (p.batch, p.head, 0, p.i))
    q_rows, kv_rows = (0 if a is None else a.shape[1] for a in (x.q_mask, x.kv_mask))
    return dict(
        q=of_queries(g.H),
        k=of_keys(g.H),
        v=of_keys(g.Hv),
        do=of_queries(g.Hv),
        lse=row,
        delta=row,
        q_mask=spec((None, q_rows, g.block_q), lambda p: (p.row, 0, p.i)),
        kv_mask=spec((None, kv_rows, g.block_kv), lambda p: (p.row, 0, p.j)),
        dq=of_queries(g.H),
        dk=of_keys(g.H),
        dv=of_keys(g.Hv),
    )


def launch(
    kernel: Callable,
    active: Active,
    x: Operands,
    results: dict[str, Array],
    *,
    grid: tuple,
    specs: dict[str, pl.BlockSpec],
    scratch: Sequence,
    config: TileConfig,
    cost: pl.CostEstimate,
    name: str,
) -> list[Float[Array, "..."]]:
    """Runs a kernel over the steps of a grid; its first two dimensions are for any core.

    Args:
        kernel: is given steps, operands, results, scratch.
        active: the steps; `grid` has their count.
        x: operands. Those with the name of a result are written over, if nothing else holds them.
        results: float32; by their names in `Operands`, an array of the same shape.
        grid: its size.
        specs: the block of each operand.
        scratch: what the kernel asks for beside.
        config: for the chip, and whether to interpret.
        cost: what XLA's scheduler may hide behind the kernel.
        name: of the kernel.
    """
    varying = jax.typeof(x.q).manual_axis_type
    grid = tuple(_size_of_grid(size, config) for size in grid)
    shapes = {name: a.shape for name, a in results.items()}
    if config.interpret:  # jax 0.10's interpreter gives back aliased results padded to blocks.
        for result in (n for n in results if getattr(x, n) is not None):
            whole = _whole_blocks(getattr(x, result), specs[result])
            x, shapes[result] = x._replace(**{result: whole}), whole.shape
    operands = {name: a for name, a in zip(x._fields, x, strict=True) if a is not None}
    places = {name: place for place, name in enumerate(operands, start=1)}  # 0: the steps.
    found = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=grid,
            in_specs=[x._replace(**{name: specs[name] for name in operands})],
            out_specs=[specs[name] for name in results],
            scratch_shapes=scratch,
        ),
        out_shape=[
            jax.ShapeDtypeStruct(shape, jnp.float32, manual_axis_type=varying)
            for shape in shapes.values()
        ],
        input_output_aliases={places[r]: n for n, r in enumerate(results) if r in places},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=(
                *[pltpu.PARALLEL] * 2,
                *[pltpu.ARBITRARY] * (len(grid) - 2),
            ),
            vmem_limit_bytes=vmem_limit(chip_name(config)),
        ),
        cost_estimate=cost,
        interpret=pltpu.InterpretParams() if config.interpret else False,
        name=name,
    )(active.steps, x)
    return [a[tuple(map(slice, b.shape))] for a, b in zip(found, results.values(), strict=True)]


def cost(g: Geometry, widths: int, moved: int) -> pl.CostEstimate:
    """The cost of a kernel, as if nothing were masked.

    Args:
        g: sizes.
        widths: the third dimension of all products over pairs of tokens, added up.
        moved: bytes read and written.
    """
    pairs = g.B * g.N * g.t * g.s
    return pl.CostEstimate(flops=2 * pairs * widths, transcendentals=pairs, bytes_accessed=moved)


def _size_of_grid(count: Array | int, config: TileConfig) -> Array | int:
    """How many steps the grid has.

    Interpreted where mesh axes are checked, indices of a grid whose size varies would vary too, and
    the interpreter cannot let them meet constants. What comes from the host varies over nothing.
    """
    if isinstance(count, int) or not config.interpret:
        return count
    return jax.pure_callback(lambda x: x, jax.ShapeDtypeStruct((), jnp.int32), count)


def _whole_blocks(x: Array, spec: pl.BlockSpec) -> Array:
    """x padded to whole blocks, where it is read by blocks."""
    if spec.block_shape is None:
        return x
    sizes = [size if isinstance(size, int) else 1 for size in spec.block_shape]
    return jnp.pad(x, [(0, -n % size) for n, size in zip(x.shape, sizes, strict=True)])


class Part(NamedTuple):
    """Some keys of a pair of blocks against all its queries, ready to be multiplied.

    Attributes:
        keys: which rows of the block of keys.
        q, k, do: operands.
        p: probabilities, transposed.
        ds: gradients of the scores before the scale, transposed.
    """

    keys: pl.Slice
    q: Float[Array, "r H"]
    k: Float[Array, "c H"]
    do: Float[Array, "r Hv"]
    p: Float[Array, "c r"]
    ds: Float[Array, "c r"]

    def dq_columns(self) -> Float[Array, "H r"]:
        """dq before the scale, transposed: then only this is turned, and not the larger ds."""
        return matmul(self.k, self.ds, COLUMNS)


def parts(
    g: Geometry,
    x: Operands,
    tile: Tile,
    i: Int[Array, ""],
    j: Int[Array, ""],
    *,
    masked: bool,
) -> Iterator[Part]:
    """The parts of the pair of blocks (i, j), one after the other."""
    q, do, lse, delta = x.q[...], x.do[...], x.lse[...], x.delta[...]
    # exp(scores - inf) = 0: a row that sees nothing takes part in no gradient, and no NaN arises.
    lse = jnp.where(jnp.isneginf(lse), jnp.inf, lse * (1 / factor(tile)))
    if masked and g.t % g.block_q:  # What lies behind the last query may be NaN.
        real = g.t - i * g.block_q
        q, do = _first(q, real, 0), _first(do, real, 0)
        lse, delta = _first(lse, real, 1, jnp.inf), _first(delta, real, 1)
    for start in range(0, g.block_kv, g.block_compute):
        keys = pl.Slice(start, min(g.block_compute, g.block_kv - start))
        k, v, visible = x.k[keys, :], x.v[keys, :], None
        if masked:
            visible = _visible(x, keys, tile)
            if g.s % g.block_kv:
                real = g.s - j * g.block_kv - start
                k, v = _first(k, real, 0), _first(v, real, 0)
        # scores
        scores = capped(matmul(k, q, ROWS), tile)
        # softmax: a probability is at most 1; that is said, and not left to the rounding of an lse.
        p = jnp.exp2(jnp.minimum(scores - lse, 0.0) * exponent(tile))
        if visible is not None:
            p = jnp.where(visible, p, 0.0)
        ds = p * (matmul(v, do, ROWS) - delta)
        if tile.logits_soft_cap is not None:
            ds *= 1.0 - (scores * (1 / tile.logits_soft_cap)) ** 2
        yield Part(keys, q, k, do, p.astype(q.dtype), ds.astype(q.dtype))


def _visible(x: Operands, keys: pl.Slice, tile: Tile) -> Bool[Array, "c r"]:
    """Which pairs of a part count, transposed."""
    assert x.q_mask is not None and x.kv_mask is not None
    queries = [x.q_mask[n : n + 1, :] for n in range(x.q_mask.shape[0])]
    width = queries[0].shape[1]
    columns = (column(x.kv_mask[n : n + 1, keys]) for n in range(x.kv_mask.shape[0]))
    return seen(queries, [across(one, width) for one in columns], tile)


def _first(x: Array, count: Int[Array, ""], axis: int, value: float = 0.0) -> Array:
    """x with all but the first `count` elements of an axis replaced."""
    place = jax.lax.broadcasted_iota(jnp.int32, x.shape, axis)
    return jnp.where(place < count, x, jnp.asarray(value, x.dtype))
