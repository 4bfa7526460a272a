"""The Triton tiles as Triton's compiler makes them, for GPUs that are not here.

Of each kernel: the shared memory that it will ask for, against what the chip has and what
`_config.smem_bytes` says; that it runs on tensor cores; registers that ptxas spills. And whole
programs for eight A100: what their schedule hides.
"""

import importlib.util
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import pytest

import burst_jax as bj
import burst_kernels
from burst_jax import aot
from burst_kernels import Problem, Tile, TileConfig, triton
from burst_kernels.triton import _chips, _config, _launch

NEEDS_TRITON = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("triton", "jax_triton")),
    reason="needs the `triton` extra; `make test-aot` installs it and runs this",
)
pytestmark = [pytest.mark.aot, NEEDS_TRITON]

TOKENS = 1024
DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "int32": "i32"}
MASKS = ("none", "causal", "window, documents, soft cap, uneven")


class Built(NamedTuple):
    """What Triton makes of a launch.

    Attributes:
        call: the launch.
        problem: the sizes.
        shared: bytes of shared memory that the launch asks for.
        spilled: bytes of registers that ptxas stores elsewhere.
        layouts: Triton's last form of the kernel, with its layouts.
        ptx: what it is compiled to.
    """

    call: _launch.Call
    problem: Problem
    shared: int
    spilled: int
    layouts: str
    ptx: str


def tile(mask: str) -> tuple[Tile, int]:
    """A mask of its kind, and how many queries."""
    if mask == "none":
        return Tile(scale=0.1), TOKENS
    if mask == "causal":
        positions = jnp.arange(TOKENS, dtype=jnp.int32)[None]
        return Tile(scale=0.1, right=0, q_positions=positions, kv_positions=positions), TOKENS
    t = TOKENS - 3
    positions, ids = jnp.zeros((1, TOKENS), jnp.int32), jnp.zeros((2, 1, TOKENS), jnp.int32)
    return Tile(
        scale=0.1, left=100, right=0, logits_soft_cap=30.0, q_positions=positions[:, :t],
        kv_positions=positions, q_segments=ids[:, :, :t], kv_segments=ids,
    ), t  # fmt: skip


def launches(
    monkeypatch: pytest.MonkeyPatch, chip: str, dtype: Any, H: int, mask: str
) -> tuple[list[tuple[_launch.Call, list[str]]], Problem]:
    """Both kernels of a tile with its default sizes, and their operands' types."""
    found: list[tuple[_launch.Call, list[str]]] = []

    def record(call: _launch.Call, operands: Any, types: Any) -> list[jax.Array]:
        names = [DTYPES[x.dtype.name] for x in (*operands, *types)]
        found.append((call, names))
        return [jnp.zeros(x.shape, x.dtype) for x in types]

    monkeypatch.setattr(_launch, "_compiled", record)
    masked, t = tile(mask)
    q = jnp.zeros((1, 4, t, H), dtype)
    k = jnp.zeros((1, 2, TOKENS, H), dtype)
    config = TileConfig(chip=chip)
    onto = (jnp.zeros((1, 4, t, H)), jnp.zeros((1, 4, t)))
    onto = tuple(x.astype(jnp.float32) for x in onto)

    def both(q: jax.Array, k: jax.Array) -> Any:
        out, lse = triton.tile_forward(q, k, k, masked, config, onto)
        return triton.tile_backward(q, k, k, q, lse, lse, masked, config, (out, None, None))

    jax.eval_shape(both, q, k)
    kinds = 0 if masked.q_segments is None else masked.q_segments.shape[0]
    return found, Problem(
        B=1, t=t, s=TOKENS, N=4, K=2, H=H, Hv=H, dtype=q.dtype, masked=masked.masked, kinds=kinds
    )


