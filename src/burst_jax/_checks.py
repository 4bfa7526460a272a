"""Every error a caller of the attention can make, said before the first collective.

Each function states one rule; its message says what is wrong with which values, what would be
right, and how to get there.
"""

import dataclasses
import math
import numbers

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

import burst_kernels
from burst_jax._masks import Mask
from burst_jax._plan import Plan
from burst_jax._sharding import SequenceSharding, ShardTokens, check_layout

Shaped = jax.Array | jax.ShapeDtypeStruct


def check_arrays(query: Shaped, key: Shaped, value: Shaped) -> None:
    """Ranks, dtypes, and the sizes that q, k and v must share."""
    arrays = {"query": query, "key": key, "value": value}
    letters = {"query": "[B, T, N, H]", "key": "[B, S, K, H]", "value": "[B, S, K, Hv]"}
    for name, x in arrays.items():
        if not hasattr(x, "shape") or not hasattr(x, "dtype"):
            raise ValueError(f"{name} is {type(x).__name__}, not an array {letters[name]}.")
        if len(x.shape) != 4:
            raise ValueError(
                f"{name} has shape {tuple(x.shape)}, of rank {len(x.shape)}; it must be "
                f"{letters[name]}. Add a batch dimension with x[None] if it is missing, or use "
                "jax.vmap over further ones."
            )
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(
                f"{name} has dtype {x.dtype}; attention is defined for real floating arrays. "
                f"Convert it, for example {name}.astype(jnp.float32)."
            )
        if x.dtype not in (jnp.float64, jnp.float32, jnp.bfloat16, jnp.float16):
            raise ValueError(
                f"{name} has dtype {x.dtype}, which is not supported. Use float32, bfloat16, "
                "float16 or float64."
            )
        if 0 in x.shape:
            raise ValueError(
                f"{name} has shape {tuple(x.shape)}: an empty batch, sequence or head has no "
                "attention. Skip the call for empty input."
            )
    if len({x.dtype for x in arrays.values()}) > 1:
        found = ", ".join(f"{name} {x.dtype}" for name, x in arrays.items())
        raise ValueError(
            f"query, key and value must have one dtype, got {found}. Cast them to the one you want "
            "to compute and send in; partial results are kept in float32 anyway."
        )
    _check_shapes(query.shape, key.shape, value.shape)


def _check_shapes(q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...]) -> None:
    if not q[0] == k[0] == v[0]:
        raise ValueError(
            f"batch sizes differ: query {q[0]}, key {k[0]}, value {v[0]}. Broadcast the smaller "
            "with jnp.broadcast_to."
        )
    if k[1] != v[1]:
        raise ValueError(f"key has {k[1]} tokens, value {v[1]}; they must be the same tokens.")
    if k[2] != v[2]:
        raise ValueError(f"key has {k[2]} heads, value {v[2]}; they must be the same kv heads.")
    if q[3] != k[3]:
        raise ValueError(
            f"query has head dim {q[3]}, key {k[3]}; scores need them equal. (The value's head "
            "dim may differ.)"
        )
    if q[2] % k[2]:
        raise ValueError(
            f"query has N={q[2]} heads and key K={k[2]}: N must be a multiple of K, so that each "
            f"kv head serves N/K query heads. Choose K among the divisors of {q[2]}."
        )


def check_scale(scale: int | float | None, head_dim: int) -> float:
    """The scale as a float; None is 1/sqrt(H)."""
    if scale is None:
        return 1.0 / math.sqrt(head_dim)
    return _positive("scale", scale, "multiplies q k^T", "None for 1/sqrt(head dim)")


def check_soft_cap(logits_soft_cap: int | float | None) -> float | None:
    """The soft cap as a float, or None."""
    if logits_soft_cap is None:
        return None
    return _positive("logits_soft_cap", logits_soft_cap, "bounds the scores", "None for no cap")


