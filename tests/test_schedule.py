"""The ring's schedule, played out in plain Python: who meets whom, and that nothing is lost."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from burst_jax._schedule import LAYOUTS, Schedule, make_schedule, pieces

WINDOWS = ((None, None), (None, 0), (0, 0), (3, 0), (2, 5), (None, 4), (7, None), (40, 0))


def holdings(layout: str, R: int, local: int, length: int) -> list[np.ndarray]:
    """The positions on each device, by the layouts' definitions; padding left out."""
    tokens = np.arange(R * local)
    match layout:
        case "contiguous":
            held = [tokens[r * local : (r + 1) * local] for r in range(R)]
        case "zigzag":
            chunks = tokens.reshape(2 * R, local // 2)
            held = [np.concatenate((chunks[r], chunks[2 * R - 1 - r])) for r in range(R)]
        case "striped":
            held = [tokens[r::R] for r in range(R)]
    return [x[x < length] for x in held]


def some_pair_counts(q: np.ndarray, kv: np.ndarray, left: int | None, right: int | None) -> bool:
    ahead = kv[None, :] - q[:, None]
    seen = np.ones_like(ahead, bool)
    if right is not None:
        seen &= ahead <= right
    if left is not None:
        seen &= -ahead <= left
    return bool(seen.any())


def play(schedule: Schedule, returns: bool) -> list[list[int]]:
    """Moves messages and results as the ring does.

    Returns whom each device met, in order. Raises where a message is not whose it is said to be,
    or where a traveller's result does not come home complete.
    """
    R = schedule.num_shards

    def move(held: list, shift: int) -> list:
        arrived = [None] * R
        for source, target in schedule.to(shift):
            arrived[target] = held[source]
        return arrived

    met: list[list[int]] = [[r] for r in range(R)]
    if not schedule.offsets:
        return met
    message = move(list(range(R)), schedule.first)
    collected: list = [None] * R
    turn = 0
    for offsets, visit in schedule.visits(returns=returns):
        for offset in offsets:
            assert message == [(r - offset) % R for r in range(R)]
            if returns and turn > 0:
                collected = move(collected, visit.behind)
            else:
                assert visit.behind is None
            for r in range(R):
                met[r].append(message[r])
                so_far = collected[r] or {"whose": message[r], "visited": []}
                assert so_far["whose"] == message[r]
                collected[r] = {**so_far, "visited": [*so_far["visited"], r]}
            if not returns:
                collected = [None] * R
            message = [None] * R if visit.onward is None else move(message, visit.onward)
            turn += 1
    assert message == [None] * R, "something was sent that nobody uses"
    if returns:
        for r, result in enumerate(move(collected, schedule.homeward)):
            assert result["whose"] == r
            assert result["visited"] == [(r + offset) % R for offset in schedule.offsets]
    return met


def schedule_of(travels, layout, R, local, length, left, right) -> Schedule:
    return make_schedule(
        travels=travels, layout=layout, num_shards=R, q_local=local, kv_local=local,
        q_length=length, kv_length=length, left=left, right=right,
    )  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("travels", ["kv", "q"])
def test_every_pair_that_counts_is_met_exactly_once_and_no_hop_is_made_in_vain(travels, layout):
    for R, (left, right), missing in itertools.product(range(1, 17), WINDOWS, (0, 3)):
        local = 4
        length = max(1, R * local - missing)
        schedule = schedule_of(travels, layout, R, local, length, left, right)
        held = holdings(layout, R, local, length)
        met = play(schedule, returns=travels == "q")
        # Whom each device met: keys that came to its queries, or queries that came to its keys.
        pairs = [
            (r, other) if travels == "kv" else (other, r) for r in range(R) for other in met[r]
        ]
        assert len(pairs) == len(set(pairs)), "a pair of shards met twice"
        needed = {
            (q, kv)
            for q, kv in itertools.product(range(R), repeat=2)
            if some_pair_counts(held[q], held[kv], left, right)
        }
        assert needed <= set(pairs), (R, left, right, length)
        made = {(r - other) % R for r in range(R) for other in met[r]} - {0}
        sign = 1 if travels == "kv" else -1
        wanted = {sign * (q - kv) % R for q, kv in needed} - {0}
        assert made == wanted, (R, left, right, length)


@pytest.mark.parametrize("returns", [False, True])
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_any_set_of_visits_is_carried_out_and_every_traveller_comes_home(returns, data):
    R = data.draw(st.integers(1, 16))
    offsets = tuple(sorted(data.draw(st.sets(st.integers(1, R - 1))))) if R > 1 else ()
    met = play(Schedule(R, offsets), returns)
    assert met == [[r, *((r - o) % R for o in offsets)] for r in range(R)]


@pytest.mark.parametrize("R", [2, 3, 8, 64])
def test_a_full_ring_makes_one_hop_less_than_it_has_devices_in_at_most_three_loops(R):
    for travels in ("kv", "q"):
        schedule = schedule_of(travels, "contiguous", R, 2, 2 * R, None, None)
        assert schedule.offsets == tuple(range(1, R))
        for returns in (False, True):
            assert len(list(schedule.visits(returns=returns))) <= 3


def test_a_window_shorter_than_a_shard_needs_one_hop_whatever_R():
    for R in (4, 64):
        schedule = schedule_of("kv", "contiguous", R, 8, 8 * R, 5, 0)
        assert schedule.offsets == (1,)
        schedule = schedule_of("q", "contiguous", R, 8, 8 * R, 5, 0)
        assert schedule.offsets == (R - 1,)


def test_hops_to_shards_of_padding_alone_are_not_made():
    # 8 devices of 4 tokens, of which 6 are real: devices 2 ... 7 hold padding alone.
    schedule = schedule_of("kv", "contiguous", 8, 4, 6, None, 0)
    assert schedule.offsets == (1,)


def test_no_hop_is_left_out_where_positions_are_data():
    schedule = schedule_of("kv", "explicit", 8, 4, 32, 0, 0)
    assert schedule.offsets == tuple(range(1, 8))


def test_queries_and_keys_of_different_lengths_meet_too():
    for travels, layout, R in itertools.product(("kv", "q"), LAYOUTS, (1, 2, 3, 5)):
        q_held, kv_held = holdings(layout, R, 4, 4 * R - 1), holdings(layout, R, 10, 10 * R - 7)
        schedule = make_schedule(
            travels=travels, layout=layout, num_shards=R, q_local=4, kv_local=10,
            q_length=4 * R - 1, kv_length=10 * R - 7, left=4, right=2,
        )  # fmt: skip
        sign = 1 if travels == "kv" else -1
        wanted = {
            sign * (a - b) % R
            for a, b in itertools.product(range(R), repeat=2)
            if some_pair_counts(q_held[a], kv_held[b], 4, 2)
        }
        assert set(schedule.offsets) == wanted - {0}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pieces_are_the_positions_of_a_shard(layout):
    for R, local, missing in itertools.product((1, 2, 3, 8), (2, 4, 6), (0, 1, 5)):
        length = max(1, R * local - missing)
        for r, held in enumerate(holdings(layout, R, local, length)):
            spans = pieces(layout, r, R, local, length)
            found = [p for a, b, step in spans for p in range(a, b, step)]
            assert found == held.tolist()
