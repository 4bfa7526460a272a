"""`Plan`: what travels and in which dtype. `resolve`: what a plan leaves open, chosen by bytes."""

import dataclasses

import jax.numpy as jnp
import numpy as np
from jaxtyping import DTypeLike

from burst_jax._cost import Shapes, bytes_a_hop
from burst_jax._schedule import Side
from burst_kernels import TileConfig


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
        tile: block sizes of the tiles, and how they are run; None: chosen for chip and shapes.
        num_shards: R that the plan was made for; it is refused on any other. None: any.
        explanation: the text of `explain`, written by `make_plan`.

    Raises:
        ValueError: a field has a value that does not exist.
    """

    forward: Side | None = None
    backward: Side | None = None
    wire_dtype: DTypeLike | None = None
    gradient_dtype: DTypeLike | None = None
    one_message: bool | None = None
    tile: TileConfig | None = None
    num_shards: int | None = None
    explanation: str | None = dataclasses.field(default=None, compare=False, repr=False)

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
            floating = dtype is not None and jnp.issubdtype(dtype, jnp.floating)
            if not floating or jnp.finfo(dtype).bits < 8:
                raise ValueError(
                    f"Plan({field}={value!r}): give a floating dtype of whole bytes, such as "
                    "jnp.bfloat16, or None."
                )
            object.__setattr__(self, field, dtype)
        if self.one_message is not None and not isinstance(self.one_message, bool):
            raise ValueError(f"Plan(one_message={self.one_message!r}): give True, False or None.")
        if self.tile is not None and not isinstance(self.tile, TileConfig):
            raise ValueError(
                f"Plan(tile={self.tile!r}): give a burst_kernels.TileConfig(block_q=..., "
                "block_kv=...), or None."
            )
        if self.num_shards is not None and (
            not isinstance(self.num_shards, (int, np.integer)) or self.num_shards < 1
        ):
            raise ValueError(f"Plan(num_shards={self.num_shards!r}): an integer >= 1, or None.")

    def explain(self) -> str:
        """Predicted bytes, time and memory on one device, and why; made by `make_plan`."""
        if self.explanation is None:
            return (
                f"{self}\nThis plan was written by hand: nothing is predicted, since it knows no "
                "shapes. burst_jax.make_plan(query_shape, key_shape, sharding=..., dtype=...) does."
            )
        return self.explanation


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choice:
    """A Plan that leaves nothing open: what the ring is run by. See `Plan` for the fields.

    Attributes:
        as_bits: whether 16-bit floats travel as bit patterns: XLA on CPU sends them as float32.
    """

    forward: Side
    backward: Side
    wire_dtype: DTypeLike | None
    gradient_dtype: DTypeLike | None
    one_message: bool
    as_bits: bool


def resolve(plan: Plan | None, shapes: Shapes, platform: str) -> Choice:
    """Fills in what the plan leaves open, by bytes; ties go to the side that needs less around it.

    Ties go to "kv" forward (nothing travels home) and to "q" backward (one gradient, not two).
    """
    plan = plan or Plan()
    cost = bytes_a_hop(shapes)
    forward: Side = "q" if cost["forward"]["q"] < cost["forward"]["kv"] else "kv"
    backward: Side = "kv" if cost["backward"]["kv"] < cost["backward"]["q"] else "q"
    return Choice(
        forward=plan.forward or forward,
        backward=plan.backward or backward,
        wire_dtype=plan.wire_dtype,
        gradient_dtype=plan.gradient_dtype,
        one_message=platform in ("gpu", "cuda") if plan.one_message is None else plan.one_message,
        as_bits=platform == "cpu",
    )
