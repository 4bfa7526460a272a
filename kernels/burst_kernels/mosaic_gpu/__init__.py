"""Attention tiles for NVIDIA Hopper in Pallas Mosaic GPU: wgmma, TMA, specialised warpgroups.

Importing this loads no Pallas: its GPU half takes as long to import as the rest of JAX, and only a
machine with such a GPU, or a compiler for one, has a use for it.
"""

from jaxtyping import Array, Float

from burst_kernels._config import TileConfig
from burst_kernels._tile import Onto, Tile
from burst_kernels.mosaic_gpu._config import configure as configure
from burst_kernels.mosaic_gpu._config import refuses as refuses
from burst_kernels.mosaic_gpu._config import unavailable as unavailable


def tile_forward(
    q: Float[Array, "B N t H"],
    k: Float[Array, "B K s H"] | Float[Array, "2 B K s H"],
    v: Float[Array, "B K s Hv"] | None,
    tile: Tile,
    config: TileConfig | None = None,
    onto: tuple[Float[Array, "B N t Hv"], Float[Array, "B N t"]] | None = None,
) -> tuple[Float[Array, "B N t Hv"], Float[Array, "B N t"]]:
    """Attention of t queries to s keys. See the tile contract in `burst_kernels._tile`."""
    from burst_kernels.mosaic_gpu import _forward

    return _forward.tile_forward(q, k, v, tile, config, onto)


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
    from burst_kernels.mosaic_gpu import _backward

    return _backward.tile_backward(q, k, v, do, lse, delta, tile, config, onto)
