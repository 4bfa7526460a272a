"""Backward tile: `_kernels.backward_kernel`, and what it needs made ready."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from burst_kernels._config import TileConfig
from burst_kernels._operands import apart
from burst_kernels._problem import Problem, problem_of
from burst_kernels._tile import Onto, Tile
from burst_kernels.triton._config import Tiles, tiles_for
from burst_kernels.triton._launch import Call, run
from burst_kernels.triton._operands import mapped, mask_of, mask_operands, powers_of_two, sizes_of

# Operands before those that the results are added to.
_BEFORE_ONTO = 7 + 5 + 3


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

    def backward(arrays: tuple, tile: Tile) -> tuple[Array, ...]:
        q, k, v, *_ = arrays
        problem = problem_of(q, *apart(k, v), tile)
        return _backward(problem, arrays, tile, tiles_for(problem, config))

    onto = onto or (None, None, None)
    dq, dk, dv = mapped(backward, (q, k, v, do, lse, delta, onto), tile)
    return dq, dk, dv


def _backward(problem: Problem, arrays: tuple, tile: Tile, tiles: Tiles) -> tuple[Array, ...]:
    q, k, v, do, lse, delta, onto = arrays
    p, powers = problem, None
    if q.dtype == jnp.float16:  # score gradients overflow it
        powers = powers_of_two(do, k[1] if v is None else v, lse, delta)
    cut = tiles.backward
    mask = mask_of(tile, p, cut.block_q, cut.block_kv, like=q)
    sizes = sizes_of(
        p, tile, mask, cut.block_q, cut.block_kv,
        powers=powers is not None, v_at=0 if v is not None else k.size // 2,
        onto=tuple(x is not None for x in onto),
    )  # fmt: skip
    call = Call(
        kernel="backward_kernel",
        sizes=sizes,
        programs=sizes.key_programs + sizes.query_programs,
        launch=tiles.launch(cut),
        aliases={_BEFORE_ONTO + i: i for i, x in enumerate(onto) if x is not None},
    )
    by_keys = None if mask is None else mask.queries_of_keys()
    by_queries = None if mask is None else mask.keys_of_queries()
    operands = (
        q, k, k if v is None else v, do, lse, delta, q if powers is None else powers,
        *mask_operands(mask, by_keys, q),
        *mask_operands(mask, by_queries, q)[2:], *(q if x is None else x for x in onto),
    )  # fmt: skip
    rows = (p.B, p.K, p.s)
    return run(call, operands, ((p.B, p.N, p.t, p.H), (*rows, p.H), (*rows, p.Hv)))
