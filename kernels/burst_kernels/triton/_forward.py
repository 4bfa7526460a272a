"""Forward tile: `_kernels.forward_kernel`, and what it needs made ready."""

from jaxtyping import Array, Float

from burst_kernels._config import TileConfig
from burst_kernels._operands import apart
from burst_kernels._problem import Problem, problem_of
from burst_kernels._tile import Tile
from burst_kernels.triton._config import Tiles, tiles_for
from burst_kernels.triton._launch import Call, run
from burst_kernels.triton._operands import mapped, mask_of, mask_operands, sizes_of


def tile_forward(
    q: Float[Array, "B N t H"],
    k: Float[Array, "B K s H"] | Float[Array, "2 B K s H"],
    v: Float[Array, "B K s Hv"] | None,
    tile: Tile,
    config: TileConfig | None = None,
    onto: tuple[Float[Array, "B N t Hv"], Float[Array, "B N t"]] | None = None,
) -> tuple[Float[Array, "B N t Hv"], Float[Array, "B N t"]]:
    """Attention of t queries to s keys. See the tile contract in `burst_kernels._tile`."""

    def forward(arrays: tuple, tile: Tile) -> tuple[Array, Array]:
        q, k, v, onto = arrays
        problem = problem_of(q, *apart(k, v), tile)
        return _forward(problem, q, k, v, tile, tiles_for(problem, config), onto)

    out, lse = mapped(forward, (q, k, v, onto), tile)
    return out, lse


def _forward(
    problem: Problem,
    q: Array,
    k: Array,
    v: Array | None,
    tile: Tile,
    tiles: Tiles,
    onto: tuple[Array, Array] | None,
) -> tuple[Array, Array]:
    cut, p = tiles.forward, problem
    mask = mask_of(tile, p, cut.block_q, cut.block_kv, like=q)
    active = None if mask is None else mask.keys_of_queries()
    sizes = sizes_of(
        p, tile, mask, cut.block_q, cut.block_kv, powers=False,
        v_at=0 if v is not None else k.size // 2, onto=(onto is not None,) * 2,
    )  # fmt: skip
    operands = (q, k, k if v is None else v, *mask_operands(mask, active, q), *(onto or (q, q)))
    call = Call(
        kernel="forward_kernel",
        sizes=sizes,
        programs=sizes.query_programs,
        launch=tiles.launch(cut),
        aliases={} if onto is None else {8: 0, 9: 1},
    )
    rows = (p.B, p.N, p.t)
    out, lse = run(call, operands, ((*rows, p.Hv), rows))
    return out, lse
