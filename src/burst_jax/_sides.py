"""The two sides of a tile, queries and keys, and all that is static about one call."""

import dataclasses
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, Int

import burst_kernels
from burst_jax._plan import Choice
from burst_jax._schedule import Schedule, Side, make_schedule
from burst_jax._sharding import AxisName, ShardTokens
from burst_jax._wire import Message, part


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ring:
    """Everything static about one call, the same on every device.

    Attributes:
        axis_name: mesh axis of the ring.
        queries, keys: where each side's tokens lie.
        explicit: whether the caller gave positions, which then travel with their side.
        positions_matter: False where neither mask nor padding asks for positions.
        scale, logits_soft_cap, left, right: see `burst_kernels.Tile`.
        plan: what travels, and how.
        tiles: the tile backend, and how it cuts its tiles.
    """

    axis_name: AxisName
    queries: ShardTokens
    keys: ShardTokens
    explicit: bool
    positions_matter: bool
    scale: float
    logits_soft_cap: float | None
    left: int | None
    right: int | None
    plan: Choice
    tiles: burst_kernels.Chosen

    def schedule(self, travels: Side) -> Schedule:
        """The hops, where `travels` is the side that moves."""
        return make_schedule(
            travels=travels,
            layout="explicit" if self.explicit else self.queries.layout,
            num_shards=self.queries.num_shards,
            q_local=self.queries.local,
            kv_local=self.keys.local,
            q_length=self.queries.length,
            kv_length=self.keys.length,
            left=self.left,
            right=self.right,
        )


class Queries(NamedTuple):
    """The query side of a tile; do, lse and delta only in the backward, the rest if it matters."""

    q: Float[Array, "B N t H"]
    do: Float[Array, "B N t Hv"] | None = None
    lse: Float[Array, "B N t"] | None = None
    delta: Float[Array, "B N t"] | None = None
    positions: Int[Array, "_b t"] | None = None
    segments: Int[Array, "C _b t"] | None = None


class Keys(NamedTuple):
    """The key side of a tile. Where v is None, k is both of them as they came, [2, B, K, s, H]."""

    k: Float[Array, "..."]
    v: Float[Array, "B K s Hv"] | None
    positions: Int[Array, "_b s"] | None = None
    segments: Int[Array, "C _b s"] | None = None


AnySide = TypeVar("AnySide", bound=Queries | Keys)


def turned(side: AnySide) -> AnySide:
    """Tokens before heads to heads before tokens, or back: once a call, not once a hop."""
    names = [n for n in ("q", "do", "lse", "delta", "k", "v") if getattr(side, n, None) is not None]
    return side._replace(**{name: getattr(side, name).swapaxes(1, 2) for name in names})


def halves(side: AnySide) -> tuple[AnySide, AnySide | None]:
    """A side's tokens in two halves; a single token stays whole."""
    tokens = side[0].shape[2]
    if tokens < 2:
        return side, None

    def part(start: int, stop: int) -> AnySide:
        cut = {
            name: jax.lax.slice_in_dim(x, start, stop, axis=1 if name == "positions" else 2)
            for name, x in side._asdict().items()
            if x is not None
        }
        return side._replace(**cut)

    return part(0, tokens // 2), part(tokens // 2, tokens)


def at(shard: Int[Array, ""] | int, side: AnySide, tokens: ShardTokens, ring: Ring) -> AnySide:
    """A side with the positions of the tokens that device `shard` holds, unless it brings them."""
    if side.positions is not None or not ring.positions_matter:
        return side
    return side._replace(positions=tokens.positions(shard))


def hide_padding(me: Int[Array, ""] | int, side: AnySide, tokens: ShardTokens) -> AnySide:
    """Whatever the caller's own positions say of it, the sharding's padding stays padding."""
    if side.positions is None or not tokens.padded:
        return side
    return side._replace(positions=jnp.where(tokens.positions(me) < 0, -1, side.positions))


def tile_mask(queries: Queries, keys: Keys, ring: Ring) -> burst_kernels.Tile:
    """What counts between two sides, for the tile kernels."""
    return burst_kernels.Tile(
        scale=ring.scale,
        logits_soft_cap=ring.logits_soft_cap,
        left=ring.left,
        right=ring.right,
        q_positions=queries.positions,
        kv_positions=keys.positions,
        q_segments=queries.segments,
        kv_segments=keys.segments,
    )


def recast(side: AnySide, dtype: DTypeLike | None) -> AnySide:
    """A side with q and do, or k and v, in another dtype; the statistics keep theirs."""
    if dtype is None:
        return side
    payload = {name: getattr(side, name) for name in ("q", "do", "k", "v") if name in side._fields}
    return side._replace(**{n: x.astype(dtype) for n, x in payload.items() if x is not None})


def arrived(message: Any, travels: Side, ring: Ring) -> Any:
    """The traveller that a message is; k and v stay one array for tiles that read them so."""
    if not isinstance(message, Message):
        return message
    stacked = message.stacked and burst_kernels.BACKENDS[ring.tiles.name].stacked
    if stacked and travels == "kv":
        return Keys(message.buffer, None)
    return part(message)
