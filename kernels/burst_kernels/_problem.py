"""`Problem`: what must be known of a tile, before it is traced, to say who can compute it."""

from typing import NamedTuple

from jaxtyping import DTypeLike


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
