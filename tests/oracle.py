"""What the tests of the attention share: cases, inputs, the truth, and how far from it we are.

Two oracles: `truth` is `burst_jax.reference.attention` with JAX's own derivatives; `dense` is
written out in NumPy with the derivatives by hand, and knows nothing of either package.
"""

import contextlib
import dataclasses
import functools
import itertools
import random
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
from jax.sharding import AxisType

import burst_jax as bj

# A test compiles much and computes little: without LLVM's optimizations a case takes two thirds of
# the time. test_mesh_modes.py compiles as users do.
QUICKLY = {"xla_backend_optimization_level": 0}


class Inputs(NamedTuple):
    """Arrays in natural order, NumPy; `do` and `dlse` are the cotangents of out and lse."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    do: np.ndarray
    dlse: np.ndarray
    sinks: np.ndarray | None


class Results(NamedTuple):
    """Outputs and gradients in natural order, NumPy."""

    out: np.ndarray
    lse: np.ndarray
    dq: np.ndarray
    dk: np.ndarray
    dv: np.ndarray
    dsinks: np.ndarray | None


@contextlib.contextmanager
def as_users_run_it() -> Iterator[None]:
    """Without the shape checker, which users do not have: it would speak before our errors do."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", before)


def generator(name: str) -> np.random.Generator:
    """Random numbers that are the same in every run, and others for every name."""
    return np.random.default_rng(zlib.crc32(name.encode()))


def inputs(
    name: str,
    *,
    T: int,
    S: int | None = None,
    B: int = 2,
    N: int = 2,
    K: int = 2,
    H: int = 8,
    Hv: int | None = None,
    sinks: bool = False,
    dtype: Any = np.float64,
) -> Inputs:
    """Normally distributed inputs and cotangents."""
    rng = generator(name)
    S, Hv = S or T, Hv or H

    def normal(*shape: int, dtype: Any = dtype) -> np.ndarray:
        return np.asarray(jnp.asarray(rng.normal(size=shape)).astype(dtype))

    wide = np.float64 if dtype == np.float64 else np.float32
    return Inputs(
        q=normal(B, T, N, H),
        k=normal(B, S, K, H),
        v=normal(B, S, K, Hv),
        do=normal(B, T, N, Hv),
        dlse=normal(B, T, N, dtype=wide),
        sinks=normal(N, dtype=wide) if sinks else None,
    )


def in_dtype(x: Inputs, dtype: Any) -> Inputs:
    """The same values in another dtype."""
    return Inputs(*(None if a is None else np.asarray(jnp.asarray(a).astype(dtype)) for a in x))


def ring(
    R: int, layout: str = "contiguous", kind: AxisType = AxisType.Explicit, **kwargs: Any
) -> bj.SequenceSharding:
    """A sharding over R of the simulated devices."""
    mesh = jax.make_mesh((R,), ("sp",), axis_types=(kind,), devices=jax.devices()[:R])
    return bj.SequenceSharding(mesh, "sp", layout, **kwargs)


def natural(where: bj.SequenceSharding, x: Any, length: int) -> np.ndarray:
    """What `restore` does, in NumPy; test_sharding_object.py shows that they agree."""
    tokens = dataclasses.replace(where, length=length, key_length=None)
    position = np.asarray(tokens.place(np.arange(length), axis=0, pad_value=-1))
    x = np.asarray(x)
    there = np.empty((x.shape[0], length, *x.shape[2:]), x.dtype)
    there[:, position[position >= 0]] = x[:, position >= 0]
    return there


def with_gradients(attend: Callable[..., Any], x: Inputs, *, compile: bool = True) -> Results:
    """`attend(q, k, v, sinks) -> out, lse` and its vjp at the cotangents, as it lies."""

    def run(q, k, v, sinks, do, dlse):
        (out, lse), vjp = jax.vjp(attend, q, k, v, sinks)
        return Results(out, lse, *vjp((do.astype(out.dtype), dlse.astype(lse.dtype))))

    run = jax.jit(run, compiler_options=QUICKLY) if compile else run
    return run(x.q, x.k, x.v, x.sinks, x.do, x.dlse)


def sharded(x: Inputs, where: bj.SequenceSharding, **kwargs: Any) -> Results:
    """`burst_attention` with its gradients: placed, run, and brought back to natural order.

    `kwargs` are those of burst_attention, arrays among them in layout order.
    """

    def attend(q, k, v, sinks):
        return bj.burst_attention(
            q, k, v, sharding=where, sinks=sinks, return_residual=True, **kwargs
        )

    placed = Inputs(*(where.place(a) for a in x[:-1]), x.sinks)
    got = with_gradients(attend, placed)
    T, S = x.q.shape[1], x.k.shape[1]
    back = [natural(where, a, n) for a, n in zip(got[:5], (T, T, T, S, S), strict=True)]
    return Results(*back, None if got.dsinks is None else np.asarray(got.dsinks))