def _positive(name: str, value: int | float, role: str, otherwise: str) -> float:
    if isinstance(value, Tracer):
        raise ValueError(
            f"{name} is traced; it {role} and must be known when the program is compiled. Pass a "
            "Python float, or fold a learned factor into the query."
        )
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not (math.isfinite(number) and number > 0):
        raise ValueError(
            f"{name}={value!r}: it {role} and must be a finite number > 0, or {otherwise}."
        )
    return number


def check_sinks(sinks: jax.Array | None, num_heads: int) -> None:
    """One real number a query head."""
    if sinks is None:
        return
    shape, dtype = getattr(sinks, "shape", None), getattr(sinks, "dtype", None)
    floating = dtype is not None and jnp.issubdtype(dtype, jnp.floating)
    if shape != (num_heads,) or not floating:
        raise ValueError(
            f"sinks must be a floating array [N] = [{num_heads}], one logit a query head, got "
            f"{'no array' if shape is None else f'{dtype}{list(shape)}'}."
        )


def check_mask(mask: Mask | None) -> Mask:
    """A Mask whose bounds fit int32; None is the full mask."""
    if mask is None:
        return Mask.full()
    if not isinstance(mask, Mask):
        raise ValueError(
            f"mask must be a burst_jax.Mask, got {type(mask).__name__}. Build it with Mask.full(), "
            "Mask.causal(), Mask.sliding_window(left, right) or Mask.segments(ids), and combine "
            "with &. A dense boolean T x S mask is quadratic in memory and not taken."
        )
    for name, bound in (("left", mask.left), ("right", mask.right)):
        integer = isinstance(bound, numbers.Integral) and not isinstance(bound, bool)
        if bound is not None and (not integer or bound < 0):
            raise ValueError(
                f"Mask({name}={bound!r}): a window reaches an integer number of positions, >= 0."
            )
    # Positions fit int32, and so do their differences: a window beyond it hides nothing.
    most = np.iinfo(np.int32).max
    left, right = (None if x is None else min(int(x), most) for x in (mask.left, mask.right))
    return dataclasses.replace(mask, left=left, right=right)


def as_rows(name: str, ids: jax.Array, batch: int, tokens: int) -> jax.Array:
    """Integer ids [n] or [B, n] as [1 or B, n] int32."""
    shape, dtype = getattr(ids, "shape", ()), getattr(ids, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jnp.integer):
        kind = type(ids).__name__ if dtype is None else f"an array of {dtype}"
        raise ValueError(f"{name} is {kind}; it must be an integer array. Use .astype(jnp.int32).")
    if shape not in ((tokens,), (batch, tokens), (1, tokens)):
        raise ValueError(
            f"{name} has shape {tuple(shape)}; it must be [{tokens}] or [{batch}, {tokens}], one "
            "entry a token, in the same layout as the array it belongs to (sharding.place)."
        )
    wide = np.iinfo(np.int32)
    if dtype.itemsize > 4 or dtype == jnp.uint32:
        if not isinstance(ids, Tracer) and ids.size:
            low, high = int(np.min(np.asarray(ids))), int(np.max(np.asarray(ids)))
            if low < wide.min or high > wide.max:
                raise ValueError(f"{name} holds {low}..{high}, which does not fit int32.")
    ids = jnp.asarray(ids).astype(jnp.int32)
    return ids[None] if ids.ndim == 1 else ids


def check_divides(what: str, size: int, axis: object, devices: int) -> None:
    """A dimension that its mesh axis must divide."""
    if size % devices:
        raise ValueError(
            f"{what} = {size} is not divided by its mesh axis {axis!r} with {devices} devices. "
            f"Use a multiple of {devices}, or a smaller axis."
        )


