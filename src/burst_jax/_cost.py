"""What a call costs, predicted from its shapes: bytes, FLOP, time, memory. Units in every name."""

import dataclasses
from typing import Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np
from jaxtyping import DTypeLike

from burst_jax._masks import Mask
from burst_jax._schedule import Piece, Schedule, Side, make_schedule, pieces
from burst_jax._sharding import ShardTokens
from burst_kernels import accumulator_dtype

GIB = 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hardware:
    """The two rates that decide whether communication or computation binds.

    Attributes:
        name: what to call it.
        kind: "tpu", "gpu" or "cpu".
        flop_per_s: peak of dense bfloat16 matrix products of one device.
        link_bytes_per_s: what one device sends to its ring neighbour, one direction.
        memory_bytes: of one device.
    """

    name: str
    kind: str
    flop_per_s: float
    link_bytes_per_s: float
    memory_bytes: float

    def __post_init__(self) -> None:
        for field in ("flop_per_s", "link_bytes_per_s", "memory_bytes"):
            if not getattr(self, field) > 0:
                raise ValueError(f"Hardware({field}={getattr(self, field)!r}) must be > 0.")


# TPUs: "How to Scale Your Model" (jax-ml/scaling-book), table of TPU specs: bfloat16 FLOP/s and
# one-way bandwidth of one ICI link, which is what a one-way ring uses. GPUs: NVIDIA's data
# sheets (A100 and H100: SXM parts; B200: of HGX), dense bfloat16, half of what NVLink (L4: PCIe)
# has in both directions.
HARDWARE = {
    name: Hardware(
        name=name, kind=kind, flop_per_s=flop, link_bytes_per_s=link, memory_bytes=memory
    )
    for name, kind, flop, link, memory in (
        ("v4", "tpu", 2.75e14, 4.5e10, 32e9),
        ("v5e", "tpu", 1.97e14, 4.5e10, 16e9),
        ("v5p", "tpu", 4.59e14, 9e10, 96e9),
        ("v6e", "tpu", 9.2e14, 9e10, 32e9),
        ("a100", "gpu", 3.12e14, 3e11, 80e9),
        ("l4", "gpu", 1.21e14, 3.2e10, 24e9),
        ("h100", "gpu", 9.89e14, 4.5e11, 80e9),
        ("b200", "gpu", 2.25e15, 9e11, 180e9),
    )
}


def hardware_named(hardware: Hardware | str) -> Hardware:
    """A row of `HARDWARE`, or the caller's own."""
    if isinstance(hardware, Hardware):
        return hardware
    if hardware not in HARDWARE:
        raise ValueError(
            f"hardware={hardware!r} is not known; choose one of {', '.join(HARDWARE)}, or give a "
            "Hardware(name=..., kind=..., flop_per_s=..., link_bytes_per_s=..., memory_bytes=...)."
        )
    return HARDWARE[hardware]


@runtime_checkable
class _Dtypes(Protocol):
    """The fields of a Plan that sizes depend on; Plan itself is defined on top of this module."""

    @property
    def wire_dtype(self) -> DTypeLike | None: ...

    @property
    def gradient_dtype(self) -> DTypeLike | None: ...


@runtime_checkable
class _Travels(_Dtypes, Protocol):
    """A `Choice`: a plan that leaves neither side open."""

    @property
    def forward(self) -> Side: ...

    @property
    def backward(self) -> Side: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shapes:
    """The sizes on one device that costs depend on, in the alphabet of `jax.nn`.

    t, s: query and key tokens; N, K: query and kv heads; H, Hv: head dims of q, k and of v;
    item, wire, gradient, accumulator: bytes of an element of the arrays, of those on the wire, of
    a travelling gradient, of the accumulators.
    """

    B: int
    t: int
    s: int
    N: int
    K: int
    H: int
    Hv: int
    item: int
    wire: int
    gradient: int
    accumulator: int

    @classmethod
    def of(
        cls,
        query: tuple[int, int, int, int],
        value: tuple[int, int, int],
        dtype: DTypeLike,
        plan: "_Dtypes | None",
    ) -> "Shapes":
        """From a device's query [B, t, N, H], value [s, K, Hv], their dtype, and the plan's."""
        (B, t, N, H), (s, K, Hv) = query, value
        width, accumulator = jnp.dtype(dtype).itemsize, accumulator_dtype(dtype).itemsize
        wire, gradient = width, accumulator
        if plan is not None and plan.wire_dtype is not None:
            wire = jnp.dtype(plan.wire_dtype).itemsize
        if plan is not None and plan.gradient_dtype is not None:
            gradient = jnp.dtype(plan.gradient_dtype).itemsize
        return cls(
            B=B, t=t, s=s, N=N, K=K, H=H, Hv=Hv,
            item=width, wire=wire, gradient=gradient, accumulator=accumulator,
        )  # fmt: skip


def bytes_a_hop(shapes: Shapes) -> dict[str, dict[Side, int]]:
    """Bytes that one device sends a hop, for each pass and travelling side.

    The table of BurstAttention's section 3.3, for any N / K and with the dtypes told apart. The
    statistics (lse, delta, and lse of a travelling partial result) have the accumulators' dtype.
    """
    x = shapes
    queries, rows = x.B * x.t * x.N, 2 * x.B * x.t * x.N * x.accumulator
    keys = x.B * x.s * x.K * (x.H + x.Hv)
    return {
        "forward": {
            "kv": keys * x.wire,
            "q": queries * x.H * x.wire + queries * (x.Hv + 1) * x.accumulator,
        },
        "backward": {
            "kv": keys * (x.wire + x.gradient),
            "q": queries * (x.H + x.Hv) * x.wire + rows + queries * x.H * x.gradient,
        },
    }


