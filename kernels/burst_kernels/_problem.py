"""`Problem`: what must be known of a tile, before it is traced, to say who can compute it."""

from typing import NamedTuple

from jaxtyping import Array, DTypeLike, Float

from burst_kernels._tile import Tile


class Problem(NamedTuple):
    """One tile's sizes on one device, in the alphabet of the contract.

    Attributes:
        B, t, s, N, K, H, Hv: batch, query and key tokens, query and kv heads, head dims of q and k
            and of v. A caller may ask for tiles of fewer tokens than it names here.
        dtype: of q, k, v and do.
        soft_cap: whether scores are capped.
        masked: whether positions or segment ids are given.
        kinds: kinds of segment ids.
    """

    B: int
    t: int
    s: int
    N: int
    K: int
    H: int
    Hv: int
    dtype: DTypeLike
    soft_cap: bool = False
    masked: bool = False
    kinds: int = 0


def problem_of(
    q: Float[Array, "B N t H"], k: Float[Array, "B K s H"], v: Float[Array, "B K s Hv"], tile: Tile
) -> Problem:
    """The sizes of one tile."""
    (B, N, t, H), (_, K, s, Hv) = q.shape, v.shape
    kinds = 0 if tile.q_segments is None else tile.q_segments.shape[0]
    return Problem(
        B=B, t=t, s=s, N=N, K=K, H=H, Hv=Hv, dtype=q.dtype, masked=tile.masked, kinds=kinds,
        soft_cap=tile.logits_soft_cap is not None,
    )  # fmt: skip
