"""Facts read off programs, nothing timed but the compiler: bytes sent, growth with R, memory.

python benchmarks/program_facts.py
"""

import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
from cpu_attention import load_ringattention, peer, with_gradient

import burst_jax as bj

GIB, MIB = 2**30, 2**20
DEVICES = 64


def program(
    R: int, T: int, N: int, K: int, plan: bj.Plan | None = None
) -> tuple[Callable, list[jax.ShapeDtypeStruct]]:
    """Forward and backward of causal zigzag attention, H = 128, bfloat16, on R devices."""
    mesh = jax.make_mesh((R,), ("sp",), devices=jax.devices()[:R])
    where = bj.SequenceSharding(mesh, layout="zigzag", length=T)
    lies = jax.NamedSharding(mesh, where.spec(4))
    arrays = [
        jax.ShapeDtypeStruct((1, T, heads, 128), jnp.bfloat16, sharding=lies)
        for heads in (N, K, K, N)
    ]

    def attention(q, k, v):
        return bj.burst_attention(q, k, v, sharding=where, mask=bj.Mask.causal(), plan=plan)

    return with_gradient(attention), arrays


def bytes_sent() -> None:
    """The table of bytes: 128K tokens, 8 devices."""
    print("GiB that one device sends, forward and backward, 128K tokens, 8 devices, H = 128, bf16")
    print(f"{'':44s}{'MHA 32:32':>10s}{'GQA 32:8':>10s}")
    plans = {
        "burst_jax (gradients travel in float32)": None,
        "burst_jax, keys travel back": bj.Plan(backward="kv"),
        "burst_jax, queries travel back": bj.Plan(backward="q"),
        "burst_jax, gradients travel in bfloat16": bj.Plan(gradient_dtype=jnp.bfloat16),
    }
    for name, plan in plans.items():
        sent = [
            bj.inspect.collective_bytes(fn, *arrays)["total"] / GIB
            for fn, arrays in (program(8, 2**17, 32, K, plan) for K in (32, 8))
        ]
        print(f"{name:44s}{sent[0]:10.3f}{sent[1]:10.3f}")
    if (module := load_ringattention()) is not None:
        fn, arrays = program(8, 2**17, 32, 32)
        mesh = arrays[0].sharding.mesh
        sent = bj.inspect.collective_bytes(with_gradient(peer(module, mesh, 512)), *arrays)
        print(f"{'ringattention 0.1.2':44s}{sent['total'] / GIB:10.3f}{'no GQA':>10s}")


def growth() -> None:
    """Compile time and program size against R, 512 tokens a device."""
    print("\nGrowth with R: 512 tokens a device, 8 heads")
    first: tuple[float, int] | None = None
    for R in (8, DEVICES):
        fn, arrays = program(R, 512 * R, 8, 8)
        size = sum(1 for _ in bj.inspect.equations(jax.make_jaxpr(fn)(*arrays).jaxpr))
        times = []
        for _ in range(3):
            jax.clear_caches()
            start = time.perf_counter()
            jax.jit(fn).lower(*arrays).compile()
            times.append(time.perf_counter() - start)
        median = sorted(times)[1]
        first = first or (median, size)
        print(
            f"R = {R:2d}: {size} equations ({size / first[1]:.2f}x), "
            f"traced and compiled in {median:.1f} s ({median / first[0]:.2f}x)"
        )


def memory() -> None:
    """Temporary memory of forward and backward, compiled for CPU."""
    print("\nTemporary memory of one of 8 devices, forward and backward, 8 heads, H = 128, bf16")
    for T in (2**16, 2**17):
        for side in ("q", "kv"):
            fn, arrays = program(8, T, 8, 8, bj.Plan(backward=side))
            held = bj.inspect.temporary_bytes(jax.jit(fn).lower(*arrays).compile())
            print(f"T = {T // 1024}K, {side:2s} travels back: {held / MIB:.0f} MiB")


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", DEVICES)
    bytes_sent()
    growth()
    memory()