def check_plan(plan: Plan | None, dtype: jnp.dtype, num_shards: int) -> None:
    """A plan that can be honoured on these arrays and this mesh."""
    if plan is None:
        return
    if not isinstance(plan, Plan):
        raise ValueError(f"plan must be a burst_jax.Plan or None, got {type(plan).__name__}.")
    if plan.num_shards is not None and plan.num_shards != num_shards:
        raise ValueError(
            f"this plan was made for {plan.num_shards} devices along the sequence, but the mesh "
            f"has {num_shards}. Make it again with make_plan(..., sharding=...), or pass plan=None."
        )
    accumulator = burst_kernels.accumulator_dtype(dtype)
    for field, widest in (("wire_dtype", dtype), ("gradient_dtype", accumulator)):
        asked = getattr(plan, field)
        if asked is not None and asked.itemsize > jnp.dtype(widest).itemsize:
            raise ValueError(
                f"Plan({field}={asked.name}): arrays of {dtype.name} have nothing to send that "
                f"fills it; the widest of use is {jnp.dtype(widest).name}. Use that, or None."
            )


def check_axis(axis_name: object) -> int:
    """The number of devices along a mapped axis."""
    try:
        return jax.lax.axis_size(axis_name)
    except NameError as unbound:
        raise ValueError(
            f"axis_name={axis_name!r} is no mapped axis here. Call burst_attention_shard inside "
            "jax.shard_map (or pmap) over that axis; on global arrays use burst_attention."
        ) from unbound


def check_shard(layout: str, t: int, s: int) -> None:
    """A shard that its layout allows."""
    check_layout(layout)
    for name, local in (("query", t), ("key", s)):
        if layout == "zigzag" and local % 2:
            raise ValueError(
                f"{name} has {local} tokens on this device; a zigzag shard is two equal chunks. "
                "Pad to an even number (SequenceSharding.place does)."
            )


def check_shard_length(name: str, tokens: ShardTokens) -> ShardTokens:
    """A true length that the shards can hold."""
    total = tokens.local * tokens.num_shards
    integer = isinstance(tokens.length, (int, np.integer)) and not isinstance(tokens.length, bool)
    if not integer or not 1 <= tokens.length <= total:
        raise ValueError(
            f"{name}={tokens.length!r}: {tokens.num_shards} shards of {tokens.local} tokens hold "
            f"{total}, so the true length lies in 1..{total}."
        )
    return tokens


def check_length(name: str, found: int, length: int | None, sharding: SequenceSharding) -> None:
    """A global length that the layout can share, or that may be padded."""
    natural = sharding.layout == "contiguous"
    if length is None:
        if natural or found % sharding.multiple == 0:
            return
        raise ValueError(
            f"{name} has {found} tokens, which {sharding.num_shards} devices in the "
            f"{sharding.layout!r} layout cannot share: it needs a multiple of {sharding.multiple}. "
            f"Give SequenceSharding(..., length={found}) and place the arrays with "
            "sharding.place(x), which pads; the padding is masked."
        )
    expected = sharding.padded(length)
    if found == expected or (natural and found == length):
        return
    field = "key_length" if name == "key" else "length"
    raise ValueError(
        f"{name} has {found} tokens, but the sharding's {field} is {length}, which is {expected} "
        f"tokens when placed. Place the array with sharding.place(x), or give "
        f"SequenceSharding(..., {field}={found})."
    )


def check_pair(positions: tuple) -> tuple:
    """Positions of queries and of keys."""
    if len(positions) != 2 or any(x is None for x in positions):
        raise ValueError(
            f"positions is a tuple of {len(positions)}; give one array for both sides, or the "
            "pair (positions of the queries, positions of the keys)."
        )
    return tuple(positions)


def check_shard_spec(spec: object, tokens: object, width: object) -> None:
    """Inside a shard_map only batch and heads may still be sharded."""
    if tokens is not None or width is not None:
        raise ValueError(
            f"query is still sharded as {spec} inside this shard_map: only its batch and heads may "
            "be. Name the sequence's mesh axis in the shard_map's axis_names and in_specs."
        )
