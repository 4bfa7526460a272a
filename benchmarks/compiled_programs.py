"""Whole programs compiled for chips that are not here: transfers hidden, memory, code.

    make setup-aot; .venv-aot/bin/python benchmarks/compiled_programs.py [v5e:2x4:128 ...]

A program is a target and its thousands of tokens: forward and backward of causal zigzag attention,
8 heads, H = 128, bfloat16, queries travelling back. A transfer in a rolled loop counts once. Needs
the compilers of the `aot` and `aot-gpu` extras; nothing runs.
"""

import os
import sys
import time

# Before jax is imported: libtpu would ask a cloud for a TPU, and jax look for CUDA's libraries.
os.environ |= dict(
    JAX_PLATFORMS="cpu",
    TPU_SKIP_MDS_QUERY="1",
    TPU_WORKER_HOSTNAMES="localhost",
    ALLOW_MULTIPLE_LIBTPU_LOAD="1",
    JAX_SKIP_CUDA_CONSTRAINTS_CHECK="1",
)

import jax
import jax.numpy as jnp

import burst_jax as bj
from burst_jax import aot

MIB = 2**20
PROGRAMS = (
    "v4:2x2x2:128", "v5e:2x4:128", "v5p:2x2x2:128", "v6e:2x4:128", "tpu7x:2x2x1:128",
    "v5p:4x4x4:1024", "v6e:8x8:1024", "v5e:8x8:1024", "h100:8:128", "h100:32:1024",
    "a100:8:128",
)  # fmt: skip


def compiled(target: str, tokens: int) -> jax.stages.Compiled:
    """Forward and backward for one target."""
    where = bj.SequenceSharding(aot.mesh_for(target), layout="zigzag", length=tokens)
    lies = jax.NamedSharding(where.mesh, where.spec(4))
    x = jax.ShapeDtypeStruct((1, tokens, 8, 128), jnp.bfloat16, sharding=lies)

    def gradients(q, k, v, do):
        def attention(q, k, v):
            return bj.burst_attention(
                q, k, v, sharding=where, mask=bj.Mask.causal(), plan=bj.Plan(backward="q")
            )

        return jax.vjp(attention, q, k, v)[1](do)

    # XLA hides transfers by itself on TPUs and from Hopper on; before, it has to be told.
    older = {"xla_gpu_enable_latency_hiding_scheduler": True} if "a100" in target else None
    return aot.compile_for(target, jax.jit(gradients, compiler_options=older), x, x, x, x)


def main() -> None:
    print(f"jax {jax.__version__}")
    print("| | transfers hidden / exposed | main memory besides arguments | code | compiled in |")
    print("|---|---|---|---|---|")
    for program in sys.argv[1:] or PROGRAMS:
        target, _, thousands = program.rpartition(":")
        start = time.perf_counter()
        found = compiled(target, int(thousands) * 1024)
        time_s = time.perf_counter() - start
        overlap = bj.inspect.overlap(found)
        code = found.memory_analysis().generated_code_size_in_bytes
        print(
            f"| {target}, {thousands}K tokens | {overlap.hidden} / {overlap.exposed} "
            f"| {bj.inspect.temporary_bytes(found) / MIB:.0f} MiB "
            f"| {f'{code / MIB:.1f} MiB' if code else '-'} | {time_s:.0f} s |",
            flush=True,
        )


if __name__ == "__main__":
    main()
