"""The TPU workbench: what it reads off the compiler's text, and that its commands run.

The texts below have the form of libtpu 0.0.42's dumps, cut short.
"""

import dataclasses
import itertools
import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from burst_kernels import TileConfig
from workbench import tpu_check, tpu_programs, tpu_report, tpu_schedule, tpu_sweep

UTILIZATION = """== CAPACTIY:
MXU, XLU, VALU, VPOP, EUP, VLOAD, VLOAD:FILL, VSTORE, VSTORE:SPILL, SALU
    4     3     4     2     1     3     3     1     1     2
== UTILIZATION:
0 0 0 0 0 0 0 0 0 2
0 0 0 0 0 0 0 0 0 2
0 0 0 0 0 0 0 0 0 1
0 0 0 0 0 0 0 0 0 1
0 0 0 0 0 0 0 0 0 1
0 0 0 0 0 0 0 0 0 1
4 0 0 0 0 0 0 1 1 0
2 1 0 0 0 1 1 0 0 0
0 1 0 0 0 1 1 0 0 0
3 1 0 0 0 0 0 0 0 0
0 0 0 0 0 0 0 0 0 1
0 0 0 0 0 0 0 0 0 1
0 0 0 0 0 0 0 0 0 1
"""
# A loop over grid steps (0x1 to 0xb) in which a branch may skip the initialization (0x3 to 0x4) and
# another the tile (0x6 to 0x9).
BUNDLES = """= control target key start
LH: loop header
= control target key end

     0   :  { %s1 = smov [#allocation3] /* materialized constant */ } /* Start region 1 */
   0x1 LB: > { %s9 = sphi %s1, %s2 /* phi copy */ } /* Start region 5 */
   0x2   : > { %654 = sbr.rel (%p8) target = $region48 } /* strides: (1, 128, 1)
pad_low: (0, 0, 0) */
   0x3   : > { %655 = vst [vmem:[#allocation14] sm:$0xff] %v0 } /* Start region 47 */
   0x4   : > {} /* End region 47 */
   0x5 PF: > { %s3 = sld [smem:[#allocation30]]  ;;  %99 = sbr.rel (%p9) target = $region52 } \
/* Start/End empty region 48 */
   0x6   : > { %3 = vmatmul.bf16.gmra.mxu3 %v22 } /* Start region 51 */
   0x7   : > { %4 = vmatmul.bf16.gmra.mxu3 %v23 }
   0x8   : > {}
   0x9   : > { %5 = vmatmul.bf16.gmra.mxu3 %v24 } /* End region 51 */
   0xa PF: > { %s54 = sld [smem:[#allocation30]] } /* Start/End empty region 52 */
   0xb   : > { %6 = sbr.rel (!%p12) target = $region5 } /* End region 5 */
   0xc   :  {} /* End region 1 */
"""
VMEM = """<html><script>
// the data
const DATA ={"global_info": {"vmem_capacity": 1000}, "hlo_breakdowns": {
  "tile.1": {"blocks": [{"allocations": [], "block_size": 4096, "block_type": "SCOPED"},
                        {"allocations": [], "block_size": 7, "block_type": "HLO_TEMPORARY"}]}}};
</script>"""


@pytest.fixture
def dump(tmp_path: Path) -> Path:
    (tmp_path / "179-tile.1-70-final_hlo-static-per-bundle-utilization.txt").write_text(UTILIZATION)
    (tmp_path / "179-tile.1-71-schedule-analysis_final_bundles.txt").write_text("something else")
    (tmp_path / "179-tile.1-72-final_bundles.txt").write_text(BUNDLES)
    (tmp_path / "180-TLP-83-vmem_report.html").write_text(VMEM)
    scalar = "\n".join([*UTILIZATION.splitlines()[:5], "0 0 0 0 0 0 0 0 0 1\n"])
    (tmp_path / "180-copy.2-70-final_hlo-static-per-bundle-utilization.txt").write_text(scalar)
    return tmp_path


def test_the_schedule_of_a_kernel_is_read_from_its_first_product_to_its_last(dump):
    (kernel,) = tpu_schedule.read_kernels(dump)  # and not the copy, which multiplies nothing
    assert kernel == tpu_schedule.Kernel(
        name="tile.1",
        mxu_percent=56.2,  # 9 of 4 bundles' 16 slots
        bundles=4,
        total_bundles=13,
        step_bundles=5,  # 0x1, 0x2, 0x5, 0xa, 0xb: neither the initialization nor the tile
        matmul_slots=9,
        spill_stores=1,
        fill_loads=2,
        vmem_bytes=4096,
        regions=(
            tpu_schedule.Region(depth=1, bundles=4, matmul_slots=9, spill_stores=1, fill_loads=2),
        ),
    )


