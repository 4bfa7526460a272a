"""What a program sends, hides and holds, read off its jaxpr or its compiled form; no timings.

Works for any function, ours or a peer's.
"""

import dataclasses
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr

# Bytes that one of n devices sends for a local operand of x bytes, by the bandwidth-optimal ring
# algorithms that XLA and NCCL use (Patarasuk and Yuan, 2009).
_SENT: dict[str, Callable[[int, int], float]] = {
    "ppermute": lambda x, n: x,
    "all_gather": lambda x, n: x * (n - 1),
    "psum": lambda x, n: 2 * x * (n - 1) / n,
    "pmax": lambda x, n: 2 * x * (n - 1) / n,
    "pmin": lambda x, n: 2 * x * (n - 1) / n,
    "reduce_scatter": lambda x, n: x * (n - 1) / n,
    "all_to_all": lambda x, n: x * (n - 1) / n,
}
# The names that primitives carry under `check_vma`, and older ones, mapped to those above.
_ALIASES = {
    "psum2": "psum",
    "psum_invariant": "psum",
    "all_gather_invariant": "all_gather",
    "psum_scatter": "reduce_scatter",
    "unreduced_psum": "psum",
    "all_gather_reduced": "all_gather",
    "unreduced_reduce_scatter": "reduce_scatter",
}


def collective_bytes(fn: Callable[..., Any], *args: Any) -> dict[str, int]:
    """Bytes that one device sends when `fn(*args)` runs once, by collective, from the jaxpr.

    Counts the collectives that are written in the program (in `shard_map`), with the lengths of
    scans and the costlier branch of conditionals; not what XLA's partitioner may add outside.
    A permute that leaves data where it is counts as nothing.

    Args:
        fn: any traceable function; it is not run.
        *args: its arguments: arrays, or `jax.ShapeDtypeStruct`s with their sharding.

    Returns:
        Collective's name -> bytes, and "total".

    Raises:
        ValueError: a collective stands in a while loop whose number of turns only data knows.
    """
    sent: defaultdict[str, float] = defaultdict(float)
    for name, size, times in _collectives(jax.make_jaxpr(fn)(*args).jaxpr, {}):
        sent[name] += size * times
    return {
        **{name: round(n) for name, n in sorted(sent.items())},
        "total": round(sum(sent.values())),
    }


def collective_counts(fn: Callable[..., Any], *args: Any) -> dict[str, int]:
    """How many times each collective runs: `ppermute` / messages is the number of hops."""
    times: Counter[str] = Counter()
    for name, _, n in _collectives(jax.make_jaxpr(fn)(*args).jaxpr, {}):
        times[name] += n
    return dict(sorted(times.items()))


def equations(jaxpr: Jaxpr) -> Iterator[Any]:
    """Every equation of a jaxpr and of all jaxprs inside it."""
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in _inner(eqn):
            yield from equations(inner)


def _collectives(jaxpr: Jaxpr, sizes: dict[str, int]) -> Iterator[tuple[str, float, int]]:
    """(name, bytes one device sends, how often) of each collective; `sizes`: mesh axes' sizes."""
    for eqn in jaxpr.eqns:
        name = _ALIASES.get(eqn.primitive.name, eqn.primitive.name)
        if name in _SENT:
            yield name, _bytes_sent(name, eqn, sizes), 1
        elif name == "cond":
            branches = [list(_collectives(b.jaxpr, sizes)) for b in eqn.params["branches"]]
            yield from max(branches, key=lambda found: sum(x * n for _, x, n in found))
        else:
            inner_sizes, turns = sizes, 1
            if name == "shard_map":
                inner_sizes = {**sizes, **dict(eqn.params["mesh"].shape)}
            elif name in ("pmap", "xla_pmap"):
                inner_sizes = {**sizes, eqn.params["axis_name"]: eqn.params["axis_size"]}
            elif name == "scan":
                turns = eqn.params["length"]
            for inner in _inner(eqn):
                found = list(_collectives(inner, inner_sizes))
                if found and name == "while":
                    raise ValueError(
                        "a collective stands in a while loop, whose number of turns depends on "
                        "data; bytes cannot be counted. Use lax.scan or a fori_loop with constant "
                        "bounds."
                    )
                yield from ((n, x, times * turns) for n, x, times in found)


