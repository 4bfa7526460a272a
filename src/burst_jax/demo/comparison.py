"""One attention layer, forward and backward, by each strategy of `burst_jax.baselines`.

What is counted: bytes from the program, temporary memory from the compiled program, time as the
median of repetitions taken in turns, error against the layer in float64 on one device.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Array, Float
from rich.console import Console

import burst_jax as bj
from burst_jax.baselines import (
    Devices,
    Strategy,
    Weights,
    attention_layer,
    make_sharding,
    weight_specs,
)
from burst_jax.inspect import collective_bytes, temporary_bytes
from burst_jax.lm.console import working

WIDTH = 512
SEED = 0


class Shape(NamedTuple):
    """Heads of a layer of width `WIDTH`; both shapes have N H = WIDTH."""

    name: str
    num_heads: int
    num_kv_heads: int

    @property
    def head_dim(self) -> int:
        """H."""
        return WIDTH // self.num_heads


class Contender(NamedTuple):
    """A strategy as it is called in the table."""

    name: str
    strategy: Strategy
    plan: bj.Plan | None = None


class Row(NamedTuple):
    """What one strategy needs for one layer, forward and backward, on each device.

    Attributes:
        name: of the strategy.
        chosen: whether it is what `burst_attention` does at this shape when not told.
        sent_bytes: of activations and their gradients: what grows with the context.
        weight_bytes: to sum the weights' gradients over the devices; the same for any context.
        temporary_bytes: memory besides arguments and results.
        time_s: median.
        error: largest difference from float64, relative to the largest value; the worst of
            output, dx and the four weights' gradients.
    """

    name: str
    chosen: bool
    sent_bytes: int
    weight_bytes: int
    temporary_bytes: int
    time_s: float
    error: float


class Table(NamedTuple):
    """All strategies at one shape."""

    shape: Shape
    rows: list[Row]

    def row(self, name: str) -> Row:
        """The row of a strategy."""
        return next(row for row in self.rows if row.name == name)

    @property
    def chosen(self) -> Row:
        """The row that `burst_attention` takes when not told."""
        return next(row for row in self.rows if row.chosen)


SHAPES = (
    Shape("MHA, 8 query and 8 kv heads", 8, 8),
    Shape("GQA, 32 query and 8 kv heads", 32, 8),
)
QUERIES, KEYS = "queries travel (Burst)", "keys travel (ring)"
CONTENDERS = (
    Contender(QUERIES, "ring", bj.Plan(backward="q")),
    Contender(KEYS, "ring", bj.Plan(backward="kv")),
    Contender("all-gather of keys", "all_gather"),
    Contender("tensor parallel", "tensor_parallel"),
)

# Output, and the gradients of x and of the weights: of jax or, where they are the truth, of numpy.
Results = tuple[Any, tuple[Any, Weights]]


class Inputs(NamedTuple):
    """A layer's input and weights, and the gradient that arrives at its output."""

    x: Float[Array, "B T D"]
    weights: Weights
    dy: Float[Array, "B T D"]


class Program(NamedTuple):
    """One contender, ready to run."""

    contender: Contender
    function: Callable[[Array, Weights, Array], Results]
    inputs: Inputs
    compiled: jax.stages.Compiled


def compare(
    shape: Shape, *, devices: Devices, length: int, repeats: int, console: Console
) -> Table:
    """Runs every strategy at one shape, in float32 with a causal mask."""
    inputs = _inputs(shape, length)
    with working(console, f"{shape.name}: the layer in float64, to compare with"):
        truth = _truth(inputs)
    sharding = make_sharding(devices, length=length)
    programs = []
    for contender in CONTENDERS:
        with working(console, f"{shape.name}: compiling {contender.name}"):
            programs.append(_prepare(contender, inputs, sharding))
    with working(console, f"{shape.name}: running each {repeats + 1} times"):
        times_s, results = _run_in_turns(programs, repeats)
    chosen = _chosen_side(shape, sharding)
    rows = []
    for program, time_s, (y, (dx, dw)) in zip(programs, times_s, results, strict=True):
        name, _, plan = program.contender
        sent = collective_bytes(program.function, *program.inputs)
        weight_bytes = sent.get("psum", 0)
        restored = (sharding.restore(y), (sharding.restore(dx), dw))
        rows.append(
            Row(
                name=name,
                chosen=plan is not None and plan.backward == chosen,
                sent_bytes=sent["total"] - weight_bytes,
                weight_bytes=weight_bytes,
                temporary_bytes=temporary_bytes(program.compiled),
                time_s=time_s,
                error=_error(restored, truth),
            )
        )
    return Table(shape, rows)