def build(call: _launch.Call, types: list[str], problem: Problem, where: Path) -> Built:
    """Compiles as jax_triton does, and assembles."""
    import triton as compiler
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from burst_kernels.triton import _kernels

    kernel = getattr(_kernels, call.kernel)
    names = kernel.arg_names[:-1]
    source = ASTSource(
        kernel,
        {**{n: f"*{t}" for n, t in zip(names, types, strict=True)}, "C": "constexpr"},
        constexprs={(len(names),): call.sizes},
        attrs={(i,): [["tt.divisibility", 16]] for i in range(len(names))},
    )
    options = {
        "num_warps": call.launch.warps, "num_stages": call.launch.stages, "enable_fp_fusion": True,
    }  # fmt: skip
    made = compiler.compile(
        source, target=GPUTarget("cuda", call.launch.capability, 32), options=options
    )
    ptx = where / "kernel.ptx"
    ptx.write_text(made.asm["ptx"])
    tool = "ptxas-blackwell" if call.launch.capability >= 90 else "ptxas"
    assembler = Path(compiler.__file__).parent / "backends" / "nvidia" / "bin" / tool
    arch = re.search(r"\.target (\w+)", made.asm["ptx"])
    assert arch is not None
    done = subprocess.run(
        [assembler, "-v", f"-arch={arch.group(1)}", ptx, "-o", "/dev/null"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    spilled = re.search(r"(\d+) bytes spill stores", done.stderr)
    assert spilled is not None, done.stderr
    layouts, text = made.asm["ttgir"], made.asm["ptx"]
    return Built(call, problem, made.metadata.shared, int(spilled.group(1)), layouts, text)


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """(chip, dtype, H, mask) -> the kernels of a tile, compiled afresh."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))

    def of(chip: str, dtype: Any, H: int, mask: str) -> list[Built]:
        found, problem = launches(monkeypatch, chip, dtype, H, mask)
        assert [call.kernel for call, _ in found] == ["forward_kernel", "backward_kernel"]
        return [build(call, types, problem, tmp_path) for call, types in found]

    yield of


def assert_fits(kernels: list[Built], chip: str) -> None:
    """What a kernel asks for is there, and known before it is compiled."""
    capability = _chips.capability_of(chip)
    assert capability is not None
    for b in kernels:
        cut = _config.Cut(
            b.call.sizes.block_q, b.call.sizes.block_kv, b.call.launch.warps, b.call.launch.stages
        )
        backward = b.call.kernel == "backward_kernel"
        most = _config.smem_bytes(b.problem, capability, cut, backward)
        assert b.shared <= most <= _chips.shared_bytes(capability), (b.call.kernel, cut, b.shared)


# What the other dtypes differ in they show under any mask: the last has all that a mask can have.
@pytest.mark.parametrize("H", [64, 128, 256])
@pytest.mark.parametrize(
    ("dtype", "mask"),
    [*(("bfloat16", mask) for mask in MASKS), ("float16", MASKS[2]), ("float32", MASKS[2])],
)
def test_every_kernel_compiles_for_an_a100(built, dtype, H, mask):
    kernels = built("sm_80", jnp.dtype(dtype), H, mask)
    assert_fits(kernels, "sm_80")
    for b in kernels:
        assert "mma.sync" in b.ptx, "products run on tensor cores"
        if b.call.launch.stages > 1:
            assert "cp.async" in b.ptx, "loops are pipelined"
        # Of FlashAttention-2's size, and no more: spills cost every turn of a loop.
        plain = dtype != "float32" and H <= 128 and mask != MASKS[2]
        assert b.spilled <= (0 if plain else 2560), (b.call.kernel, b.spilled)


@pytest.mark.parametrize(
    ("chip", "dtype", "H"),
    [("sm_86", "bfloat16", 80), ("sm_89", "bfloat16", 128),
     ("sm_86", "bfloat16", 64), ("sm_86", "bfloat16", 128), ("sm_86", "float32", 256),
     ("sm_89", "float16", 256), ("sm_89", "float32", 128), ("sm_90", "float32", 128),
     ("sm_90", "bfloat16", 128),
     ("sm_100", "bfloat16", 128), ("sm_100", "float32", 64),
     ("sm_103", "bfloat16", 256), ("sm_120", "bfloat16", 128), ("sm_120", "float16", 256)],
)  # fmt: skip
def test_and_for_other_gpus(built, chip, dtype, H):
    # sm_86 has the least memory: with all the marks that a mask may need.
    mask = MASKS[2] if chip == "sm_86" else "causal"
    kernels = built(chip, jnp.dtype(dtype), H, mask)
    assert_fits(kernels, chip)
    for b in kernels:
        assert re.search(r"mma\.sync|wgmma|tcgen05\.mma", b.ptx), "products run on tensor cores"
        plain = dtype != "float32" and H <= 128 and mask != MASKS[2]
        assert b.spilled <= (0 if plain else 2560), (b.call.kernel, b.spilled)


def program(target: str, side: str, kv_heads: int) -> jax.stages.Compiled:
    """Forward and backward at 128K tokens, 8 query heads of 128, bfloat16, zigzag causal."""
    T = 128 * 1024
    mesh = aot.mesh_for(target)
    where = bj.SequenceSharding(mesh, layout="zigzag", length=T)
    spec = jax.NamedSharding(mesh, where.spec(4))
    q, k = (
        jax.ShapeDtypeStruct((1, T, heads, 128), jnp.bfloat16, sharding=spec)
        for heads in (8, kv_heads)
    )

    def gradients(q, k, v, do):
        def attention(q, k, v):
            return bj.burst_attention(
                q, k, v, sharding=where, mask=bj.Mask.causal(), plan=bj.Plan(backward=side)
            )

        # In a scan over layers, and made again in the backward, as users have it.
        def layer(x, _):
            return jax.checkpoint(attention)(x, k, v), None

        return jax.vjp(lambda q: jax.lax.scan(layer, q, length=2)[0], q)[1](do)

    # What XLA does by itself from Hopper on, README says how.
    options = {"xla_gpu_enable_latency_hiding_scheduler": True}
    return aot.compile_for(target, jax.jit(gradients, compiler_options=options), q, k, k, q)


@pytest.mark.parametrize(("kv_heads", "side"), [(8, "q"), (2, "kv")])
def test_on_eight_a100_every_transfer_hides_behind_a_tile(kv_heads, side):
    found = program("a100:8", side, kv_heads)
    assert "triton_kernel_call" in found.as_text(), "Triton's kernels"
    overlap = bj.inspect.overlap(found)
    assert overlap.exposed == 0, overlap.exposed_names
    assert overlap.hidden >= 5
    # The ring's message is read where it lies: what the kernels take is no copy of a part of it.
    assert not re.search(r"= bf16\[[\d,]*16384,128\]\S* slice\(", found.as_text())


def test_an_l4_and_a_b200_take_triton_tiles_and_a_t4_those_of_xla():
    problem = Problem(B=1, t=64, s=64, N=1, K=1, H=64, Hv=64, dtype=jnp.dtype(jnp.bfloat16))
    for target, name in (("a100:1", "triton"), ("l4:1", "triton"), ("b200:1", "triton"),
                         ("h100:1", "mosaic_gpu"), ("t4:1", "xla")):  # fmt: skip
        device = aot.mesh_for(target).devices.flat[0]
        capability = getattr(device, "compute_capability", None)
        chip = burst_kernels.chip_of(device.platform, device.device_kind, capability)
        assert burst_kernels.select(problem, chip).name == name, (target, chip)
