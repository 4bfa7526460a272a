"""The GPU workbench: what it reads off machine code, and which block sizes it would write down.

The text below has the form of nvdisasm 13, cut short.
"""

import importlib.util
import json

import jax.numpy as jnp
import pytest

from burst_kernels import Problem, TileConfig, mosaic_gpu
from burst_kernels.mosaic_gpu._winners import WINNERS
from workbench import gpu_programs, gpu_report, gpu_sass, gpu_tune

LOOP = """
.L_x_13:
        /*3310*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR15], R6 ;
        /*3320*/              @!P0 BRA `(.L_x_10) ;
.L_x_22:
        /*3450*/                   WARPGROUP.ARRIVE ;
        /*3500*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], RZ, !UPT ;
        /*3660*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR36], R24, gsb0 ;
        /*3680*/                   HGMMA.64x64x16.F32.BF16 R88, R180, gdesc[UR8].tnspB, R88, gsb0 ;
        /*37c0*/                   WARPGROUP.DEPBAR.LE gsb0, 0x1 ;
        /*3800*/                   FMNMX R3, R24, R3, !PT ;
        /*3810*/                   FFMA R24, R24, UR4, -R3 ;
        /*3820*/                   MUFU.EX2 R24, R24 ;
        /*40a0*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*40b0*/                   MUFU.EX2 R25, R25 ;
        /*40c0*/                   F2FP.BF16.F32.PACK_AB R180, R25, R24 ;
        /*40d0*/                   STS.64 [R4+0x10], R24 ;
        /*5380*/               @P0 BRA `(.L_x_13) ;
        /*5390*/                   EXIT ;
.L_x_10:
        /*5fa0*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR15], R6 ;
        /*5fd0*/              @!P0 BRA `(.L_x_10) ;
        /*5fe0*/                   BRA `(.L_x_22) ;
"""


def test_a_loop_around_products_is_counted_once():
    (loop,) = gpu_sass.loops(gpu_sass.parse(LOOP))
    assert loop.products == 3 and loop.instructions == 15
    assert loop.tensor_cycles == 64 + 64 + 32
    assert loop.kinds["exp2"] == 2 and loop.exp2_under == 1
    assert loop.kinds["fma"] == loop.kinds["max"] == loop.kinds["convert"] == 1
    assert loop.kinds["shared"] == 1 and "spill" not in loop.kinds
    assert not loop.masked


@pytest.mark.parametrize(
    ("line", "what"),
    [
        (None, None),
        ("MOV R182, R3", "R182"),  # an operand that a product still reads
        ("FADD R3, R91, R3", "R91"),  # a sum that is not there yet
        ("FADD R91, R3, R3", "R91"),
        ("LDS.128 R176, [R3]", None),
        ("LDS.128 R177, [R3]", "R180"),
        ("STS.64 [R90], R3", "R90"),
        ("STG.E.64 desc[UR4][R2.64], R118", "R118"),
        ("FADD R3, R180, R3", None),  # to read an operand is allowed
    ],
)
def test_registers_of_products_under_way_may_not_be_touched(line, what):
    text = LOOP
    if line is not None:
        mark = "        /*40a0*/"
        text = text.replace(mark, f"        /*4090*/                   {line} ;\n{mark}")
    found = gpu_sass.hazards(gpu_sass.parse(text))
    assert bool(found) == (what is not None)
    assert what is None or f"{what} is in flight" in found[0]


def test_a_wait_that_is_missing_is_seen_across_the_loop():
    text = LOOP.replace("WARPGROUP.DEPBAR.LE gsb0, 0x0 ;", "NOP ;")
    found = gpu_sass.hazards(gpu_sass.parse(text))
    assert any(x.startswith("F2FP") for x in found)


