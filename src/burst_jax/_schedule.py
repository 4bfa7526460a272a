"""Who holds which shard at which hop, in plain integers: nothing here knows arrays or devices.

A shard travels round the ring and visits devices. `Schedule.offsets` lists the visits: at visit i
device r works on the traveller of device `r - offsets[i] (mod R)`. Visits that would find nothing
visible on any device are left out, and the traveller jumps over them.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterator
from typing import Literal, NamedTuple

Side = Literal["kv", "q"]
LAYOUTS = ("contiguous", "zigzag", "striped")


class Piece(NamedTuple):
    """Positions `start, start + step, ...` below `stop`."""

    start: int
    stop: int
    step: int


class Visit(NamedTuple):
    """One hop: whose traveller is here, and what is sent while its tile is computed.

    Attributes:
        offset: the traveller here belongs to device `me - offset`.
        behind: how far the travelling result of the previous hop moves meanwhile; None: nothing.
        onward: how far the message moves on meanwhile; None: this was its last visit.
    """

    offset: int
    behind: int | None
    onward: int | None


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The visits of a one-way ring of `num_shards` devices, after the tile at home."""

    num_shards: int
    offsets: tuple[int, ...]

    @property
    def first(self) -> int:
        """How far a message moves to its first visit."""
        return self.offsets[0]

    @property
    def homeward(self) -> int:
        """How far a traveller is from home after its last visit, going on the same way."""
        return self.num_shards - self.offsets[-1]

    def visits(self, *, returns: bool) -> Iterator[tuple[list[int], Visit]]:
        """Runs of visits that send alike: offsets of the run, and the first visit as its model.

        A run becomes one rolled loop; a full ring has at most three, whatever R.
        """
        shifts = [b - a for a, b in itertools.pairwise((0, *self.offsets))]
        behind = [None, *shifts[1:]] if returns else [None] * len(shifts)
        onward = [*shifts[1:], None]
        visits = itertools.starmap(Visit, zip(self.offsets, behind, onward, strict=True))
        for _, run in itertools.groupby(visits, key=lambda visit: visit[1:]):
            run = list(run)
            yield [visit.offset for visit in run], run[0]

    def to(self, shift: int) -> list[tuple[int, int]]:
        """Source and destination of every device, for a move by `shift`."""
        return [(r, (r + shift) % self.num_shards) for r in range(self.num_shards)]


def pieces(layout: str, shard: int, num_shards: int, local: int, length: int) -> list[Piece]:
    """The positions that a shard of `local` tokens holds, without padding (>= `length`)."""
    if layout == "contiguous":
        spans = [Piece(shard * local, (shard + 1) * local, 1)]
    elif layout == "zigzag":
        chunk = local // 2
        chunks = (shard, 2 * num_shards - 1 - shard)
        spans = [Piece(c * chunk, (c + 1) * chunk, 1) for c in chunks]
    else:
        spans = [Piece(shard, shard + local * num_shards, num_shards)]
    return [Piece(a, min(b, length), step) for a, b, step in spans if a < min(b, length)]


def _meet(q: Piece, kv: Piece, left: int | None, right: int | None) -> bool:
    """Whether some query of q may see some key of kv. May say yes in vain, never no."""
    last_q, last_kv = (p.start + (p.stop - 1 - p.start) // p.step * p.step for p in (q, kv))
    low = kv.start - last_q if left is None else max(-left, kv.start - last_q)
    high = last_kv - q.start if right is None else min(right, last_kv - q.start)
    if q.step == 1 and kv.step == 1:
        return low <= high
    # Differences are kv.start - q.start modulo the common step: is one of them in [low, high]?
    step = min(q.step, kv.step)
    return low + (kv.start - q.start - low) % step <= high


@functools.lru_cache(maxsize=256)
def make_schedule(
    *,
    travels: Side,
    layout: str,
    num_shards: int,
    q_local: int,
    kv_local: int,
    q_length: int,
    kv_length: int,
    left: int | None,
    right: int | None,
) -> Schedule:
    """The hops at which some device has something to compute.

    Args:
        travels: which side moves.
        layout: one of `LAYOUTS`, or "explicit" where positions are data: no hop is left out.
        num_shards: R.
        q_local, kv_local: tokens of one shard, t and s.
        q_length, kv_length: true tokens, T and S; what lies beyond is padding.
        left, right: the window, as in `Mask`.
    """
    R = num_shards
    needed = set(range(1, R))
    if layout != "explicit" and (left is not None or right is not None):
        q = [pieces(layout, r, R, q_local, q_length) for r in range(R)]
        kv = [pieces(layout, r, R, kv_local, kv_length) for r in range(R)]
        needed = {
            # Keys of device me - offset visit queries at me; with queries moving, the reverse.
            (r - other if travels == "kv" else other - r) % R
            for r, other in itertools.product(range(R), repeat=2)
            if r != other
            and any(_meet(a, b, left, right) for a, b in itertools.product(q[r], kv[other]))
        }
    return Schedule(R, tuple(sorted(needed)))
