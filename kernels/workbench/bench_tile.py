"""Times one tile on this device over block sizes: one JSON line a run, not shipped.

python kernels/workbench/bench_tile.py --tokens 512 --heads 8 --head-dim 64
"""

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

import burst_kernels


def seconds(call: Callable[[], object], rounds: int) -> float:
    """Median of several runs, compiled before."""
    jax.block_until_ready(call())
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--backend", default="xla", choices=list(burst_kernels.BACKENDS))
    parser.add_argument("--blocks", type=int, nargs="+", default=[128, 256, 512])
    parser.add_argument("--rounds", type=int, default=20)
    args = parser.parse_args()

    rng = np.random.default_rng(0)
    shape = (1, args.heads, args.tokens, args.head_dim)
    q, k, v, do = (jnp.asarray(rng.standard_normal(shape), args.dtype) for _ in range(4))
    tile = burst_kernels.Tile(scale=args.head_dim**-0.5)
    backend = burst_kernels.BACKENDS[args.backend]
    pair_flop = 4.0 * args.head_dim * args.heads * args.tokens**2
    for block_q, block_kv in itertools.product(args.blocks, repeat=2):
        config = burst_kernels.TileConfig(block_q=block_q, block_kv=block_kv)
        forward = jax.jit(lambda q, k, v, c=config: backend.forward(q, k, v, tile, c))
        backward = jax.jit(lambda *arrays, c=config: backend.backward(*arrays, tile, c))
        out, lse = forward(q, k, v)
        delta = (do.astype(out.dtype) * out).sum(-1)
        forward_s = seconds(lambda f=forward: f(q, k, v), args.rounds)
        backward_s = seconds(
            lambda f=backward, kept=(lse, delta): f(q, k, v, do, *kept), args.rounds
        )
        row = vars(args) | {
            "block_q": block_q,
            "block_kv": block_kv,
            "forward_flop_per_s": round(pair_flop / forward_s),
            "backward_flop_per_s": round(2.5 * pair_flop / backward_s),
            "device": jax.devices()[0].device_kind,
            "jax": jax.__version__,
            "date": time.strftime("%Y-%m-%d"),
        }
        print(json.dumps(row))


if __name__ == "__main__":
    main()
