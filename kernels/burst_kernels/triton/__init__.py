"""Attention tiles in Triton, launched by jax_triton: for the NVIDIA GPUs that `mosaic_gpu` refuses.

Importing this loads neither Triton nor jax_triton, which are an extra: `burst-jax[triton]`.
"""

from jaxtyping import Array, Float

from burst_kernels._config import TileConfig
from burst_kernels._tile import Onto, Tile
from burst_kernels.triton._chips import refuses as refuses
from burst_kernels.triton._chips import unavailable as unavailable
from burst_kernels.triton._config import configure as configure


def tile_forward(
    q: Float[Array, "B N t H"],
    k: Float[Array, "B K s H"] | Float[Array, "2 B K s H"],
    v: Float[Array, "B K s Hv"] | None,
    tile: Tile,
    config: TileConfig | None = None,
    onto: tuple[Float[Array, "B N t Hv"], Float[Array, "B N t"]] | None = None,
) -> tuple[Float[Array, "B N t Hv"], Float[Array, "B N t"]]:
    """Attention of t queries to s keys. See the tile contract in `burst_kernels._tile`."""
    from burst_kernels.triton import _forward

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
    from burst_kernels.triton import _backward

    return _backward.tile_backward(q, k, v, do, lse, delta, tile, config, onto)
