"""What the nnx and the linen module share: checks, positions, where arrays lie.

Imports no Flax, so that each side is loaded only by those who use it.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

import burst_kernels
from burst_jax import _checks, _placing, _rotary
from burst_jax._attention import burst_attention
from burst_jax._masks import Mask
from burst_jax._plan import Plan
from burst_jax._sharding import SequenceSharding, ShardTokens


def check_module(
    sharding: SequenceSharding,
    mask: Mask | None,
    *,
    in_features: int,
    num_heads: int,
    num_kv_heads: int | None,
    head_dim: int | None,
    rope_theta: float | None,
) -> tuple[Mask, int, int]:
    """A module's arguments; returns its mask, K and H, the None among them filled in.

    Raises:
        ValueError: sizes that do not divide, a head dim that cannot be rotated, a mask that
            belongs to one batch, or no sharding.
    """
    check_sharding(sharding)
    mask = Mask.causal() if mask is None else _checks.check_mask(mask)
    if mask.segment_ids:
        raise ValueError(
            "the mask of a module holds segment ids, which belong to one batch. Give them when "
            "the module is called: attention(x, mask=Mask.segments(ids))."
        )
    sizes = (("in_features", in_features), ("num_heads", num_heads))
    optional = (("num_kv_heads", num_kv_heads), ("head_dim", head_dim))
    for name, size in (*sizes, *((name, 1 if size is None else size) for name, size in optional)):
        if size < 1:
            raise ValueError(f"{name}={size} must be at least 1.")
    if head_dim is None and in_features % num_heads:
        raise ValueError(
            f"in_features={in_features} is not divided by num_heads={num_heads}. Give head_dim, or "
            "another number of heads."
        )
    H = in_features // num_heads if head_dim is None else head_dim
    K = num_heads if num_kv_heads is None else num_kv_heads
    if num_heads % K:
        raise ValueError(
            f"num_heads={num_heads} is not a multiple of num_kv_heads={K}; each kv head serves the "
            f"same number of query heads. Choose one of the divisors of {num_heads}."
        )
    if rope_theta is None:
        return mask, K, H
    if not (math.isfinite(rope_theta) and rope_theta > 0):
        raise ValueError(
            f"rope_theta={rope_theta} must be a finite number > 0, or None: no rotary embedding."
        )
    if H % 2:
        raise ValueError(
            f"head_dim={H} is odd, and rotary embedding rotates pairs. Use an even head_dim, or "
            "rope_theta=None."
        )
    return mask, K, H


def check_sharding(sharding: SequenceSharding) -> None:
    """Says which sharding is meant: Flax has another argument of that name."""
    if not isinstance(sharding, SequenceSharding):
        raise ValueError(
            f"sharding must be a burst_jax.SequenceSharding, got {type(sharding).__name__}; it "
            "says how the sequence lies on the mesh."
        )


def both(own: Mask, further: Mask | None) -> Mask:
    """The module's mask and the call's."""
    return own & _checks.check_mask(further)


def check_input(x: Float[Array, "B T D"], in_features: int | None = None) -> None:
    """Raises ValueError for an x that is not [B, T, in_features]."""
    if len(x.shape) != 3 or in_features not in (None, x.shape[-1]):
        raise ValueError(
            f"x has shape {tuple(x.shape)}; it must be [B, T, D]"
            + ("." if in_features is None else f" with D = in_features = {in_features}.")
        )


def laid_out(shape: tuple[int, ...], sharding: SequenceSharding) -> NamedSharding | None:
    """What an operation must be told of its output's sharding; None where axes are Auto.

    On Explicit axes a sum over heads that lie on several devices has no sharding of its own.
    """
    return _on_explicit(sharding.spec(len(shape)), shape, sharding)


def _on_explicit(
    spec: PartitionSpec, shape: tuple[int, ...], sharding: SequenceSharding
) -> NamedSharding | None:
    explicit = _placing.explicit_axes(sharding)
    if not explicit:
        return None
    spec = _placing._that_divides(spec, shape, sharding)
    return NamedSharding(_placing.current_mesh(sharding), _placing.only(spec, explicit))


def pinned(x: Array, sharding: SequenceSharding) -> Array:
    """x, laid out as the sharding says, on either kind of axis.

    On Auto axes without this the compiler may choose to compute heads or angles on every device.
    """
    explicit = laid_out(x.shape, sharding)
    if explicit is not None:
        return jax.sharding.reshard(x, explicit)
    spec = _placing._that_divides(sharding.spec(x.ndim), x.shape, sharding)
    mesh = _placing.current_mesh(sharding)
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))


def gathered(
    kernel: Float[Array, "..."],
    bias: Float[Array, "..."] | None,
    *,
    sharding: SequenceSharding,
    sums_heads: bool,
) -> tuple[Float[Array, "..."], Float[Array, "..."] | None]:
    """A projection's parameters, sharded over the heads and nothing else.

    Kernels are [D, N, H], or [N, H, D] where the projection sums over heads (`sums_heads`).

    On Explicit axes this is what lets them be stored in any way, spread over the batch's devices
    or on one device alone: their gradients come back through it the way they are stored.
    """
    heads = sharding.head_axis
    specs = PartitionSpec(heads, None, None), PartitionSpec(None)
    if not sums_heads:
        specs = PartitionSpec(None, heads, None), PartitionSpec(heads, None)

    def moved(x: Array, spec: PartitionSpec) -> Array:
        explicit = _on_explicit(spec, x.shape, sharding)
        return x if explicit is None else jax.sharding.reshard(x, explicit)

    return moved(kernel, specs[0]), None if bias is None else moved(bias, specs[1])


def normed(
    norm: Callable[[Float[Array, "B T N H"]], Float[Array, "B T N H"]], x: Float[Array, "B T N H"]
) -> Float[Array, "B T N H"]:
    """A norm of Flax's in the accumulators' dtype, in which q and k stay until they are rotated."""
    # Flax's norms promote their statistics implicitly, which strict promotion would refuse.
    with jax.numpy_dtype_promotion("standard"):
        return norm(x.astype(burst_kernels.accumulator_dtype(x.dtype)))


def heads_ready(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    *,
    sharding: SequenceSharding,
    positions: Int[Array, "..."] | None,
    rope_theta: float | None,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T K H"], Float[Array, "B T K H"]]:
    """Projected heads with the rotary embedding, in the dtype of v, laid out for the attention.

    q and k may be of wider dtype (they have been normalised in it) and are rounded once, here.
    """
    B, T, _, H = q.shape
    if rope_theta is not None:
        if positions is None:
            at = layout_positions(sharding, T)
        else:
            at = pinned(_checks.as_rows("positions", positions, B, T), sharding)
        turn = _rotary.rotation(at, H, rope_theta, burst_kernels.accumulator_dtype(v.dtype))
        q, k = _rotary.rotate(q, turn), _rotary.rotate(k, turn)
    q, k, v = (pinned(x.astype(v.dtype), sharding) for x in (q, k, v))
    return q, k, v


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K Hv"],
    *,
    sharding: SequenceSharding,
    mask: Mask,
    positions: Int[Array, "..."] | None,
    plan: Plan | None,
    implementation: str | None,
) -> Float[Array, "B T N Hv"]:
    """`burst_attention` without residual."""
    out = burst_attention(
        q, k, v, sharding=sharding, mask=mask, positions=positions, plan=plan,
        implementation=implementation,
    )  # fmt: skip
    assert not isinstance(out, tuple)
    return out


def layout_positions(sharding: SequenceSharding, tokens: int) -> Int[Array, "1 T"]:
    """int32 positions of tokens in layout order, sharded as they are; padding is -1.

    `sharding.positions_of` computed by the program: as a constant, a million positions would be 4
    MB of code, and the same on every device.
    """
    length = tokens if sharding.length is None else sharding.length
    if tokens % sharding.multiple:  # contiguous and not placed: padded inside the attention
        return jnp.arange(tokens, dtype=jnp.int32)[None]
    R = sharding.num_shards
    shards = ShardTokens(sharding.layout, R, tokens // R, length)
    rows = jax.vmap(shards.positions)(jnp.arange(R, dtype=jnp.int32))
    return pinned(rows.reshape(1, tokens), sharding)
