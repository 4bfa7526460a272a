"""The TPU workbench: what it reads off the compiler's text, and that its commands run.

The texts below have the form of libtpu 0.0.42's dumps, cut short.
"""

import dataclasses
import json
from pathlib import Path

import pytest

from workbench import tpu_programs, tpu_report, tpu_schedule

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
