"""Speed on CPU, one run, interleaved: burst_jax, ringattention 0.1.2's JAX path, and jax.nn.

    python benchmarks/cpu_attention.py

T = 4096, 8 heads, H = 64, float32, causal, 8 simulated devices. FLOP are those that the mask needs
(4 H a visible pair forward, 14 H forward and backward); the limit is this machine's own float32
matrix-product rate, measured in the same rounds.
"""

import argparse
import importlib.util
import sys
import types
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from _timing import interleaved, machine, matrix_product, print_json

import burst_jax as bj

PEER_CHUNKS = (256, 512)  # of its own parameters, those that suit 512 tokens a device


def load_ringattention() -> types.ModuleType | None:
    """The peer's JAX path, loaded from its file: the package no longer imports on current JAX."""
    spec = importlib.util.find_spec("ringattention")
    if spec is None or not spec.submodule_search_locations:
        return None
    path = Path(spec.submodule_search_locations[0]) / "ringattention_jax.py"
    loader = importlib.util.spec_from_file_location("ringattention_jax", path)
    assert loader is not None and loader.loader is not None
    module = importlib.util.module_from_spec(loader)
    sys.modules[loader.name] = module
    loader.loader.exec_module(module)
    return module


def peer(module: types.ModuleType, mesh: jax.sharding.Mesh, chunk: int) -> Callable:
    """ringattention on the same mesh, contiguous as it must be."""
    kwargs = dict(
        causal_block_size=1, query_chunk_size=chunk, key_chunk_size=chunk, deterministic=True,
        dropout_rng=None, attn_pdrop=0.0, dtype=jnp.float32, precision=None, prevent_cse=False,
        policy=jax.checkpoint_policies.nothing_saveable,
    )  # fmt: skip
    spec = jax.P(None, "sp")
    return jax.shard_map(
        lambda q, k, v: module.ring_attention(q, k, v, None, None, None, "sp", True, kwargs),
        mesh=mesh,
        in_specs=(spec, spec, spec),
        out_specs=spec,
        check_vma=False,  # the peer starts its loop from zeros, which vary over no axis
    )


def with_gradient(attention: Callable) -> Callable:
    """dq, dk, dv for a given cotangent."""
    return lambda q, k, v, do: jax.vjp(attention, q, k, v)[1](do)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", args.devices)
    T, N, H = args.length, args.heads, args.head_dim

    mesh = jax.make_mesh((args.devices,), ("sp",))
    rng = np.random.default_rng(0)
    natural = [rng.standard_normal((1, T, N, H), np.float32) for _ in range(4)]
    calls: dict[str, Callable[[], object]] = {}
    product, product_flop = matrix_product()
    calls["matrix product"] = product

    def add(name: str, attention: Callable, arrays: list) -> None:
        forward, gradient = jax.jit(attention), jax.jit(with_gradient(attention))
        calls[f"{name}, forward"] = lambda: forward(*arrays[:3])
        calls[f"{name}, gradient"] = lambda: gradient(*arrays)

    zigzag = bj.SequenceSharding(mesh, "sp", "zigzag")
    for side in ("q", "kv"):
        add(
            f"burst_jax, {side} travels back",
            lambda q, k, v, plan=bj.Plan(backward=side): bj.burst_attention(
                q, k, v, sharding=zigzag, mask=bj.Mask.causal(), plan=plan
            ),
            [zigzag.place(x) for x in natural],
        )
    contiguous = bj.SequenceSharding(mesh, "sp")
    module = load_ringattention()
    if module is None:
        print("ringattention is not installed: pip install 'burst-jax[bench]'")
    else:
        for chunk in PEER_CHUNKS:
            placed = [contiguous.place(x) for x in natural]
            add(f"ringattention, chunks of {chunk}", peer(module, mesh, chunk), placed)
    dense = [jnp.asarray(x) for x in natural]
    add(
        "jax.nn, one device, dense",
        lambda q, k, v: jax.nn.dot_product_attention(q, k, v, is_causal=True),
        dense,
    )
    times = interleaved(calls, args.rounds)

    rate = product_flop / times["matrix product"].median_s
    pair_flop = 4.0 * H * N * T * (T + 1) / 2
    print(f"machine: {machine()}")
    print(f"float32 matrix product: {rate / 1e9:.0f} GFLOP/s\n")
    best = {
        what: min(
            (t.median_s for name, t in times.items() if name.startswith("ringattention, ")
             and name.endswith(what)),
            default=None,
        )
        for what in ("forward", "gradient")
    }  # fmt: skip
    for name, timing in times.items():
        if name == "matrix product":
            continue
        what = name.split(", ")[-1]
        flop = pair_flop * (1.0 if what == "forward" else 3.5)
        against = best[what]
        faster = f"{against / timing.median_s:5.2f}x" if against else "    -"
        share = flop / timing.median_s / rate
        print(f"{name:42s} {timing!s:32s} {share:4.0%} of the limit, {faster} ringattention's best")
        print_json({"system": name, **timing._asdict(), "share_of_limit": round(share, 3)})


if __name__ == "__main__":
    main()
