"""Backward tile: a kernel for dk and dv, one for dq, and what they need made ready."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from burst_kernels._config import TileConfig
from burst_kernels._operands import apart, powers_of_two
from burst_kernels._problem import Problem, problem_of
from burst_kernels._tile import Onto, Tile
from burst_kernels.triton._config import Tiles, tiles_for
from burst_kernels.triton._launch import Call, run
from burst_kernels.triton._operands import mapped, mask_of, mask_operands, sizes_of


def tile_backward(
    q: Float[Array, "B N t H"],
    k: Float[Array, "B K s H"] | Float[Array, "2 B K s H"],
    v: Float[Array, "B K s Hv"] | None,
    do: Float[Array, "B N t Hv"],
    lse: Float[Array, "B N t"],
    delta: Float[Array, "B N t"],
    tile: Tile,
    config: TileConfig | None = None,
    onto: Onto | None = None,
) -> tuple[Float[Array, "B N t H"], Float[Array, "B K s H"], Float[Array, "B K s Hv"]]:
    """Gradients of one tile, given the whole row's lse and delta. See the tile contract."""

    def backward(arrays: tuple, tile: Tile) -> tuple[Array, Array, Array]:
        q, k, v, *rest, onto = arrays
        problem = problem_of(q, *apart(k, v), tile)
        tiles, rest = tiles_for(problem, config), (k, v, *rest)
        dk, dv = _keys(problem, q, *rest, tile, tiles, onto[1:])
        return _queries(problem, q, *rest, tile, tiles, onto[0]), dk, dv

    onto = onto or (None, None, None)
    return mapped(backward, stacked=v is None)((q, k, v, do, lse, delta, onto), tile)


def _keys(
    problem: Problem,
    q: Array,
    k: Array,
    v: Array | None,
    do: Array,
    lse: Array,
    delta: Array,
    tile: Tile,
    tiles: Tiles,
    onto: tuple[Array | None, Array | None],
) -> tuple[Array, Array]:
    """dk and dv."""
    cut, p = tiles.backward_keys, problem
    mask = mask_of(tile, p, cut.block_q, cut.block_kv, like=q)
    active = None if mask is None else mask.queries_of_keys()
    powers = _powers(q, k, v, do, lse, delta)
    sizes = sizes_of(
        p, tile, mask, cut.block_q, cut.block_kv, precision=tiles.precision,
        powers=powers is not None, v_at=0 if v is not None else k.size // 2,
        onto=tuple(x is not None for x in onto),
    )  # fmt: skip
    operands = (
        q, k, k if v is None else v, do, lse, delta, q if powers is None else powers,
        *mask_operands(mask, active, q), *(q if x is None else x for x in onto),
    )  # fmt: skip
    aliases = {12 + i: i for i, x in enumerate(onto) if x is not None}
    rows = (p.B, p.K, p.s)
    programs = p.B * p.K * sizes.num_kv
    call = Call("backward_keys_kernel", sizes, programs, tiles.launch(cut), aliases)
    dk, dv = run(call, operands, ((*rows, p.H), (*rows, p.Hv)))
    return dk, dv


def _queries(
    problem: Problem,
    q: Array,
    k: Array,
    v: Array | None,
    do: Array,
    lse: Array,
    delta: Array,
    tile: Tile,
    tiles: Tiles,
    onto: Array | None,
) -> Array:
    """dq."""
    cut, p = tiles.backward_queries, problem
    mask = mask_of(tile, p, cut.block_q, cut.block_kv, like=q)
    active = None if mask is None else mask.keys_of_queries()
    powers = _powers(q, k, v, do, lse, delta)
    sizes = sizes_of(
        p, tile, mask, cut.block_q, cut.block_kv, precision=tiles.precision,
        powers=powers is not None, v_at=0 if v is not None else k.size // 2,
        onto=(onto is not None,),
    )  # fmt: skip
    operands = (
        q, k, k if v is None else v, do, lse, delta, q if powers is None else powers,
        *mask_operands(mask, active, q), q if onto is None else onto,
    )  # fmt: skip
    aliases = {} if onto is None else {12: 0}
    programs = p.B * p.N * sizes.num_q
    call = Call("backward_queries_kernel", sizes, programs, tiles.launch(cut), aliases)
    (dq,) = run(call, operands, ((p.B, p.N, p.t, p.H),))
    return dq


def _powers(
    q: Array, k: Array, v: Array | None, do: Array, lse: Array, delta: Array
) -> Array | None:
    """Score gradients overflow float16: a power of two for them, and its inverse."""
    if q.dtype != jnp.float16:
        return None
    return powers_of_two(do, k[1] if v is None else v, lse, delta)
