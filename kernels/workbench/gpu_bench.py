"""Times our tile on this GPU beside cuDNN, tokamax and a matrix product. Not shipped.

    python kernels/workbench/gpu_bench.py                    # everything, about half an hour
    python kernels/workbench/gpu_bench.py --tokens 16384 --head-dims 128 --what attention
    python kernels/workbench/gpu_bench.py --what hop         # tiles of a zigzag ring's hop
    python kernels/workbench/gpu_bench.py --implementation triton
    python kernels/workbench/gpu_bench.py --tune --write     # block sizes, and the table of winners

One JSON line a run, printed and appended to kernels/workbench/results/. Times are the GPU's own, by
CUPTI: the sum over all kernels that one call launches, the preparation of masks included. FLOP
count pairs of tokens that see each other (causal once): 2 (H + Hv) a pair forward, 2 (3 H + 2 Hv)
backward. Data are normally distributed: zeros would let the chip run faster than it does.

    attention  one device's whole attention: burst (our tile), cudnn (jax.nn), tokamax (forward)
    hop        a tile of a causal zigzag ring after the first hop, against queries of device
               `ring // 2`: keys of the device before it, and of the one after it. `share_of_ideal`
               is its rate over the best one seen in this run for the same pass and heads on plain
               full attention of as many tokens: what a ring reaches that loses nothing
    matmul     a bfloat16 matrix product of 8192: what `share_of_matmul` refers to
"""

import argparse
import functools
import importlib.metadata
import importlib.util
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import burst_kernels

RESULTS = Path(__file__).parent / "results"
PASSES = ("forward", "backward")
WHAT = ("matmul", "attention", "hop")
# Our tiles for GPUs, in order of preference.
IMPLEMENTATIONS = ("mosaic_gpu", "triton", "xla")
_MATMUL = 8192


Tiles = tuple[Callable[..., Any], Callable[..., Any]]


class Run(NamedTuple):
    """One measurement to make.

    Attributes:
        what: one of `WHAT`.
        backend: "burst", "cudnn", "tokamax", "jax".
        direction: one of `PASSES`; "" for a matrix product.
        mask: "full" or "causal"; for a hop whether keys are "earlier" or "later" than the queries.
        B, T, N, K, H: sizes.
    """

    what: str
    backend: str
    direction: str = ""
    mask: str = "full"
    B: int = 1
    T: int = _MATMUL
    N: int = 1
    K: int = 1
    H: int = 128


class Call(NamedTuple):
    """What is timed: a jitted function, and its operands.

    Apart, since operands bound to the function would be constants of the program: then the compiler
    sorts the mask's lists, and no GPU does.
    """

    function: Any
    operands: tuple

    def __call__(self) -> Any:
        """What it computes."""
        return self.function(*self.operands)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    sizes = functools.partial(parser.add_argument, type=int, nargs="+")
    sizes("--tokens", default=[4096, 8192, 16384, 32768, 65536])
    sizes("--hop-tokens", default=[8192, 16384, 32768, 65536])
    sizes("--head-dims", default=[64, 128])
    sizes("--groups", default=[1, 4], help="query heads to a kv head; 1 is MHA")
    parser.add_argument("--width", type=int, default=2048, help="N H: query heads times head dim")
    parser.add_argument("--ring", type=int, default=8, help="devices of the ring of a hop")
    parser.add_argument(
        "--masks", nargs="+", default=["causal", "full"], choices=["causal", "full"]
    )
    parser.add_argument("--what", nargs="+", default=list(WHAT), choices=WHAT)
    parser.add_argument("--passes", nargs="+", default=list(PASSES), choices=PASSES)
    parser.add_argument(
        "--backends", nargs="+", default=["burst", "cudnn", "tokamax"],
        choices=["burst", "cudnn", "tokamax"],
    )  # fmt: skip
    parser.add_argument(
        "--implementation", default=None, choices=IMPLEMENTATIONS,
        help="our tile; by default the first that this GPU can run",
    )  # fmt: skip
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--tune", action="store_true", help="time all block sizes that fit instead")
    parser.add_argument("--write", action="store_true", help="with --tune: rewrite _winners.py")
    args = parser.parse_args(arguments)
    if args.write and args.dtype != "bfloat16":
        parser.error(f"--write fills a table of bfloat16 sizes, and --dtype is {args.dtype}.")
    for name in ("tokens", "hop_tokens", "head_dims", "groups", "width", "ring", "rounds"):
        value = getattr(args, name)
        if min(value if isinstance(value, list) else [value]) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {value}.")
    for head_dim in args.head_dims:
        if args.width % (head_dim * max(args.groups)):
            parser.error(
                f"--width {args.width} is no whole number of heads of {head_dim} in groups of "
                f"{max(args.groups)}."
            )
    return args