def test_a_pass_of_two_kernels_is_compared_by_scores():
    def kernel(*loops: gpu_sass.Loop) -> gpu_programs.Kernel:
        return gpu_programs.Kernel(
            name="k", registers=168, spill_bytes=0, shared_bytes=2048, grid=None, serialized=False,
            hazards=0, loops=list(loops),
        )  # fmt: skip

    def loop(instructions: int, exp2: int, masked: bool = False) -> gpu_sass.Loop:
        return gpu_sass.Loop(
            products=8, tensor_cycles=256, instructions=instructions, kinds={"exp2": exp2},
            exp2_under=0, masked=masked,
        )  # fmt: skip

    # One warpgroup's code and the other's are one loop.
    ours = [kernel(loop(320, 32), loop(310, 32), loop(640, 64, masked=True))]
    jax = [kernel(loop(320, 34)), kernel(loop(160, 32))]
    assert gpu_report.per_score(ours) == {False: 10.0, True: 10.0}
    assert gpu_report.per_score(jax) == {False: 15.0}
    lines = gpu_report.cells(gpu_programs.Program(), ours, gpu_report.per_score(jax))
    text = gpu_report.table(lines)
    assert "0.667" in text and text.count("full") == 2 and text.count("partial") == 1


def rate(direction: str, H: int, mask: str, config: TileConfig) -> float:
    """A machine that likes small blocks of keys and fails with some blocks of the backward."""
    if config.stages_backward == 2:
        raise RuntimeError("out of luck")
    sizes = (config.block_kv or 0) + (config.block_kv_backward or 0)
    return (700.0 if mask == "full" else 500.0) - sizes / 10 - (config.stages or 0)


def test_the_fastest_block_sizes_are_written_down_and_read_again():
    lines: list[str] = []
    winners = gpu_tune.tune(["forward", "backward"], [64, 128], rate, lines.append)
    assert [(w.direction, w.H) for w in winners] == [
        ("forward", 64), ("forward", 128), ("backward", 64), ("backward", 128)
    ]  # fmt: skip
    assert winners[1].sizes == dict(block_q=128, block_kv=64, stages=2)
    assert winners[3].sizes["block_kv_backward"] == 64
    found = [json.loads(line) for line in lines]
    assert any("failed" in line for line in found) and any("rate" in line for line in found)
    # Each candidate is one that `configure` takes as it is.
    problem = Problem(B=1, t=64, s=64, N=4, K=4, H=128, Hv=128, dtype=jnp.bfloat16, masked=True)
    for direction in gpu_tune.PASSES:
        for sizes in gpu_tune.candidates(direction, 128):
            config = mosaic_gpu.configure(problem, "sm_90", TileConfig(**sizes))
            assert {name: getattr(config, name) for name in sizes} == sizes
    before = gpu_tune.TABLE.read_text()
    text = gpu_tune.updated(before, winners, "NVIDIA H100, jax 0.12.0, 2026-01-02")
    there: dict = {}
    exec(text, there)
    assert set(there["WINNERS"]) == set(WINNERS)
    assert there["WINNERS"]["sm_90", "forward", 128] == winners[1].sizes
    assert there["WINNERS"]["sm_90", "forward", 256] == WINNERS["sm_90", "forward", 256]
    assert text.count("# not measured") == before.count("# not measured") - 4
    assert "    # 492 causal, 692 full; NVIDIA H100, jax 0.12.0, 2026-01-02\n" in text
    # What is written is what the formatter leaves alone, and can be written again.
    assert gpu_tune.updated(text, [], "") == text
    assert gpu_tune.updated(before, [], "") == before


@pytest.mark.aot
@pytest.mark.skipif(
    gpu_programs.missing() is not None or not importlib.util.find_spec("jax_cuda13_plugin"),
    reason="needs the GPU compiler, ptxas and nvdisasm",
)
@pytest.mark.parametrize("direction", gpu_programs.PASSES)
def test_nothing_touches_registers_of_products_under_way(direction):
    program = gpu_programs.Program(direction=direction, mask="causal", tokens=1024, heads=2)
    (kernel,) = gpu_programs.compile_program(program)
    assert not kernel.serialized and not kernel.hazards
    assert kernel.shared_bytes is not None and kernel.shared_bytes <= 227 * 1024
    # Blocks of one head run together, and find what they share in the cache.
    assert kernel.grid == (8, 2, 1)
    assert {loop.masked for loop in kernel.loops} == {False, True}
    if direction == "forward":  # the softmax of a block lies under the values of the one before
        assert all(x.exp2_under == x.kinds["exp2"] for x in kernel.loops)
