"""`make_plan`: the choice that is made for a call, and what it will cost."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import DTypeLike

from burst_jax import _checks, _placing
from burst_jax._cost import Hardware, Shapes, hardware_named, predict
from burst_jax._masks import Mask
from burst_jax._plan import Plan, resolve
from burst_jax._sharding import SequenceSharding, ShardTokens


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
        hardware: a name in `burst_jax._cost.HARDWARE` ("v5e", "v5p", "v6e", "v4", "a100",
            "l4", "h100", "b200"), or a `Hardware` of your own; None: no times are predicted.
        plan: fields that you want fixed.

    Returns:
        A complete plan for this mesh.

    Raises:
        ValueError: shapes that no attention has, or that the mesh does not divide; unknown
            hardware.
    """
    for name, shape in (("query_shape", query_shape), ("key_shape", key_shape)):
        if len(shape) != 4 or any(not isinstance(n, int | np.integer) or n < 1 for n in shape):
            raise ValueError(f"{name}={tuple(shape)}: give the global [B, T, N, H], all >= 1.")
    dtype = jnp.dtype(dtype)
    q, k = (jax.ShapeDtypeStruct(shape, dtype) for shape in (query_shape, key_shape))
    _checks.check_arrays(q, k, k)
    (B, T, N, H), (_, S, K, _) = query_shape, key_shape
    batch, heads = sharding.axis_size(sharding.batch_axis), sharding.axis_size(sharding.head_axis)
    for what, size, axis, devices in (
        ("the batch B", B, sharding.batch_axis, batch),
        ("the query heads N", N, sharding.head_axis, heads),
        ("the kv heads K", K, sharding.head_axis, heads),
    ):
        _checks.check_divides(what, size, axis, devices)
    R = sharding.num_shards
    mask = _checks.check_mask(mask)
    _checks.check_plan(plan, dtype, R)
    q_tokens, kv_tokens = (
        ShardTokens(sharding.layout, R, sharding.padded(n) // R, n) for n in (T, S)
    )
    shapes = Shapes.of(
        (B // batch, q_tokens.local, N // heads, H), (kv_tokens.local, K // heads, H), dtype, plan
    )
    if hardware is None:
        platform = _placing.chip(sharding).platform
    else:
        platform = hardware_named(hardware).kind
    chosen = resolve(plan, shapes, platform)
    explanation = predict(chosen, shapes, q_tokens, kv_tokens, mask, hardware)
    return Plan(
        forward=chosen.forward,
        backward=chosen.backward,
        wire_dtype=chosen.wire_dtype,
        gradient_dtype=chosen.gradient_dtype,
        one_message=chosen.one_message,
        tile=None if plan is None else plan.tile,
        num_shards=R,
        explanation=explanation,
    )
