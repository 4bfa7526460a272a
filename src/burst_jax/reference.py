"""The oracle: attention as the textbook writes it, O(T x S) in memory, in the inputs' precision."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

import burst_kernels
from burst_jax import _checks
from burst_jax._attention import Output, Positions, _pair
from burst_jax._masks import Mask
from burst_jax._sharding import SequenceSharding


def attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K Hv"],
    *,
    sharding: SequenceSharding | None = None,
    mask: Mask | None = None,
    scale: int | float | None = None,
    logits_soft_cap: int | float | None = None,
    sinks: Float[Array, " N"] | None = None,
    positions: Positions | None = None,
    return_residual: bool = False,
) -> Output:
    """Plain attention with the arguments and the conventions of `burst_attention`.

    Differentiable by JAX's own rules, so its gradients are an independent check too. Compute in
    float64 (`jax_enable_x64`) for a truth to compare with. A query that sees no key has out = 0,
    lse = -inf and gradient 0.

    Args:
        query: [B, T, N, H].
        key: [B, S, K, H].
        value: [B, S, K, Hv].
        sharding: None: the arrays are in natural order. Otherwise they are in its layout order,
            and its padding is masked.
        mask, scale, logits_soft_cap, sinks, positions, return_residual: as in `burst_attention`.

    Returns:
        [B, T, N, Hv] in the query's dtype, and with `return_residual` lse, [B, T, N].

    Raises:
        ValueError: as `burst_attention`.
    """
    _checks.check_arrays(query, key, value)
    mask = _checks.check_mask(mask)
    _checks.check_sinks(sinks, query.shape[2])
    scale = _checks.check_scale(scale, query.shape[3])
    cap = _checks.check_soft_cap(logits_soft_cap)
    (B, T, N, H), (_, S, K, _) = query.shape, value.shape
    dtype = burst_kernels.accumulator_dtype(query.dtype)
    q = query.astype(dtype).reshape(B, T, K, N // K, H)
    scores = jnp.einsum("btkgh,bskh->bkgts", q, key.astype(dtype), precision="highest") * scale
    if cap is not None:
        scores = cap * jnp.tanh(scores / cap)
    seen = _seen(mask, _pair(positions), sharding, B, T, S)[:, None, None]
    scores = jnp.where(seen, scores, -jnp.inf)
    if sinks is not None:
        sink = jnp.broadcast_to(sinks.astype(dtype).reshape(K, N // K, 1, 1), (B, K, N // K, T, 1))
        scores = jnp.concatenate((scores, sink), axis=-1)
    high = jax.lax.stop_gradient(scores.max(-1, keepdims=True))
    high = jnp.where(jnp.isneginf(high), 0.0, high)
    p = jnp.exp(scores - high)
    total = p.sum(-1, keepdims=True)
    some = total > 0
    total = jnp.where(some, total, 1.0)
    weights = (p / total)[..., :S]
    out = jnp.einsum("bkgts,bskh->btkgh", weights, value.astype(dtype), precision="highest")
    out = out.reshape(B, T, N, -1).astype(query.dtype)
    lse = jnp.where(some, high + jnp.log(total), -jnp.inf)[..., 0]
    lse = lse.transpose(0, 3, 1, 2).reshape(B, T, N)
    return (out, lse) if return_residual else out


def _seen(
    mask: Mask, positions: tuple, sharding: SequenceSharding | None, B: int, T: int, S: int
) -> Bool[Array, "b T S"]:
    """The dense mask."""
    given_q, given_kv = positions
    q, kv = _rows(given_q, sharding, T, "q"), _rows(given_kv, sharding, S, "k")
    q, kv = q[:, :, None], kv[:, None, :]
    seen = (q >= 0) & (kv >= 0)
    if mask.right is not None:
        seen &= kv - q <= mask.right
    if mask.left is not None:
        seen &= q - kv <= mask.left
    for q_ids, kv_ids in mask.segment_ids:
        q_ids = _checks.as_rows("segment ids of the queries", q_ids, B, T)
        kv_ids = _checks.as_rows("segment ids of the keys", kv_ids, B, S)
        seen &= q_ids[:, :, None] == kv_ids[:, None, :]
    return seen


def _rows(
    given: Array | None, sharding: SequenceSharding | None, n: int, side: str
) -> Int[Array, "b n"]:
    """Positions of one side; padding of the sharding is negative whatever was given."""
    natural = jnp.arange(n, dtype=jnp.int32)
    if sharding is not None:
        length = sharding.length
        if side == "k" and sharding.key_length is not None:
            length = sharding.key_length
        natural = sharding.positions_of(n if length is None else length, n)
    if given is None:
        return natural[None]
    given = jnp.asarray(given, jnp.int32)
    given = given[None] if given.ndim == 1 else given
    return jnp.where(natural[None] < 0, -1, given)
