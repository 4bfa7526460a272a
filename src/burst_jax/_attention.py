"""`burst_attention` on global arrays, `burst_attention_shard` inside the caller's own `shard_map`.

Check, choose a plan, hand the shards to the ring: nothing here computes.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jax.tree_util import keystr
from jaxtyping import Array, Float, Int

import burst_kernels
from burst_jax import _checks, _placing
from burst_jax._cost import Shapes
from burst_jax._masks import Mask
from burst_jax._partial import Partial
from burst_jax._plan import Plan, resolve
from burst_jax._ring import ring_attention
from burst_jax._sharding import AxisName, SequenceSharding, ShardTokens, names
from burst_jax._sides import AnySide, Keys, Queries, Ring

Positions = Int[Array, "..."] | tuple[Int[Array, "..."], Int[Array, "..."]]
Output = Float[Array, "B T N Hv"] | tuple[Float[Array, "B T N Hv"], Float[Array, "B T N"]]


def burst_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K Hv"],
    *,
    sharding: SequenceSharding,
    mask: Mask | None = None,
    scale: int | float | None = None,
    logits_soft_cap: int | float | None = None,
    sinks: Float[Array, " N"] | None = None,
    positions: Positions | None = None,
    plan: Plan | None = None,
    implementation: str | None = None,
    return_residual: bool = False,
) -> Output:
    """Exact attention over a sequence that is spread over many devices.

    Works under jit, grad, vmap, jax.checkpoint and scan, on meshes with Auto and Explicit axes.
    A remat policy that saves the names "burst_out" and "burst_lse" never runs the forward ring
    twice. Source: BurstAttention, arXiv 2403.09347; `burst_jax._ring` lists how it differs.

    Args:
        query: [B, T, N, H], global, in the layout order of `sharding` (`sharding.place`).
        key: [B, S, K, H]; K divides N, and query head n reads kv head n // (N / K).
        value: [B, S, K, Hv].
        sharding: where the tokens lie. With layout "contiguous" any T and S do: unsharded arrays
            are padded inside, and the padding is masked.
        mask: which keys a query may see; None: all.
        scale: factor on q k^T, > 0; None: 1 / sqrt(H).
        logits_soft_cap: scores become cap * tanh(scores / cap); None: no cap.
        sinks: [N], a logit a head that takes part in the softmax with value zero; differentiable.
        positions: position of each token, integers [T] or [B, T] in layout order, or a pair for
            queries and keys; negative is padding. They travel with their side. None: from the
            layout, with nothing on the wire.
        plan: what travels; None, or fields left None: chosen by bytes.
        implementation: the tile backend's name, used or refused; None: the best that can run.
        return_residual: also return lse = log(sum(exp(scores))), natural logarithm.

    Returns:
        [B, T, N, Hv] in the query's dtype, sharded as the query is; with `return_residual` also
        lse, [B, T, N], float32 (float64 for float64), differentiable. A query that sees no key
        has out = 0, lse = -inf and gradient 0.

    Raises:
        ValueError: an argument is wrong or contradicts another; before any collective.
    """
    _checks.check_arrays(query, key, value)
    if not isinstance(sharding, SequenceSharding):
        raise ValueError(
            f"sharding must be a burst_jax.SequenceSharding, got {type(sharding).__name__}. Inside "
            "your own shard_map use burst_attention_shard(..., axis_name=...)."
        )
    for what, size, axis in (
        ("the batch B", query.shape[0], sharding.batch_axis),
        ("the query heads N", query.shape[2], sharding.head_axis),
        ("the kv heads K", key.shape[2], sharding.head_axis),
    ):
        _checks.check_divides(what, size, axis, sharding.axis_size(axis))
    q_tokens = _tokens("query", query.shape[1], sharding.length, sharding)
    kv_length = sharding.length if sharding.key_length is None else sharding.key_length
    kv_tokens = _tokens("key", key.shape[1], kv_length, sharding)
    queries, keys, ring = _prepare(
        query, key, value, q_tokens, kv_tokens, axis_name=sharding.axis_name, mask=mask,
        scale=scale, logits_soft_cap=logits_soft_cap, sinks=sinks, positions=positions, plan=plan,
        implementation=implementation, chip=_placing.chip(sharding),
        split=(sharding.axis_size(sharding.batch_axis), sharding.axis_size(sharding.head_axis)),
    )  # fmt: skip
    arrays = (queries, keys, sinks)
    arrays = jax.tree.map_with_path(
        lambda path, x, spec: _placing.placed(_NAMES[keystr(path)], x, spec, sharding),
        arrays,
        _specs(arrays, sharding.spec(4)),
    )
    seen = _run(*arrays, ring, sharding)
    return (seen.out, seen.lse) if return_residual else seen.out


def burst_attention_shard(
    query: Float[Array, "B t N H"],
    key: Float[Array, "B s K H"],
    value: Float[Array, "B s K Hv"],
    *,
    axis_name: AxisName,
    layout: str = "contiguous",
    length: int | None = None,
    key_length: int | None = None,
    mask: Mask | None = None,
    scale: int | float | None = None,
    logits_soft_cap: int | float | None = None,
    sinks: Float[Array, " N"] | None = None,
    positions: Positions | None = None,
    plan: Plan | None = None,
    implementation: str | None = None,
    return_residual: bool = False,
) -> Output:
    """`burst_attention` for one device's shard, inside the caller's own shard_map or pmap.

    Args:
        query: [B, t, N, H], this device's part of the sequence, T = R t.
        key: [B, s, K, H].
        value: [B, s, K, Hv].
        axis_name: the mapped axis (or axes) over which the sequence is spread.
        layout: how it is spread: "contiguous", "zigzag" or "striped".
        length: true number of tokens T; those beyond are padding. None: R t.
        key_length: true number of keys; None: `length` where given and t = s, else R s.
        mask: as in `burst_attention`; segment ids are this device's part, [t] or [B, t].
        scale, logits_soft_cap, sinks, plan, implementation, return_residual: as there.
        positions: this device's part, [t] or [B, t], or a pair.

    Returns:
        This device's part of the output, [B, t, N, Hv]; with `return_residual` also of lse.

    Raises:
        ValueError: as `burst_attention`; also where `axis_name` is not a mapped axis here.
    """
    _checks.check_arrays(query, key, value)
    num_shards = _checks.check_axis(axis_name)
    _checks.check_shard(layout, query.shape[1], key.shape[1])
    if key_length is None and query.shape[1] == key.shape[1]:
        key_length = length
    q_tokens, kv_tokens = (
        _checks.check_shard_length(name, ShardTokens(layout, num_shards, x.shape[1], n))
        for name, x, n in (
            ("length", query, num_shards * query.shape[1] if length is None else length),
            ("key_length", key, num_shards * key.shape[1] if key_length is None else key_length),
        )
    )
    queries, keys, ring = _prepare(
        query, key, value, q_tokens, kv_tokens, axis_name=axis_name, mask=mask, scale=scale,
        logits_soft_cap=logits_soft_cap, sinks=sinks, positions=positions, plan=plan,
        implementation=implementation, chip=_placing.chip_here(), split=(1, 1),
    )  # fmt: skip
    seen = _run_shard(queries, keys, sinks, ring)
    return (seen.out, seen.lse) if return_residual else seen.out


def _tokens(name: str, found: int, length: int | None, sharding: SequenceSharding) -> ShardTokens:
    """Where one side's tokens lie, from its global length; or why it cannot be so."""
    _checks.check_length(name, found, length, sharding)
    length = found if length is None else length
    local = sharding.padded(length) // sharding.num_shards
    return ShardTokens(sharding.layout, sharding.num_shards, local, length)