def test_where_pushes_have_a_column_of_their_own_only_products_are_counted():
    text = UTILIZATION.replace("MXU, XLU", "MATMUL, MXU")
    assert tpu_schedule.read_utilization(text)[1][6] == (4, 1, 0)
    text = UTILIZATION.replace("MXU, XLU", "MXU, MATMUL")
    assert tpu_schedule.read_utilization(text)[1][9] == (1, 0, 0)


@pytest.mark.parametrize(
    "change",
    [("VSTORE:SPILL", "SPILLED"), ("VALU", "ALU"), ("0 0 0 0 0 0 0 0 0 2", "0 2")],
    ids=str,
)
def test_text_of_another_form_is_refused_and_not_misread(change):
    with pytest.raises(tpu_schedule.UnknownFormat):
        tpu_schedule.read_utilization(UTILIZATION.replace(*change))


def test_files_that_disagree_on_the_number_of_bundles_are_refused(dump):
    path = dump / "179-tile.1-72-final_bundles.txt"
    path.write_text(BUNDLES.replace("0x8   : > {}\n", ""))
    with pytest.raises(tpu_schedule.UnknownFormat, match="13 bundles in one file, 12 in the other"):
        tpu_schedule.read_kernels(dump)


def kernel(name: str, bundles: int, *slots: int) -> tpu_schedule.Kernel:
    """A kernel with one region for each of `slots`."""
    regions = tuple(
        tpu_schedule.Region(depth=1, bundles=bundles, matmul_slots=n, spill_stores=0, fill_loads=0)
        for n in slots
    )
    return tpu_schedule.Kernel(
        name=name, mxu_percent=50.0, bundles=bundles, total_bundles=2 * bundles, step_bundles=7,
        matmul_slots=sum(slots), spill_stores=0, fill_loads=0, vmem_bytes=None, regions=regions,
    )  # fmt: skip


def rows(splash: list, ours: list, **program) -> list[dict]:
    return tpu_report.rows_of(tpu_programs.Program(**program), {"splash": splash, "ours": ours})


@pytest.fixture
def libtpu(monkeypatch):
    monkeypatch.setattr(tpu_report.importlib.metadata, "version", lambda name: "0")


def test_a_pass_of_two_kernels_is_compared_by_their_sum(libtpu):
    found = rows([kernel("dkv.1", 1000, 400)], [kernel("dq.1", 500, 200), kernel("dkv", 700, 200)])
    assert [row["ratio"] for row in found] == [1.0, 1.2, 1.2]
    assert [row["kernel"] for row in found] == ["dkv", "dq", "dkv"]


def test_a_loop_left_rolled_does_not_look_like_a_short_kernel(libtpu):
    found = rows([kernel("splash", 1000, 400)], [kernel("tile", 300, 101)])
    assert (found[1]["trips"], found[1]["ratio"]) == (4, 1.2)


def test_kinds_of_tiles_have_lines_of_their_own_and_no_ratio(libtpu):
    found = rows([kernel("splash", 1000, 400)], [kernel("tile", 2500, 400, 400, 3)], mask="causal")
    assert found[1]["ratio"] is None
    assert found[1]["trips"] == 1
    lines = tpu_report.table_cells(found[1])
    assert [line[2].strip() for line in lines] == ["tile", "tile 1", "tile 2"]
    assert json.loads(json.dumps(found[1]))["regions"][1]["matmul_slots"] == 400
    assert len({len(line) for line in (*lines, tpu_report.HEADER)}) == 1


def test_a_chip_that_does_not_exist_is_refused_with_those_that_do(libtpu, capsys):
    with pytest.raises(SystemExit):
        tpu_report.main(["v9:2x2"])
    assert "v4, v5e, v5p, v6e, tpu7x" in capsys.readouterr().err


def test_splash_is_compared_with_at_equal_heads_only():
    program = tpu_programs.Program(implementation="splash", kv_heads=2)
    with pytest.raises(ValueError, match="kv_heads = heads"):
        tpu_programs.function(program)


# The sweep.


def tile_score(relative: float, vmem: int, **program) -> tpu_sweep.Score:
    one = tpu_programs.Program(compute=512, **program)
    return tpu_sweep.Score(one, relative, 1000, 1100, vmem)


