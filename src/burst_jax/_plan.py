"""`Plan`: what travels and in which dtype. `make_plan`: the choice made for you, and why."""

import dataclasses
from typing import Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import DTypeLike

from burst_jax._masks import Mask
from burst_jax._schedule import Side
from burst_jax._sharding import SequenceSharding


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """How one call is carried out. A field left None is chosen; what is given is honoured.

    Attributes:
        forward: the side that travels in the forward ring, "kv" or "q".
        backward: the side that travels in the backward ring: "kv" with dk and dv one hop behind,
            or "q" (BurstAttention) with dq one hop behind.
        wire_dtype: floating dtype in which k, v, q and do travel; None: their own. Narrower than
            their own is lossy, and the result is no longer exact.
        gradient_dtype: floating dtype in which dq, dk, dv travel; None: that of the accumulators,
            float32 (float64 for float64 inputs). Narrower rounds once a hop.
        one_message: whether all that travels together is packed into one message; None: on NVIDIA
            GPUs, where of two permutes in flight only one is hidden behind the tile.
        num_shards: R that the plan was made for; it is refused on any other. None: any.

    Raises:
        ValueError: a field has a value that does not exist.
    """

    forward: Side | None = None
    backward: Side | None = None
    wire_dtype: DTypeLike | None = None
    gradient_dtype: DTypeLike | None = None
    one_message: bool | None = None
    num_shards: int | None = None

    def __post_init__(self) -> None:
        for field in ("forward", "backward"):
            value = getattr(self, field)
            if value not in (None, "kv", "q"):
                raise ValueError(
                    f"Plan({field}={value!r}): the side that travels is 'kv' or 'q', or None to "
                    "have it chosen by bytes."
                )
        for field in ("wire_dtype", "gradient_dtype"):
            value = getattr(self, field)
            if value is None:
                continue
            try:
                dtype = jnp.dtype(value)
            except TypeError:
                dtype = None
            if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
                raise ValueError(
                    f"Plan({field}={value!r}): give a floating dtype such as jnp.bfloat16, or None."
                )
            object.__setattr__(self, field, dtype)
        if self.one_message not in (None, True, False):
            raise ValueError(f"Plan(one_message={self.one_message!r}): give True, False or None.")
        if self.num_shards is not None and (
            not isinstance(self.num_shards, (int, np.integer)) or self.num_shards < 1
        ):
            raise ValueError(f"Plan(num_shards={self.num_shards!r}): an integer >= 1, or None.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shapes:
    """The sizes on one device that costs depend on, in the alphabet of `jax.nn`.

    t, s: query and key tokens; N, K: query and kv heads; H, Hv: head dims of q, k and of v;
    itemsize, wire, gradient: bytes of an element of the arrays, on the wire, of a travelling
    gradient; accumulator: of the accumulators.
    """

    B: int
    t: int
    s: int
    N: int
    K: int
    H: int
    Hv: int
    wire: int
    gradient: int
    accumulator: int


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


def resolve(plan: Plan | None, shapes: Shapes, num_shards: int, platform: str) -> Plan:
    """Fills in what the plan leaves open, by bytes; ties go to the side that needs less around it.

    Ties go to "kv" forward (nothing travels home) and to "q" backward (one gradient, not two).
    """
    plan = plan or Plan()
    cost = bytes_a_hop(shapes)
    forward = "q" if cost["forward"]["q"] < cost["forward"]["kv"] else "kv"
    backward = "kv" if cost["backward"]["kv"] < cost["backward"]["q"] else "q"
    return dataclasses.replace(
        plan,
        forward=plan.forward or forward,
        backward=plan.backward or backward,
        one_message=platform in ("gpu", "cuda") if plan.one_message is None else plan.one_message,
        num_shards=num_shards,
    )