def truth(x: Inputs, dtype: Any = jnp.float64, **kwargs: Any) -> Results:
    """The oracle on the same values, in float64."""

    def attend(q, k, v, sinks):
        return bj.reference.attention(q, k, v, sinks=sinks, return_residual=True, **kwargs)

    got = with_gradients(attend, in_dtype(x, dtype))
    return Results(*(None if a is None else np.asarray(a) for a in got))


def dense(
    x: Inputs,
    seen: np.ndarray,
    *,
    scale: float | None = None,
    logits_soft_cap: float | None = None,
) -> Results:
    """Attention and its derivatives by hand, float64; `seen` broadcasts to [B, T, S]."""
    q, k, v, do, dlse, sinks = (None if a is None else np.asarray(a, np.float64) for a in x)
    (B, T, N, _), K = q.shape, k.shape[2]
    scores = _scores(q, k, seen, scale, logits_soft_cap)
    sink = np.full((N,), -np.inf) if sinks is None else sinks
    sink = np.broadcast_to(sink[None, :, None, None], (B, N, T, 1))
    high = np.maximum(scores.max(-1, keepdims=True), sink)
    high = np.where(np.isneginf(high), 0.0, high)
    total = np.exp(scores - high).sum(-1, keepdims=True) + np.exp(sink - high)
    with np.errstate(divide="ignore"):
        lse = (high + np.log(total))[..., 0].transpose(0, 2, 1)
    p = _probabilities(scores, lse)
    out = np.einsum("bnts,bsnh->btnh", p, np.repeat(v, N // K, axis=2))
    delta = np.where(np.isneginf(lse), 0.0, (do * out).sum(-1) - dlse)
    dq, dk, dv = dense_tile_gradients(
        q, k, v, do, lse, delta, seen, scale=scale, logits_soft_cap=logits_soft_cap
    )
    dsinks = None if sinks is None else -(np.exp(sinks - lse) * delta).sum((0, 1))
    return Results(out, lse, dq, dk, dv, dsinks)


def dense_tile_gradients(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    do: np.ndarray,
    lse: np.ndarray,
    delta: np.ndarray,
    seen: np.ndarray,
    *,
    scale: float | None = None,
    logits_soft_cap: float | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """dq, dk and dv that some keys cause, in rows whose lse and delta are of more keys."""
    (N, H), K = q.shape[2:], k.shape[2]
    scores = _scores(q, k, seen, scale, logits_soft_cap)
    p = _probabilities(scores, lse)
    k, v = (np.repeat(a, N // K, axis=2) for a in (k, v))
    ds = p * (np.einsum("btnh,bsnh->bnts", do, v) - delta.transpose(0, 2, 1)[..., None])
    if logits_soft_cap is not None:
        ds *= 1 - (np.where(np.isneginf(scores), 0.0, scores) / logits_soft_cap) ** 2
    scale = H**-0.5 if scale is None else scale

    def of_kv_heads(a: np.ndarray) -> np.ndarray:
        return a.reshape(*a.shape[:2], K, N // K, a.shape[3]).sum(3)

    return (
        np.einsum("bnts,bsnh->btnh", ds, k) * scale,
        of_kv_heads(np.einsum("bnts,btnh->bsnh", ds, q) * scale),
        of_kv_heads(np.einsum("bnts,btnh->bsnh", p, do)),
    )


def _scores(
    q: np.ndarray, k: np.ndarray, seen: np.ndarray, scale: float | None, cap: float | None
) -> np.ndarray:
    """[B, N, T, S]; -inf where a pair does not count."""
    (B, T, N, H), (S, K) = q.shape, k.shape[1:3]
    scores = np.einsum("btnh,bsnh->bnts", q, np.repeat(k, N // K, axis=2))
    scores = scores * (H**-0.5 if scale is None else scale)
    scores = scores if cap is None else cap * np.tanh(scores / cap)
    return np.where(np.broadcast_to(seen, (B, T, S))[:, None], scores, -np.inf)


def _probabilities(scores: np.ndarray, lse: np.ndarray) -> np.ndarray:
    """[B, N, T, S]; zero in rows that see nothing."""
    lse = np.where(np.isneginf(lse), np.inf, lse).transpose(0, 2, 1)
    return np.exp(scores - lse[..., None])


def error(got: np.ndarray, want: np.ndarray) -> float:
    """Greatest error, relative where the values are greater than one; -inf must match -inf."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape, (got.shape, want.shape)
    infinite = np.isneginf(want)
    if not np.array_equal(np.isneginf(got), infinite):
        return np.inf
    got, want = got[~infinite], want[~infinite]
    # A NaN must not hide: max() of an array with one is one, and no comparison with it holds.
    return float(np.abs(got - want).max(initial=0) / max(1.0, np.abs(want).max(initial=0)))


def assert_close(got: Results, want: Results, tolerance: float) -> None:
    """Every output and every gradient, with the ones that are wrong by name."""
    assert (got.dsinks is None) == (want.dsinks is None)
    errors = {
        name: error(a, b)
        for name, a, b in zip(Results._fields, got, want, strict=True)
        if b is not None
    }
    wrong = {name: f"{e:.1e}" for name, e in errors.items() if not e <= tolerance}
    assert not wrong, (
        f"beyond {tolerance:.0e}: {wrong} of { {n: f'{e:.0e}' for n, e in errors.items()} }"
    )
    # What is compared is there: a case whose gradients are all zero would show nothing.
    for name in ("out", "dq", "dk", "dv"):
        assert np.abs(getattr(want, name)).max() > 1e-3, f"{name} of this case is zero everywhere"


def norm_error(got: Any, want: Any) -> float:
    """Root mean square of the error."""
    difference = np.asarray(got, np.float64) - np.asarray(want, np.float64)
    return float(np.sqrt(np.mean(difference**2)))


# Masks by name. A mask is given how to lay out its ids (`where.place` or as they are) and B, T, S.

Lay = Callable[[np.ndarray], Any]


def _documents(n: int, B: int | None, seed: int) -> np.ndarray:
    """Ids of packed documents of uneven length, [n] or [B, n]."""
    rng = np.random.default_rng([seed, n])
    ids = np.sort(rng.integers(0, 5, (B or 1, n)).astype(np.int32), axis=-1)
    return ids if B else ids[0]


def _segments(lay: Lay, B: int | None, T: int, S: int, seed: int = 0) -> bj.Mask:
    def placed(n: int) -> Any:
        ids = _documents(n, B, seed)
        return lay(ids) if B else lay(ids[None])[0]

    return bj.Mask.segments(placed(T)) if T == S else bj.Mask.segments(placed(T), placed(S))


MASKS: dict[str, Callable[[Lay, int, int, int], bj.Mask]] = {
    "full": lambda lay, B, T, S: bj.Mask.full(),
    "causal": lambda lay, B, T, S: bj.Mask.causal(),
    "window": lambda lay, B, T, S: bj.Mask.sliding_window(5),
    "both-sided window": lambda lay, B, T, S: bj.Mask.sliding_window(7, 3),
    "segments": lambda lay, B, T, S: _segments(lay, None, T, S),
    "causal & segments": lambda lay, B, T, S: bj.Mask.causal() & _segments(lay, B, T, S),
    "window & segments & segments": lambda lay, B, T, S: (
        _segments(lay, B, T, S) & bj.Mask.sliding_window(9, 2) & _segments(lay, None, T, S, seed=1)
    ),
}


def covering(
    factors: Mapping[str, Sequence[Any]], strength: int = 2, seed: int = 0
) -> list[dict[str, Any]]:
    """Few rows in which every `strength` factors take every combination of their values.

    Greedy: each row starts from a combination still missing and is the best of some random tries.
    """
    names = list(factors)
    groups = list(itertools.combinations(names, strength))
    # A dict and no set: its order is the same in every process, and so are the rows.
    missing = dict.fromkeys(
        (group, values)
        for group in groups
        for values in itertools.product(*(factors[name] for name in group))
    )
    rng = random.Random(seed)
    rows = []

    def covered(row: Mapping[str, Any]) -> list[tuple]:
        combinations = ((group, tuple(row[name] for name in group)) for group in groups)
        return [x for x in combinations if x in missing]

    while missing:
        start = dict(zip(*next(iter(missing)), strict=True))
        tries = [{name: rng.choice(factors[name]) for name in names} | start for _ in range(20)]
        best = max(tries, key=lambda row: len(covered(row)))
        for combination in covered(best):
            del missing[combination]
        rows.append(best)
    return rows


@functools.lru_cache
def permutation(n: int) -> np.ndarray:
    """Positions in no order, none of them missing."""
    return generator(f"permutation of {n}").permutation(n).astype(np.int32)