@pytest.mark.parametrize("blocks", [(1, 1), (4, 2), (2, 4), (8, 8), (3, 5)])
def test_the_tiles_of_a_ring_are_those_that_classification_finds(blocks):
    R, t = 3, 16
    program = tpu_programs.Program(tokens=t, block_q=blocks[0], block_kv=blocks[1])
    # A block of the kernel may straddle the two chunks; the estimate counts by chunk.
    chunk = [np.arange(t // 2) + c * t // 2 for c in range(2 * R)]
    full = partial = pairs = 0
    for r in range(R):
        for c, d in itertools.product((1, 2 * R - 2), (r, 2 * R - 1 - r)):
            for i, j in itertools.product(range(0, t // 2, blocks[0]), range(0, t // 2, blocks[1])):
                q, kv = chunk[c][i : i + blocks[0], None], chunk[d][None, j : j + blocks[1]]
                seen = kv <= q
                pairs += seen.sum()
                full, partial = full + seen.all(), partial + (seen.any() and not seen.all())
    assert tpu_sweep.ring_tiles(program, ring=R) == (full, partial, pairs)


def test_a_step_waits_for_memory_where_that_takes_longer():
    program = tpu_programs.Program(mask="causal", tokens=2048, block_q=1024, block_kv=1024)
    fast, slow = (kernel("tile", n, 400, 400) for n in (3000, 30))
    some, none = (tpu_sweep.scored(program, [k]).relative for k in (fast, slow))
    # 512 KiB at 547 bytes a cycle: 959 cycles a step, whatever the schedule says.
    assert some / none == pytest.approx(3007 / 959, rel=0.01)


def test_of_candidates_that_are_alike_the_one_with_the_least_vmem_wins():
    scores = [tile_score(1.00, 9), tile_score(1.09, 5), tile_score(1.12, 1)]
    assert tpu_sweep.best(scores) is scores[1]


def test_the_table_keeps_the_chips_that_were_not_swept(libtpu):
    text = tpu_sweep.updated(
        "", [tile_score(1.1, 5, compute_q=256), tile_score(1.2, 5, chip="v6e")]
    )
    backward = tile_score(1.3, 5, chip="v6e", direction="backward")
    text = tpu_sweep.updated(text, [tile_score(1.3, 5, chip="v6e", block_q=2048), backward])
    there: dict = {}
    exec(text, there)
    assert there["WINNERS"] == {
        ("v5e", "forward"): dict(
            block_q=1024, block_kv=1024, block_compute_q=256, block_compute=512
        ),
        ("v6e", "forward"): dict(block_q=2048, block_kv=1024, block_compute=512),
        ("v6e", "backward"): dict(
            block_q_backward=1024, block_kv_backward=1024, block_compute_backward=512
        ),
    }
    names = {name for sizes in there["WINNERS"].values() for name in sizes}
    assert names <= {field.name for field in dataclasses.fields(TileConfig)}


# The check.


@pytest.mark.parametrize(
    "code, stdout, ok",
    [
        (0, "12 passed, 30 skipped in 3.1s", True),
        (0, "30 skipped in 3.1s", False),
        (1, "1 failed, 12 passed in 3.1s", False),
        (5, "no tests ran", False),
    ],
)
def test_tests_that_were_all_skipped_show_nothing(code, stdout, ok):
    assert tpu_check.read_tests(code, stdout)["ok"] is ok


def test_a_nan_is_the_greatest_error():
    one = np.ones((2, 2), np.float32)
    assert tpu_check.error([one, one], [one]) == 0
    assert tpu_check.error([one * 1.5], [one]) == 0.5
    assert tpu_check.error([np.array([[1, np.nan], [1, 1]])], [one]) == np.inf


def verdict(*arguments: str) -> tuple[int, list[dict], str]:
    command = [sys.executable, "-m", "workbench.tpu_check", "--interpret", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    *lines, last = done.stdout.splitlines()
    return done.returncode, [json.loads(line) for line in lines], last


@pytest.mark.slow
def test_the_check_says_that_interpreted_tiles_are_right():
    code, lines, last = verdict()
    assert code == 0, lines
    assert len(lines) == 9 and all(line["ok"] for line in lines)
    assert last.startswith("VERDICT: all 9 steps are right")


def test_the_check_says_what_is_wrong(monkeypatch, capsys, ordinary_promotion):
    def wrong(q, k, v, *, tile, config):
        return q.astype("float32") * 0.1, None

    monkeypatch.setattr(tpu_programs.mosaic_tpu, "tile_forward", wrong)
    monkeypatch.setattr(tpu_check, "PASSES", ("forward",))
    monkeypatch.setattr(tpu_check, "MASKS", ("full",))
    with jax.enable_x64(False):
        assert tpu_check.main(["--interpret"]) == 1
    *lines, last = capsys.readouterr().out.splitlines()
    assert [json.loads(line)["ok"] for line in lines] == [True, False, False]
    assert last.startswith("VERDICT: 2 of 3 steps are WRONG: numbers and time.")


@pytest.mark.aot
def test_the_yardstick_is_what_it_was_when_it_was_measured():
    """Splash at 1024 x 1024 on v5e: 4706 bundles with libtpu 0.0.42, 5109 with 0.0.52."""
    program = tpu_programs.Program(implementation="splash")
    (found,) = tpu_programs.compile_program(program)
    assert 0.9 * 4706 <= found.bundles <= 1.1 * 5109
    assert 70 <= found.mxu_percent <= 90
    assert found.vmem_bytes is not None and 2**20 < found.vmem_bytes < 2**24
    assert len(tpu_report.tiles(found)) == 1
    assert dataclasses.asdict(found)["step_bundles"] < found.bundles / 4
