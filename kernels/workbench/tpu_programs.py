"""The programs that the TPU workbench compiles and runs: our tiles, and JAX's splash attention.

Compiled for a chip that is not here, in a process of its own, because the compiler takes the
options that make it write its schedule only when it is loaded.
"""

import dataclasses
import functools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from burst_kernels import Tile, TileConfig, mosaic_tpu
from workbench import tpu_schedule

# The smallest slice of each chip that can be compiled for: a tile knows one device.
SLICES = {
    "v4": "v4:2x2x1",
    "v5e": "v5e:2x2",
    "v5p": "v5p:2x2x1",
    "v6e": "v6e:2x2",
    "tpu7x": "tpu7x:2x2x1",
}
OURS, SPLASH = "ours", "splash"
PASSES = ("forward", "backward")
MASKS = ("full", "causal")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """One pass over one tile, of ours or of splash attention.

    Attributes:
        implementation: "ours" or "splash".
        direction: "forward" or "backward" (splash: fused; its forward is compiled along).
        chip: "v4", "v5e", "v5p", "v6e" or "tpu7x".
        tokens: queries and keys, t = s.
        heads, kv_heads: N and K; splash takes K = N only.
        head_dim: H, of keys and values.
        dtype: of q, k, v and do.
        block_q, block_kv: tokens in a block; None: our choice.
        compute: keys whose scores are held at once; None: our choice, 512 for splash.
        compute_q: queries, the same, of our forward.
        mask: "full" (no positions at all) or "causal".
    """

    implementation: str = OURS
    direction: str = "forward"
    chip: str = "v5e"
    tokens: int = 8192
    heads: int = 8
    kv_heads: int = 8
    head_dim: int = 128
    dtype: str = "bfloat16"
    block_q: int | None = 1024
    block_kv: int | None = 1024
    compute: int | None = None
    compute_q: int | None = None
    mask: str = "full"

    def shapes(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """q, k, v and, for a backward, do, heads before tokens."""

        def shaped(heads: int) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((1, heads, self.tokens, self.head_dim), self.dtype)

        q, k = shaped(self.heads), shaped(self.kv_heads)
        return (q, k, k, q) if self.direction == "backward" else (q, k, k)


def function(program: Program, interpret: bool = False) -> Callable[..., Any]:
    """What `program.shapes()` are given to: (out, lse), or (dq, dk, dv).

    A backward of ours takes lse and delta in place of computing them, after the four arrays.
    """
    if program.implementation == SPLASH:
        return _splash(program, interpret)
    return _ours(program, interpret)


def arguments(program: Program) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Shapes of all that `function(program)` takes."""
    rows = jax.ShapeDtypeStruct((1, program.heads, program.tokens), jnp.float32)
    ours = program.implementation == OURS and program.direction == "backward"
    return program.shapes() + ((rows, rows) if ours else ())


def tile_of(program: Program) -> Tile:
    """The scale and the mask; "full" is without positions."""
    tile = Tile(scale=program.head_dim**-0.5)
    if program.mask == "full":
        return tile
    positions = jnp.arange(program.tokens, dtype=jnp.int32)[None]
    return dataclasses.replace(tile, right=0, q_positions=positions, kv_positions=positions)


def _ours(program: Program, interpret: bool) -> Callable[..., Any]:
    config = TileConfig(
        block_q=program.block_q,
        block_kv=program.block_kv,
        block_compute=program.compute,
        block_compute_q=program.compute_q,
        chip=program.chip,
        interpret=interpret,
    )
    run = mosaic_tpu.tile_forward if program.direction == "forward" else mosaic_tpu.tile_backward
    return lambda *arrays: run(*arrays, tile=tile_of(program), config=config)


def _splash(program: Program, interpret: bool) -> Callable[..., Any]:
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    if program.kv_heads != program.heads:
        raise ValueError("splash attention is compared with at kv_heads = heads only.")
    shape = (program.tokens, program.tokens)
    one = masks.CausalMask(shape) if program.mask == "causal" else masks.FullMask(shape)
    block_q, block_kv = program.block_q or 1024, program.block_kv or 1024
    compute = min(program.compute or 512, block_kv)
    make = functools.partial(
        splash.make_splash_mha_single_device,
        masks.MultiHeadMask([one] * program.heads),
        block_sizes=splash.BlockSizes(
            block_q=block_q, block_kv=block_kv, block_kv_compute=compute,
            block_q_dkv=block_q, block_kv_dkv=block_kv, block_kv_dkv_compute=compute,
            use_fused_bwd_kernel=True,
        ),
        interpret=interpret,
    )  # fmt: skip

    def forward(q: jax.Array, k: jax.Array, v: jax.Array) -> Any:
        out, (lse,) = make(save_residuals=True)(q[0] * _scale(program), k[0], v[0])
        return _batched(out), _batched(lse)

    def backward(q: jax.Array, k: jax.Array, v: jax.Array, do: jax.Array) -> Any:
        def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            return _batched(make()(q[0] * _scale(program), k[0], v[0]))

        return jax.vjp(attend, q, k, v)[1](do)

    return forward if program.direction == "forward" else backward


def _batched(x: Any) -> Any:
    return x[None]


def _scale(program: Program) -> jax.Array:
    return jnp.asarray(program.head_dim**-0.5, program.dtype)


def compile_program(program: Program, timeout_s: float = 600) -> list[tpu_schedule.Kernel]:
    """Compiles for a chip that is not here, and reads the schedule of each of its kernels.

    Raises:
        RuntimeError: the compiler refused, or is not installed; with its own words.
    """
    with tempfile.TemporaryDirectory() as dump:
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "TPU_SKIP_MDS_QUERY": "1",  # or libtpu asks a cloud's metadata server for a TPU
            "TPU_WORKER_HOSTNAMES": "localhost",
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
            "LIBTPU_INIT_ARGS": f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true",
            "PYTHONPATH": os.pathsep.join(
                filter(None, (str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")))
            ),
        }
        spec = json.dumps(dataclasses.asdict(program))
        command = [sys.executable, "-m", "workbench.tpu_programs", spec]
        try:
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, timeout=timeout_s
            )
        except subprocess.TimeoutExpired as error:
            raise RuntimeError(f"the compiler took more than {timeout_s:.0f} s") from error
        if done.returncode:
            raise RuntimeError(_reason(done.stderr or done.stdout))
        kernels = tpu_schedule.read_kernels(Path(dump))
    if program.implementation == SPLASH and program.direction == "backward":
        kernels = [k for k in kernels if "dkv" in k.name or "dq" in k.name]
    if not kernels:
        raise RuntimeError("no kernel with a matrix product in it was compiled")
    return kernels


def _reason(stderr: str) -> str:
    """The last error of a traceback, on one line."""
    lines = [line for line in stderr.strip().splitlines() if line.strip()]
    errors = [i for i, line in enumerate(lines) if line[0].isalpha() and "Error" in line[:60]]
    return " ".join(line.strip() for line in lines[errors[-1] if errors else -1 :])[:600]


def on_one(chip: str, *shapes: jax.ShapeDtypeStruct) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Shapes of arrays on one device of a chip that is not here: what to lower a function with."""
    # A v4 chip is one device of two cores, as JAX runs it, and not two devices.
    kwargs = {"chip_config_name": "megacore"} if chip == "v4" else {}
    slice_ = topologies.get_topology_desc(platform="tpu", topology_name=SLICES[chip], **kwargs)
    here = NamedSharding(Mesh(np.array(slice_.devices[:1]), ("one",)), PartitionSpec())
    return tuple(jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here) for x in shapes)


def _child(spec: str) -> None:
    program = Program(**json.loads(spec))
    jax.jit(function(program)).lower(*on_one(program.chip, *arguments(program))).compile()


if __name__ == "__main__":
    _child(sys.argv[1])
