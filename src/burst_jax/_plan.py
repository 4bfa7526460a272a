"""`Plan`: what travels and in which dtype. `make_plan`: the choice made for you, and why."""

import dataclasses

import jax.numpy as jnp
import numpy as np
from jaxtyping import DTypeLike

from burst_jax._cost import Hardware, Shapes, bytes_a_hop, hardware_named, predict
from burst_jax._masks import Mask
from burst_jax._schedule import Side
from burst_jax._sharding import SequenceSharding, ShardTokens
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
            if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
                raise ValueError(
                    f"Plan({field}={value!r}): give a floating dtype such as jnp.bfloat16, or None."
                )
            object.__setattr__(self, field, dtype)
        if self.one_message not in (None, True, False):
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
    """A Plan that leaves nothing open: what the ring is run by. See `Plan` for the fields."""

    forward: Side
    backward: Side
    wire_dtype: DTypeLike | None
    gradient_dtype: DTypeLike | None
    one_message: bool


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
    )


def make_plan(
    query_shape: tuple[int, ...],
    key_shape: tuple[int, ...],
    *,
    sharding: SequenceSharding,
    mask: Mask | None = None,
    dtype: DTypeLike,
    hardware: Hardware | str | None = None,
    plan: Plan | None = None,
) -> Plan:
    """The choice that `plan=None` makes, with predictions in `.explain()`.

    Args:
        query_shape: global [B, T, N, H].
        key_shape: global [B, S, K, H]; the value's head dim is taken to be H.
        sharding: where the tokens lie.
        mask: which keys count; None: all. Segments are predicted as if all were one.
        dtype: of query, key and value.
        hardware: a name in `burst_jax._cost.HARDWARE` ("v5e", "v5p", "v6e", "v4", "h100"), or a
            `Hardware` of your own; None: no times are predicted.
        plan: fields that you want fixed.

    Returns:
        A complete plan for this mesh.

    Raises:
        ValueError: shapes that no attention has, or that the mesh does not divide; unknown
            hardware.
    """
    for name, shape in (("query_shape", query_shape), ("key_shape", key_shape)):
        if len(shape) != 4 or any(n < 1 for n in shape):
            raise ValueError(f"{name}={tuple(shape)}: give the global [B, T, N, H], all >= 1.")
    (B, T, N, H), (_, S, K, _) = query_shape, key_shape
    batch, heads = sharding.axis_size(sharding.batch_axis), sharding.axis_size(sharding.head_axis)
    if N % K or B % batch or N % heads or K % heads:
        raise ValueError(
            f"B={B}, N={N}, K={K} on this mesh: N must be a multiple of K={K}, B of the batch "
            f"axis ({batch} devices), N and K of the head axis ({heads})."
        )
    dtype = jnp.dtype(dtype)
    R = sharding.num_shards
    q_tokens, kv_tokens = (
        ShardTokens(sharding.layout, R, sharding.padded(n) // R, n) for n in (T, S)
    )
    shapes = Shapes.of(
        (B // batch, q_tokens.local, N // heads, H), (kv_tokens.local, K // heads, H), dtype, plan
    )
    chosen = resolve(plan, shapes, "cpu" if hardware is None else hardware_named(hardware).kind)
    mask = Mask.full() if mask is None else mask
    explanation = predict(chosen, shapes, q_tokens, kv_tokens, mask, hardware)
    tile = None if plan is None else plan.tile
    return Plan(**dataclasses.asdict(chosen), tile=tile, num_shards=R, explanation=explanation)
