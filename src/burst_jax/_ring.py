"""The algorithm: exact attention over a ring of devices, forward and backward.

Forward: Ring Attention (arXiv 2310.01889) with the online-softmax merge of BurstAttention
(arXiv 2403.09347, section 3.2). Backward: BurstAttention's (section 3.3, Alg. 2), in which the
query side travels, or the classic one, in which the key side does. We differ from both papers:

  1. What travels is chosen per call and pass by bytes: with few kv heads, keys are less to carry.
  2. R - 1 hops for every message. A device's own block never travels: it is computed at home, and
     added when its traveller, which left empty-handed, returns.
  3. A hop's messages leave before its tile starts. The results that travel home (gradients; partial
     outputs where queries travel forward) are one hop behind, so nothing on the wire waits for the
     tile of its own hop. Where something returns, the home tile is cut in two: one half hides the
     first message, the other the last.
  4. Partial results stay in the accumulators' dtype from the tile to the last merge.
  5. Hops at which no device would find a visible pair are not made.

All four rings (forward or backward, keys or queries travelling) are one function, `circulate`.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

import burst_kernels
from burst_jax import _wire
from burst_jax._partial import Partial, merge
from burst_jax._schedule import Schedule, Side, Visit
from burst_jax._sides import (
    Keys,
    Queries,
    Ring,
    arrived,
    at,
    halves,
    hide_padding,
    recast,
    tile_mask,
    turned,
)


class Found(NamedTuple):
    """What tiles found; None is nothing yet. `circulate` only adds and sends it, as trees.

    Attributes:
        of_queries: forward a Partial, backward (dq,).
        of_keys: forward None, backward (dk, dv).
    """

    of_queries: Any
    of_keys: Any


class Residuals(NamedTuple):
    """Kept from the forward for the backward; out and lse are tagged for remat policies."""

    queries: Queries
    keys: Keys
    sinks: Float[Array, " N"] | None
    out: Float[Array, "B t N Hv"]
    lse: Float[Array, "B t N"]


@functools.partial(jax.custom_vjp, nondiff_argnames=("ring",))
def ring_attention(
    queries: Queries, keys: Keys, sinks: Float[Array, " N"] | None, ring: Ring
) -> Partial:
    """Attention of this device's queries to the keys of all devices; lse is differentiable too.

    Arrays come and go with tokens before heads, [B, t, N, H]; inside, heads come first.
    """
    return ring_attention_fwd(queries, keys, sinks, ring)[0]


def ring_attention_fwd(
    queries: Queries, keys: Keys, sinks: Float[Array, " N"] | None, ring: Ring
) -> tuple[Partial, Residuals]:
    """Forward ring. Sinks enter at the last merge, as one more key whose value is zero."""
    forward = burst_kernels.BACKENDS[ring.tiles.name].forward

    def tile(queries: Queries, keys: Keys, onto: Found) -> Found:
        mask = tile_mask(queries, keys, ring)
        seen = forward(queries.q, keys.k, keys.v, mask, ring.tiles.config, onto.of_queries)
        return Found(Partial(*seen), None)

    # Closed to partial evaluation by jax.checkpoint, which recomputes nothing here (autodiff goes
    # no deeper than this rule). Open, a scan over layers would take all that depends on no array of
    # its own, such as masks by position, out of the loop as a hundred constants; on those the
    # partitioner of jaxlib 0.11.2 crashes.
    around = functools.partial(circulate, tile=tile, ring=ring, travels=ring.plan.forward)
    seen, _ = jax.checkpoint(around, prevent_cse=False)(turned(queries), turned(keys))
    if sinks is not None:
        sink = jnp.broadcast_to(sinks.astype(seen.lse.dtype)[None, :, None], seen.lse.shape)
        seen = merge(seen, Partial(jnp.zeros_like(seen.out), sink))
    out = checkpoint_name(seen.out.astype(queries.q.dtype).swapaxes(1, 2), "burst_out")
    lse = checkpoint_name(seen.lse.swapaxes(1, 2), "burst_lse")
    return Partial(out, lse), Residuals(queries, keys, sinks, out, lse)


def ring_attention_bwd(ring: Ring, kept: Residuals, cotangents: Partial) -> tuple:
    """Backward ring. delta is made once, before the ring, so `out` never travels."""
    queries, keys, sinks, out, lse = kept
    backward = burst_kernels.BACKENDS[ring.tiles.name].backward
    do, dlse = cotangents
    # d lse / d scores = p, so lse's cotangent enters exactly where -delta does.
    delta = (do.astype(lse.dtype) * out.astype(lse.dtype)).sum(-1) - dlse
    delta = jnp.where(jnp.isneginf(lse), 0.0, delta)

    def tile(queries: Queries, keys: Keys, onto: Found) -> Found:
        q, do, lse, delta, *_ = queries
        mask = tile_mask(queries, keys, ring)
        so_far = (*(onto.of_queries or (None,)), *(onto.of_keys or (None, None)))
        config = ring.tiles.config
        dq, dk, dv = backward(q, keys.k, keys.v, do, lse, delta, mask, config, so_far)
        return Found((dq,), (dk, dv))

    sides = turned(queries._replace(do=do, lse=lse, delta=delta)), turned(keys)
    found = circulate(*sides, tile, ring=ring, travels=ring.plan.backward)
    dq, dk, dv = (
        x.astype(queries.q.dtype).swapaxes(1, 2) for x in (*found.of_queries, *found.of_keys)
    )
    dsinks = None
    if sinks is not None:
        # The sink's probability is exp(sink - lse); its value is zero, so its ds is -p delta.
        p = jnp.exp(sinks.astype(lse.dtype)[None, None] - lse)
        dsinks = -(p * delta).sum((0, 1)).astype(sinks.dtype)
    return Queries(dq), Keys(dk, dv), dsinks


ring_attention.defvjp(ring_attention_fwd, ring_attention_bwd)


def circulate(
    queries: Queries,
    keys: Keys,
    tile: Callable[[Queries, Keys, Found], Found],
    *,
    ring: Ring,
    travels: Side,
) -> Found:
    """Sends one side round the ring, and folds what the tiles find of both sides.

    Args:
        queries, keys: the two sides on this device.
        tile: computes one pair of shards, with the positions of both filled in, and adds what it
            finds to what was found before.
        ring: the static description of the call.
        travels: the side that moves; the other stays.

    Returns:
        Complete results for this device's own queries and own keys.
    """
    schedule = ring.schedule(travels)
    me = jax.lax.axis_index(ring.axis_name) if schedule.num_shards > 1 else 0
    queries, keys = hide_padding(me, queries, ring.queries), hide_padding(me, keys, ring.keys)
    own = keys if travels == "kv" else queries  # a layout's positions are not sent but computed
    queries, keys = at(me, queries, ring.queries, ring), at(me, keys, ring.keys, ring)
    if not schedule.offsets:
        return tile(queries, keys, Found(None, None))

    def meet(shard: Int[Array, ""] | int, traveller: Any, stayed: Any) -> Any:
        """What stays here, added to `stayed`, and what goes home with the traveller of `shard`."""
        if travels == "kv":
            return tile(queries, at(shard, traveller, ring.keys, ring), Found(stayed, None))
        return tile(at(shard, traveller, ring.queries, ring), keys, Found(None, stayed))[::-1]

    returns = travels == "q" or queries.do is not None
    moves = _mover(ring, schedule, backward=queries.do is not None)

    # The (first half of the) home tile hides the first message. Tied, or the compiler may start
    # the first visit before it, and then it hides nothing. The traveller is what is cut, so that
    # what stays is whole and the hops can add to it.
    whole = keys if travels == "kv" else queries
    early, late = halves(whole) if returns else (whole, None)
    message = recast(own, ring.plan.wire_dtype)
    message = _wire.join(message) if ring.plan.one_message else message
    message, _ = moves(message, schedule.first)
    message, (stayed, home) = jax.lax.optimization_barrier((message, meet(me, early, None)))

    # Invariant before a visit at offset o: `message` is device me - o's; `stayed` is what this
    # device's visits found so far of the side that stays; `collected` is what the traveller of the
    # visit before has collected, here and on the devices that it met earlier.
    def hop(carry, offset, plan: Visit):
        stayed, collected, message = carry
        onward, arriving = moves(message, plan.onward, collected, plan.behind)
        shard = (me - offset) % schedule.num_shards
        traveller = recast(arrived(message, travels, ring), own[0].dtype)
        stayed, goes = meet(shard, traveller, stayed)
        return stayed, _fold(arriving, goes), onward

    carry = (stayed, None, message)
    for offsets, plan in schedule.visits(returns=returns):
        carry = _run(functools.partial(hop, plan=plan), carry, offsets)
    stayed, collected, _ = carry

    # The second half waits for what is to be sent home, and hides that.
    if returns:
        collected, late = jax.lax.optimization_barrier((collected, late))
        _, returned = moves(None, None, collected, schedule.homeward)
        if late is not None:
            stayed, second = meet(me, late, stayed)
            home = jax.tree.map(lambda a, b: jnp.concatenate((a, b), axis=2), home, second)
        home = _fold(home, returned)
    return Found(stayed, home) if travels == "kv" else Found(home, stayed)


def _run(hop: Callable[..., Any], carry: Any, offsets: list[int]) -> Any:
    """Hops that send alike: one as it is, several as one rolled loop."""
    if len(offsets) == 1:
        return hop(carry, offsets[0])
    steps = jnp.asarray(offsets, jnp.int32)
    return jax.lax.scan(lambda c, o: (hop(c, o), None), carry, steps)[0]


def _fold(a: Any, b: Any) -> Any:
    """Results over disjoint keys, or queries, put together; None is nothing yet."""
    if a is None or b is None:
        return b if a is None else a
    return merge(a, b) if isinstance(a, Partial) else jax.tree.map(jnp.add, a, b)


def _mover(ring: Ring, schedule: Schedule, *, backward: bool) -> Callable[..., tuple]:
    """`_wire.move` for one pass round this ring; gradients travel in the plan's dtype."""
    return functools.partial(
        _wire.move,
        axis_name=ring.axis_name,
        to=schedule.to,
        joined=ring.plan.one_message,
        as_bits=ring.plan.as_bits,
        dtype=ring.plan.gradient_dtype if backward else None,
    )