def _bytes_sent(name: str, eqn: Any, sizes: dict[str, int]) -> float:
    axes = eqn.params.get("axis_name", eqn.params.get("axes", ()))
    axes = axes if isinstance(axes, (tuple, list)) else (axes,)
    n = math.prod(sizes.get(axis, 1) for axis in axes)
    x = sum(math.prod(v.aval.shape) * v.aval.dtype.itemsize for v in eqn.invars)
    if name == "ppermute":
        moves = [source != target for source, target in eqn.params["perm"]]
        return x if any(moves) else 0
    return _SENT[name](x, n)


def _inner(eqn: Any) -> Iterator[Jaxpr]:
    for value in eqn.params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(item, ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, Jaxpr):
                yield item


@dataclasses.dataclass(frozen=True, kw_only=True)
class Overlap:
    """Transfers of a compiled program. A transfer in a loop counts once.

    Attributes:
        hidden: asynchronous transfers with at least one kernel between start and done.
        exposed: transfers with none, synchronous ones included.
        exposed_names: the exposed ones' names in the program.
    """

    hidden: int
    exposed: int
    exposed_names: tuple[str, ...]


# An HLO instruction: its name, its opcode, its operands (shapes may hold commas and braces).
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = .*?\s([a-z][a-z0-9\-]*)\((.*)$")
_COLLECTIVES = (
    "collective-permute", "all-gather", "all-reduce", "reduce-scatter", "all-to-all",
    "ragged-all-to-all", "collective-broadcast",
)  # fmt: skip
_KERNELS = ("fusion", "custom-call", "while", "dot", "convolution", "call", "conditional")


def overlap(compiled: jax.stages.Compiled) -> Overlap:
    """Of the collectives in a compiled program, how many hide behind a kernel.

    Reads the scheduled HLO, so it is a fact of the schedule, on the hardware that the program was
    compiled for. CPU has no asynchronous collectives: there all are exposed.

    Args:
        compiled: `jax.jit(fn).lower(*args).compile()`.
    """
    hidden, exposed = 0, []
    running: dict[str, bool] = {}
    for line in _given(compiled.as_text(), "text").splitlines():
        if line and not line[0].isspace():
            running = {}
        if (found := _INSTRUCTION.match(line)) is None:
            continue
        name, opcode, rest = found.groups()
        if _is_start(opcode, rest):
            running[name] = False
        elif opcode.endswith("-done"):
            operand = re.match(r"[^%]*%?([\w.\-]+)", rest.split(")")[0].split(" ")[-1])
            start = operand.group(1) if operand else ""
            if start in running:
                if running.pop(start):
                    hidden += 1
                else:
                    exposed.append(start)
        elif opcode in _COLLECTIVES:
            exposed.append(name)
        elif opcode in _KERNELS:
            running = dict.fromkeys(running, True)
    return Overlap(hidden=hidden, exposed=len(exposed), exposed_names=tuple(exposed))


def _is_start(opcode: str, rest: str) -> bool:
    if opcode == "async-start":
        return any(f"calls=%{c}" in rest or f"calls={c}" in rest or c in rest for c in _COLLECTIVES)
    return opcode.endswith("-start") and opcode.removesuffix("-start") in _COLLECTIVES


def temporary_bytes(compiled: jax.stages.Compiled) -> int:
    """Main memory that one device needs besides arguments and results, in bytes.

    On TPU what the compiler calls temporary holds vector memory and results too, so there it is
    the peak of main memory less the arguments: results that exist at the peak are counted.
    """
    analysis = _given(compiled.memory_analysis(), "memory analysis")
    lies = jax.tree.leaves((compiled.input_shardings, compiled.output_shardings))
    if any(device.platform == "tpu" for sharding in lies[:1] for device in sharding.device_set):
        return analysis.peak_memory_in_bytes - analysis.argument_size_in_bytes
    return analysis.temp_size_in_bytes


def _given(fact: Any, what: str) -> Any:
    """What the backend tells of a compiled program; a backend may tell nothing."""
    if fact is None:
        raise ValueError(f"the backend of this compiled program gives no {what}.")
    return fact