def visible_pairs(
    q_tokens: ShardTokens, kv_tokens: ShardTokens, mask: Mask, schedule: Schedule, travels: Side
) -> np.ndarray:
    """Pairs of tokens that count, [visits + 1, R], the tile at home first; segments ignored.

    Exact for step 1 up to sampling: a few hundred queries stand for their neighbours.
    """
    R = schedule.num_shards
    q = [pieces(q_tokens.layout, r, R, q_tokens.local, q_tokens.length) for r in range(R)]
    kv = [pieces(kv_tokens.layout, r, R, kv_tokens.local, kv_tokens.length) for r in range(R)]
    found = np.zeros((len(schedule.offsets) + 1, R))
    for visit, offset in enumerate((0, *schedule.offsets)):
        for me in range(R):
            other = (me - offset) % R
            sides = (q[me], kv[other]) if travels == "kv" else (q[other], kv[me])
            found[visit, me] = sum(_pairs(a, b, mask) for a in sides[0] for b in sides[1])
    return found


def _pairs(q: Piece, kv: Piece, mask: Mask, samples: int = 128) -> float:
    count = -(-(q.stop - q.start) // q.step)
    at = q.start + q.step * ((np.arange(min(samples, count)) + 0.5) * count / min(samples, count))
    low = np.full_like(at, kv.start) if mask.left is None else np.maximum(kv.start, at - mask.left)
    high = np.full_like(at, kv.stop)
    if mask.right is not None:
        high = np.minimum(kv.stop, at + mask.right + 1)
    return float(np.maximum(high - low, 0).mean() / kv.step * count)


def predict(
    plan: _Travels,
    shapes: Shapes,
    q_tokens: ShardTokens,
    kv_tokens: ShardTokens,
    mask: Mask,
    hardware: Hardware | str | None,
) -> str:
    """The text of `Plan.explain`: what one device sends, computes and holds, pass by pass."""
    chip = None if hardware is None else hardware_named(hardware)
    x, R = shapes, q_tokens.num_shards
    cost = bytes_a_hop(shapes)
    lines = [
        f"{R} devices, {q_tokens.layout}: each holds {x.t} queries x {x.N} heads and {x.s} keys x "
        f"{x.K} heads of {x.H} (batch {x.B})."
    ]
    passes: tuple[tuple[str, int, Side], ...] = (
        ("forward", 2, plan.forward),
        ("backward", 5, plan.backward),
    )
    for name, products, travels in passes:
        schedule = make_schedule(
            travels=travels, layout=q_tokens.layout, num_shards=R, q_local=x.t, kv_local=x.s,
            q_length=q_tokens.length, kv_length=kv_tokens.length, left=mask.left, right=mask.right,
        )  # fmt: skip
        hops = len(schedule.offsets)
        kv, q = cost[name]["kv"], cost[name]["q"]
        lines.append(
            f"{name}: {'keys and values' if travels == 'kv' else 'queries'} travel, {hops} x "
            f"{cost[name][travels] / 2**20:.1f} MiB = {hops * cost[name][travels] / GIB:.3f} GiB "
            f"(a hop with keys travelling {kv / 2**20:.1f} MiB, with queries {q / 2**20:.1f})."
        )
        if chip is not None:
            pairs = visible_pairs(q_tokens, kv_tokens, mask, schedule, travels).max(1)
            tiles_s = 2 * products * x.B * x.N * (x.H + x.Hv) / 2 * pairs / chip.flop_per_s
            wire_s = cost[name][travels] / chip.link_bytes_per_s
            time_s = tiles_s[0] + np.maximum(tiles_s[1:], wire_s).sum()
            slowest = "the wire" if hops and wire_s > tiles_s[1:].mean() else "the matrix unit"
            lines.append(
                f"  on {chip.name} at least {time_s * 1e3:.2f} ms (at peak rates: a tile "
                f"{tiles_s[1:].mean() * 1e3 if hops else tiles_s[0] * 1e3:.3f} ms, a hop's "
                f"messages {wire_s * 1e3:.3f} ms): {slowest} binds."
            )
    held = memory_bytes(plan, shapes)
    lines.append(f"memory: about {held / GIB:.2f} GiB a device for the ring, inputs not counted.")
    if chip is not None and held > chip.memory_bytes:
        lines.append(f"  That does not fit {chip.name} ({chip.memory_bytes / 1e9:.0f} GB).")
    return "\n".join(lines)


def memory_bytes(plan: _Travels, shapes: Shapes) -> int:
    """Largest of what the two rings hold at once besides their inputs, in bytes.

    Two messages in flight (one read, one arriving), the accumulators of both sides, and what the
    tile returns before it is added.
    """
    x = shapes
    q, out = x.B * x.t * x.N * x.H, x.B * x.t * x.N * x.Hv
    kv = x.B * x.s * x.K * (x.H + x.Hv)
    message = {"kv": kv * x.wire, "q": (q + out) * x.wire}
    forward = 2 * message[plan.forward] + 3 * out * x.accumulator
    backward = 2 * message[plan.backward] + 3 * (q + kv) * x.accumulator
    return max(forward, backward) + out * x.item