def _prepare(
    query, key, value, q_tokens: ShardTokens, kv_tokens: ShardTokens, *, axis_name, mask, scale,
    logits_soft_cap, sinks, positions, plan, implementation, chip, split,
) -> tuple[Queries, Keys, Ring]:  # fmt: skip
    """Checks what the two entries share; `split`: by how much batch and heads are cut further."""
    mask = _checks.check_mask(mask)
    _checks.check_sinks(sinks, query.shape[2])
    _checks.check_plan(plan, query.dtype, q_tokens.num_shards)
    (B, T, N, H), (_, S, K, Hv) = query.shape, value.shape
    q_positions, kv_positions = _pair(positions)
    if q_positions is not None:
        q_positions = _checks.as_rows("positions of the queries", q_positions, B, T)
        kv_positions = _checks.as_rows("positions of the keys", kv_positions, B, S)
    segments = [
        (
            _checks.as_rows("segment ids of the queries", q_ids, B, T),
            _checks.as_rows("segment ids of the keys", kv_ids, B, S),
        )
        for q_ids, kv_ids in mask.segment_ids
    ]
    q_segments, kv_segments = map(_stack, zip(*segments, strict=True)) if segments else (None, None)
    shapes = Shapes.of(
        (B // split[0], q_tokens.local, N // split[1], H),
        (kv_tokens.local, K // split[1], Hv),
        query.dtype,
        plan,
    )
    windowed = mask.left is not None or mask.right is not None
    positions_matter = q_positions is not None or windowed or q_tokens.padded or kv_tokens.padded
    problem = burst_kernels.Problem(
        B=shapes.B, t=shapes.t, s=shapes.s, N=shapes.N, K=shapes.K, H=H, Hv=Hv, dtype=query.dtype,
        soft_cap=logits_soft_cap is not None, masked=positions_matter or bool(segments),
        kinds=len(segments),
    )  # fmt: skip
    ring = Ring(
        axis_name=axis_name,
        queries=q_tokens,
        keys=kv_tokens,
        explicit=q_positions is not None,
        positions_matter=positions_matter,
        scale=_checks.check_scale(scale, H),
        logits_soft_cap=_checks.check_soft_cap(logits_soft_cap),
        left=mask.left,
        right=mask.right,
        plan=resolve(plan, shapes, chip.platform),
        tiles=burst_kernels.select(problem, chip, implementation, plan and plan.tile),
    )
    queries = Queries(query, positions=q_positions, segments=q_segments)
    return queries, Keys(key, value, positions=kv_positions, segments=kv_segments), ring


def _pair(positions: Positions | None) -> tuple:
    if isinstance(positions, (tuple, list)):
        return _checks.check_pair(positions)
    return positions, positions


def _stack(ids: tuple[Int[Array, "_b n"], ...]) -> Int[Array, "C b n"]:
    """Kinds of segment ids in one array; a kind that the batch shares is broadcast."""
    rows = max(x.shape[0] for x in ids)
    return jnp.stack([jnp.broadcast_to(x, (rows, x.shape[1])) for x in ids])


# What the caller calls each array of (queries, keys, sinks).
_NAMES = {
    "[0].q": "query",
    "[0].positions": "positions of the queries",
    "[0].segments": "q segment ids",
    "[1].k": "key",
    "[1].v": "value",
    "[1].positions": "positions of the keys",
    "[1].segments": "kv segment ids",
    "[2]": "sinks",
}


def _specs(arrays: tuple, whole: PartitionSpec) -> tuple:
    """PartitionSpecs of queries, keys and sinks, where [B, T, N, H] lies as `whole` says."""
    batch, tokens, heads, _ = whole

    def spec(x: Array) -> PartitionSpec:
        if x.ndim == 4:
            return whole
        if x.ndim == 1:
            return PartitionSpec(heads)
        # Positions [b, n] or segment ids [C, b, n]; b = 1 where the batch shares them.
        rows = batch if x.shape[-2] > 1 else None
        return PartitionSpec(*[None] * (x.ndim - 2), rows, tokens)

    return jax.tree.map(spec, arrays)


@functools.partial(jax.jit, static_argnames=("ring", "sharding"))
def _run(
    queries: Queries,
    keys: Keys,
    sinks: Float[Array, " N"] | None,
    ring: Ring,
    sharding: SequenceSharding,
) -> Partial:
    """Pads where needed, cuts into shards, runs the ring, cuts the padding off."""
    T = queries.q.shape[1]
    arrays = (_filled(queries, ring.queries), _filled(keys, ring.keys), sinks)
    whole = sharding.spec(4)
    specs = _specs(arrays, whole)
    arrays = jax.tree.map(lambda x, spec: _placing.reshard(x, spec, sharding), arrays, specs)
    out, lse = jax.shard_map(
        lambda *arrays: tuple(ring_attention(*_varying_alike(arrays), ring)),
        mesh=_placing.current_mesh(sharding),
        in_specs=specs,
        out_specs=(whole, PartitionSpec(*whole[:3])),
        axis_names=_placing.free_axes(sharding),
    )(*arrays)
    if out.shape[1] == T:
        return Partial(out, lse)
    # A dimension that the mesh axis does not divide cannot stay sharded over it.
    batch, _, heads, _ = whole
    out = _placing.reshard(out, PartitionSpec(batch, None, heads, None), sharding)
    lse = _placing.reshard(lse, PartitionSpec(batch, None, heads), sharding)
    return Partial(out[:, :T], lse[:, :T])


def _run_shard(
    queries: Queries, keys: Keys, sinks: Float[Array, " N"] | None, ring: Ring
) -> Partial:
    """Runs the ring where the arrays are shards already.

    In a partly manual shard_map batch and heads may still be sharded over Explicit axes: these
    are made manual too, since a tile knows one device.
    """
    rows = PartitionSpec(*(*jax.typeof(queries.q).sharding.spec, *[None] * 4)[:4])
    _, tokens, _, width = rows
    axes = frozenset(name for part in rows for name in names(part))
    if not axes:
        return ring_attention(*_varying_alike((queries, keys, sinks)), ring)
    _checks.check_shard_spec(rows, tokens, width)
    arrays = (queries, keys, sinks)
    specs = _specs(arrays, rows)
    arrays = jax.tree.map(jax.sharding.reshard, arrays, specs)
    out, lse = jax.shard_map(
        lambda *arrays: tuple(ring_attention(*_varying_alike(arrays), ring)),
        in_specs=specs,
        out_specs=(rows, PartitionSpec(*rows[:3])),
        axis_names=axes,
    )(*arrays)
    return Partial(out, lse)


def _filled(side: AnySide, tokens: ShardTokens) -> AnySide:
    """A side with its tokens padded to what the devices can share."""
    n = tokens.local * tokens.num_shards
    padded = {
        name: _placing.padded(getattr(side, name), 1, n)
        for name in ("q", "k", "v")
        if name in side._fields
    }
    if side.positions is not None:
        padded["positions"] = _placing.padded(side.positions, 1, n, -1)
    if side.segments is not None:
        padded["segments"] = _placing.padded(side.segments, 2, n, -1)
    return side._replace(**padded)


def _varying_alike(arrays: tuple) -> tuple:
    """All arrays varying over the same mesh axes: what `check_vma` asks of a loop's carry.

    Here and not in the ring, so that autodiff sums the gradient of a replicated input.
    """
    axes = frozenset().union(
        *(jax.typeof(x).manual_axis_type.varying for x in jax.tree.leaves(arrays))
    )

    def vary(x: Array) -> Array:
        missing = tuple(sorted(axes - jax.typeof(x).manual_axis_type.varying))
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(vary, arrays)