def _inputs(shape: Shape, length: int) -> Inputs:
    N, K, H = shape.num_heads, shape.num_kv_heads, shape.head_dim
    keys = iter(jax.random.split(jax.random.key(SEED), 6))

    def normal(*sizes: int, scale: float = 1.0) -> Array:
        return scale * jax.random.normal(next(keys), sizes)

    # Each product keeps unit variance, so that scores are of the size that they have in a model.
    project = WIDTH**-0.5
    weights = Weights(
        query=normal(WIDTH, N, H, scale=project),
        key=normal(WIDTH, K, H, scale=project),
        value=normal(WIDTH, K, H, scale=project),
        out=normal(N, H, WIDTH, scale=(N * H) ** -0.5),
    )
    return Inputs(normal(1, length, WIDTH), weights, normal(1, length, WIDTH))


def _prepare(contender: Contender, inputs: Inputs, sharding: bj.SequenceSharding) -> Program:
    layer = attention_layer(
        contender.strategy, sharding=sharding, mask=bj.Mask.causal(), plan=contender.plan
    )

    def forward_and_backward(x: Array, weights: Weights, dy: Array) -> Results:
        y, pull = jax.vjp(layer, x, weights)
        return y, pull(dy)

    weights = jax.tree.map(
        lambda w, spec: jax.device_put(w, NamedSharding(sharding.mesh, spec)),
        inputs.weights,
        weight_specs(contender.strategy),
    )
    placed = Inputs(sharding.place(inputs.x), weights, sharding.place(inputs.dy))
    compiled = jax.jit(forward_and_backward).lower(*placed).compile()
    return Program(contender, forward_and_backward, placed, compiled)


def _run_in_turns(programs: list[Program], repeats: int) -> tuple[list[float], list[Results]]:
    """Median time of each program, and its results.

    All run once, then all again: whatever slows the machine for a while slows each of them.
    """
    results = [jax.block_until_ready(program.compiled(*program.inputs)) for program in programs]
    times_s: list[list[float]] = [[] for _ in programs]
    for _ in range(repeats):
        for program, times in zip(programs, times_s, strict=True):
            start = time.perf_counter()
            jax.block_until_ready(program.compiled(*program.inputs))
            times.append(time.perf_counter() - start)
    return [statistics.median(times) for times in times_s], results


def _chosen_side(shape: Shape, sharding: bj.SequenceSharding) -> str:
    """The side that travels backward where nobody says."""
    query, key = (
        (1, sharding.padded_length, heads, shape.head_dim)
        for heads in (shape.num_heads, shape.num_kv_heads)
    )
    plan = bj.make_plan(
        query, key, sharding=sharding, mask=bj.Mask.causal(), dtype=jnp.dtype("float32")
    )
    assert plan.backward is not None, "a plan made is complete"
    return plan.backward


def _truth(inputs: Inputs) -> Results:
    """The layer in float64 on one device, by `burst_jax.reference`.

    A layer is the sum of its kv heads with their query heads, and so are its gradients; one after
    the other they need memory for one head's T x T scores only.
    """
    with jax.enable_x64(True):
        x, weights, dy = jax.tree.map(lambda a: jnp.asarray(np.asarray(a), jnp.float64), inputs)
        K = weights.key.shape[1]
        group = weights.query.shape[1] // K

        def layer(x: Array, weights: Weights) -> Array:
            q, k, v = (jnp.einsum("btd,dnh->btnh", x, w) for w in weights[:3])
            out = bj.reference.attention(q, k, v, mask=bj.Mask.causal())
            return jnp.einsum("btnh,nhd->btd", out, weights.out)

        @jax.jit
        def of_head(x: Array, weights: Weights, dy: Array) -> Results:
            y, pull = jax.vjp(layer, x, weights)
            return y, pull(dy)

        parts = []
        for k in range(K):
            q, kv = slice(k * group, (k + 1) * group), slice(k, k + 1)
            head = Weights(
                weights.query[:, q], weights.key[:, kv], weights.value[:, kv], weights.out[q]
            )
            parts.append(jax.tree.map(np.asarray, of_head(x, head, dy)))
    ys, dxs, dws = zip(*((y, dx, dw) for y, (dx, dw) in parts), strict=True)
    heads_at = Weights._make([1, 1, 1, 0])  # the dimension of the heads in each matrix
    dw = jax.tree.map(lambda axis, *parts: np.concatenate(parts, axis), heads_at, *dws)
    return sum(ys), (sum(dxs), dw)


def _error(got: Results, truth: Results) -> float:
    """Largest difference relative to the largest value; the worst of all arrays."""

    def relative(a: Array, b: np.ndarray) -> float:
        return float(np.abs(np.asarray(a, np.float64) - b).max() / np.abs(b).max())

    return max(jax.tree.leaves(jax.tree.map(relative, got, truth)))