def runs(args: argparse.Namespace) -> Iterator[Run]:
    """What to measure, in an order in which an ideal is there before what is compared with it."""
    if "matmul" in args.what:
        yield Run("matmul", "jax")
    for H in args.head_dims:
        for group in args.groups:
            heads = {"N": args.width // H, "K": args.width // H // group, "H": H}
            for direction in args.passes:
                if "attention" in args.what:
                    yield from _attention(args, direction, heads)
                if "hop" in args.what:
                    for T in args.hop_tokens:
                        for mask in ("earlier", "later"):
                            yield Run("hop", "burst", direction, mask, T=T, **heads)


def _attention(args: argparse.Namespace, direction: str, heads: dict[str, int]) -> Iterator[Run]:
    for T in args.tokens:
        for mask in args.masks:
            for backend in args.backends:
                # tokamax's Mosaic kernel has no backward of its own.
                if backend != "tokamax" or direction == "forward":
                    B = max(1, 16384 // T)
                    yield Run("attention", backend, direction, mask, B=B, T=T, **heads)


def positions(run: Run, ring: int) -> tuple[np.ndarray, np.ndarray] | None:
    """Of queries and keys; None where nothing is masked."""
    if run.mask == "full":
        return None
    tokens = np.arange(run.T, dtype=np.int32)
    if run.mask == "causal":
        return tokens, tokens

    def zigzag(r: int) -> np.ndarray:
        half = run.T // 2
        late = (2 * ring - 1 - r) * half + np.arange(run.T - half, dtype=np.int32)
        return np.concatenate((r * half + tokens[:half], late))

    mine = ring // 2
    return zigzag(mine), zigzag((mine + (1 if run.mask == "later" else -1)) % ring)


def pairs(run: Run, ring: int) -> int:
    """Pairs of tokens that see each other, in one head of one sequence."""
    if (both := positions(run, ring)) is None:
        return run.T**2
    q, kv = both
    return int(np.searchsorted(np.sort(kv), q, side="right").sum())


def flop(run: Run, ring: int) -> int:
    """Of one call: products a textbook asks for, recomputed scores of the backward included."""
    if run.what == "matmul":
        return 2 * run.T**3
    products = {"forward": 2, "backward": 5}[run.direction]
    return 2 * products * run.H * run.B * run.N * pairs(run, ring)


def missing(backend: str, dtype: str = "bfloat16") -> str | None:
    """Why a backend cannot be measured here, or None."""
    if dtype == "float32" and backend in ("cudnn", "tokamax"):
        return f"{backend} takes bfloat16 and float16"
    if backend == "tokamax" and importlib.util.find_spec("tokamax") is None:
        return "tokamax is not installed"
    return None


def implementation(wanted: str | None, dtype: str = "bfloat16") -> str:
    """Our tile to measure: the one that is wanted, or the first that takes the dtype here.

    Raises:
        SystemExit: this machine cannot run it, with the reason.
    """
    chip = burst_kernels.chip_at_hand()
    reasons = burst_kernels.unavailable_reasons(chip)
    if chip.platform != "gpu":
        raise SystemExit(
            f"There is nothing to time on {chip.name!r}: {reasons['mosaic_gpu']} Run this on a "
            "machine with an NVIDIA GPU and jax[cuda13]; the Hopper tiles want an H100, H200 or "
            "H20."
        )

    def why_not(name: str) -> str | None:
        kind = burst_kernels.Problem(
            B=1, t=128, s=128, N=1, K=1, H=64, Hv=64, dtype=jnp.dtype(dtype)
        )
        return reasons[name] or burst_kernels.BACKENDS[name].load().refuses(kind, chip.name)

    name = wanted or next(name for name in IMPLEMENTATIONS if why_not(name) is None)
    if (reason := why_not(name)) is not None:
        raise SystemExit(f"--implementation {name}: {reason}")
    return name


def prepared(
    run: Run, ring: int, dtype: str, ours: str, config: burst_kernels.TileConfig | None = None
) -> Call:
    """The call to time; `ours` and `config` are of our tile."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> jax.Array:
        # In float32 and on the host: 64K tokens of 16 heads are half a gigabyte.
        return jnp.asarray(rng.standard_normal(shape, np.float32), dtype)

    if run.what == "matmul":
        a, b = normal(run.T, run.T), normal(run.T, run.T)
        return Call(jax.jit(jnp.matmul), (a, b))
    q, do = (normal(run.B, run.N, run.T, run.H) for _ in range(2))
    k, v = (normal(run.B, run.K, run.T, run.H) for _ in range(2))
    if run.backend == "burst":
        return _burst(run, ring, _tile(ours, config), q, k, v, do)
    return _peer(run, *(x.swapaxes(1, 2) for x in (q, k, v, do)))


def _tile(ours: str, config: burst_kernels.TileConfig | None) -> Tiles:
    """Forward and backward of our tile."""
    backend = burst_kernels.BACKENDS[ours]
    forward, backward = (
        jax.jit(functools.partial(f, config=config)) for f in (backend.forward, backend.backward)
    )
    return forward, backward


def _burst(
    run: Run, ring: int, ours: Tiles, q: jax.Array, k: jax.Array, v: jax.Array, do: jax.Array
) -> Call:
    both = positions(run, ring)
    at = [None, None] if both is None else [jnp.asarray(x)[None] for x in both]
    tile = burst_kernels.Tile(
        scale=run.H**-0.5, right=None if both is None else 0, q_positions=at[0], kv_positions=at[1]
    )
    forward, backward = ours
    if run.direction == "forward":
        return Call(forward, (q, k, v, tile))
    out, lse = forward(q, k, v, tile)
    delta = (out * do.astype(out.dtype)).sum(-1)
    return Call(backward, (q, k, v, do, lse, delta, tile))


def _peer(run: Run, q: jax.Array, k: jax.Array, v: jax.Array, do: jax.Array) -> Call:
    causal = run.mask == "causal"
    if run.backend == "tokamax":
        import tokamax  # pyright: ignore[reportMissingImports]

        attend = functools.partial(
            tokamax.dot_product_attention, is_causal=causal, implementation="mosaic"
        )
    else:
        attend = functools.partial(
            jax.nn.dot_product_attention, is_causal=causal, implementation="cudnn"
        )
    if run.direction == "forward":
        return Call(jax.jit(attend), (q, k, v))
    # The pullback alone: what the forward has saved are its operands.
    _, pullback = jax.jit(lambda *x: jax.vjp(attend, *x))(q, k, v)
    return Call(jax.jit(lambda pullback, do: pullback(do)), (pullback, do))


def seconds(call: Call, rounds: int) -> list[float]:
    """GPU time of each round."""
    # CUPTI loads with the import, where there is no GPU it need not be there.
    from jax.experimental.mosaic.gpu import profiler

    jax.block_until_ready(call())
    times = []
    for _ in range(rounds):
        _, milliseconds = profiler.measure(call.function)(*call.operands)
        assert milliseconds is not None, "a call that runs no kernel on the GPU"
        times.append(milliseconds / 1e3)
    return times


def row(run: Run, times: list[float], best: dict[Any, float], args: argparse.Namespace) -> dict:
    """The JSON of one run; `best` is what was seen before, and is brought up to date."""
    median = statistics.median(times)
    rate = flop(run, args.ring) / median
    found = run._asdict() | {
        "dtype": args.dtype,
        "flop": flop(run, args.ring),
        "median_s": median,
        "least_s": min(times),
        "greatest_s": max(times),
        "rounds": len(times),
        "tflop_per_s": round(rate / 1e12, 1),
    }
    key = (run.direction, run.T, run.N, run.K, run.H)
    if run.what == "matmul":
        best["matmul"] = rate
    elif "matmul" in best:
        found["share_of_matmul"] = round(rate / best["matmul"], 3)
    if run.what == "attention" and run.mask == "full":
        best[key] = max(rate, best.get(key, 0.0))
    if run.what == "hop":
        found["ring"] = args.ring
        found["share_of_ideal"] = round(rate / best[key], 3) if key in best else None
    return found


def tune(args: argparse.Namespace, say: Callable[[str], None], where: str) -> None:
    """Times block sizes at 16384 tokens; prints the winners, and writes them down if asked to."""
    from workbench import gpu_tune

    def rate(direction: str, H: int, mask: str, config: burst_kernels.TileConfig) -> float:
        heads = args.width // H
        run = Run("attention", "burst", direction, mask, T=16384, N=heads, K=heads, H=H)
        median = statistics.median(
            seconds(prepared(run, args.ring, args.dtype, "mosaic_gpu", config), args.rounds)
        )
        return flop(run, args.ring) / median / 1e12

    winners = gpu_tune.tune(args.passes, args.head_dims, rate, say)
    for winner in winners:
        print(gpu_tune.row(winner, where))
    if args.write:
        table = gpu_tune.TABLE
        table.write_text(gpu_tune.updated(table.read_text(), winners, where))
        print(f"written: {table}")


def main() -> None:
    args = parse()
    ours = implementation(args.implementation, args.dtype)
    if args.tune and ours != "mosaic_gpu":
        raise SystemExit(f"--tune is for the mosaic_gpu tiles, and {ours} would be measured here.")
    device = jax.devices()[0].device_kind
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib")}
    common = {
        "implementation": ours,
        "device": device,
        "date": time.strftime("%Y-%m-%d"),
        **versions,
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"gpu_bench-{device.replace(' ', '_')}-{common['date']}.jsonl"

    def say(text: str) -> None:
        text = json.dumps(json.loads(text) | common)
        print(text, flush=True)
        with path.open("a") as file:
            file.write(text + "\n")

    if args.tune:
        return tune(args, say, f"{device}, jax {common['jax']}, {common['date']}")
    best: dict[Any, float] = {}
    failed = 0  # of our own runs
    for run in runs(args):
        if (reason := missing(run.backend, args.dtype)) is not None:
            line = run._asdict() | {"skipped": reason}
        else:
            try:
                call = prepared(run, args.ring, args.dtype, ours)
                line = row(run, seconds(call, args.rounds), best, args)
            except Exception as error:  # a peer that cannot do it must not end the others' runs
                line = run._asdict() | {"failed": f"{type(error).__name__}: {error}"[:500]}
                failed += run.backend == "burst"
        say(json.dumps(line))
    if failed:
        raise SystemExit(f"{failed} runs of our tiles failed; their lines say why.")


if __name__ == "__main__":
    main()
