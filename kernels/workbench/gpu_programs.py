"""The programs that `gpu_report` compiles for an H100: our tiles, and jax's own attention.

Nothing is run and no GPU is needed: the compiler writes the PTX of each kernel, `ptxas` and
`nvdisasm` turn it into the machine code that is counted. (tokamax 0.0.17 refuses to be compiled
where there is no GPU.)
"""

import dataclasses
import functools
import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from burst_jax import aot
from burst_kernels import Tile, TileConfig, mosaic_gpu
from workbench import gpu_sass

OURS, JAX = "ours", "jax"
IMPLEMENTATIONS = (JAX, OURS)
PASSES = ("forward", "backward")
MASKS = ("full", "causal")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """One pass over one tile.

    Attributes:
        implementation: one of `IMPLEMENTATIONS`.
        direction: one of `PASSES`.
        head_dim: of queries, keys and values.
        mask: "full" (no positions at all) or "causal".
        tokens, heads: t = s, N = K.
        dtype: of q, k, v; jax's attention takes float16 alone.
        config: block sizes of ours.
    """

    implementation: str = OURS
    direction: str = "forward"
    head_dim: int = 128
    mask: str = "full"
    tokens: int = 8192
    heads: int = 8
    dtype: str = "bfloat16"
    config: TileConfig = TileConfig(chip="sm_90")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kernel:
    """What the compiler made of one kernel.

    Attributes:
        name: the compiler's name of it.
        registers: a thread, as launched.
        spill_bytes: stored to local memory, in loops and around them.
        shared_bytes: of a CTA; None: not found.
        grid: CTAs along x, y and z, of which x is the fastest; None: not found.
        serialized: whether ptxas says that it waits for each product.
        hazards: registers touched while products that use them are under way.
        loops: around products.
    """

    name: str
    registers: int
    spill_bytes: int
    shared_bytes: int | None
    grid: tuple[int, ...] | None
    serialized: bool
    hazards: int
    loops: list[gpu_sass.Loop]


def tool(name: str) -> str | None:
    """The path of `ptxas` or `nvdisasm`: on the PATH, or in a wheel of NVIDIA's."""
    if (found := shutil.which(name)) is not None:
        return found
    spec = importlib.util.find_spec("nvidia")
    places = spec.submodule_search_locations if spec else None
    wheels = (x for place in places or () for x in Path(place).glob(f"*/bin/{name}"))
    return next(map(str, wheels), None)


def missing() -> str | None:
    """Why programs cannot be compiled here, or None."""
    for name, wheel in (("ptxas", "nvidia-cuda-nvcc"), ("nvdisasm", "nvidia-cuda-nvdisasm")):
        if tool(name) is None:
            return f"{name} is not on the PATH: pip install {wheel}"
    return None


def compile_program(program: Program) -> list[Kernel]:
    """Compiles for an H100 that need not be here.

    Raises:
        RuntimeError: something refuses, with its own words.
    """
    if (reason := missing()) is not None:
        raise RuntimeError(reason)
    with tempfile.TemporaryDirectory() as folder:
        before = dict(os.environ)
        os.environ |= {"MOSAIC_GPU_DUMP_TO": folder, "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"}
        try:
            call, shapes = _call(program)
            here = NamedSharding(aot.mesh_for("h100:1"), PartitionSpec())
            arguments = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here) for x in shapes]
            jax.jit(call).lower(*arguments).compile()
        except Exception as error:  # of any library; what it says is the result
            raise RuntimeError(f"{type(error).__name__}: {error}"[:400]) from error
        finally:
            os.environ.clear()
            os.environ.update(before)
        found = list(_kernels(Path(folder)))
    if not found:
        raise RuntimeError("no kernel with a matrix product in it was compiled")
    return found


def _kernels(folder: Path) -> Iterator[Kernel]:
    for ptx in sorted(folder.glob("*.ptx")):
        cubin = ptx.with_suffix(".mine")
        command = [tool("ptxas") or "ptxas", "-arch=sm_90a", "-O3", "-v", str(ptx), "-o", cubin]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        command = [tool("nvdisasm") or "nvdisasm", "-c", cubin]
        sass = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        code = gpu_sass.parse(sass)
        if loops := gpu_sass.loops(code):
            launch = _launch(ptx.with_suffix(".mlir-passes.log"))
            yield Kernel(
                name=re.sub(r"_\d+$", "", ptx.stem),
                registers=_number(r"Used (\d+) registers", said) or 0,
                spill_bytes=_number(r"(\d+) bytes spill stores\n?", said) or 0,
                shared_bytes=launch[-1] if launch else None,
                grid=launch[:-1] if launch else None,
                serialized="Potential Performance Loss" in said,
                hazards=len(gpu_sass.hazards(code)),
                loops=loops,
            )


def _number(pattern: str, text: str) -> int | None:
    found = re.findall(pattern, text)
    return int(found[-1]) if found else None


def _launch(log: Path) -> tuple[int, ...] | None:
    """Grid and shared memory of a kernel, from the compiler's log of its passes."""
    if not log.exists():
        return None
    size = r"%\w+ = %c(\d+)\w*"
    pattern = re.compile(
        rf"gpu\.launch.*? blocks\(.*?\) in \({size}, {size}, {size}\).* "
        r"dynamic_shared_memory_size %c(\d+)_i32"
    )
    with log.open() as lines:
        found = next((m for line in lines if (m := pattern.search(line))), None)
    return tuple(map(int, found.groups())) if found else None


def _call(program: Program) -> tuple[Callable[..., Any], list[jax.ShapeDtypeStruct]]:
    """A function, and the shapes that it takes."""
    return (_ours if program.implementation == OURS else _jax)(program)


def _shaped(*shape: int, dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def _ours(p: Program) -> tuple[Callable[..., Any], list[jax.ShapeDtypeStruct]]:
    x = _shaped(1, p.heads, p.tokens, p.head_dim, dtype=p.dtype)
    rows = _shaped(1, p.heads, p.tokens, dtype=jnp.float32)
    at = _shaped(1, p.tokens, dtype=jnp.int32)

    def tile(at: jax.Array) -> Tile:
        full = Tile(scale=p.head_dim**-0.5)
        if p.mask == "full":
            return full
        return dataclasses.replace(full, right=0, q_positions=at, kv_positions=at)

    def forward(q: Any, k: Any, v: Any, at: Any) -> Any:
        return mosaic_gpu.tile_forward(q, k, v, tile(at), p.config)

    def backward(q: Any, k: Any, v: Any, do: Any, lse: Any, delta: Any, at: Any) -> Any:
        return mosaic_gpu.tile_backward(q, k, v, do, lse, delta, tile(at), p.config)

    if p.direction == "forward":
        return forward, [x, x, x, at]
    return backward, [x, x, x, x, rows, rows, at]


def _jax(p: Program) -> tuple[Callable[..., Any], list[jax.ShapeDtypeStruct]]:
    from jax.experimental.pallas.ops.gpu import attention_mgpu as attention

    if p.direction == "backward" and p.mask == "causal":
        raise NotImplementedError("jax's backward takes no mask")
    config = attention.TuningConfig(
        block_q=64, block_kv=128 if p.head_dim <= 128 else 64, max_concurrent_steps=2,
        causal=p.mask == "causal", compute_wgs_bwd=2,
        block_q_dkv=64, block_kv_dkv=64, block_q_dq=64, block_kv_dq=64,
    )  # fmt: skip
    x = _shaped(1, p.tokens, p.heads, p.head_dim, dtype=jnp.float16)
    attend = functools.partial(attention.attention, config=config)
    if p.direction == "forward":
        return functools.partial(attend, save_residuals=True), [x, x, x]
    return lambda q, k, v, do: jax.vjp(attend, q, k, v)[1](do), [x, x, x, x]
