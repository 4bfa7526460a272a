"""What of the GPU bench can be told without a GPU: its arguments, its FLOP, its refusal."""

import importlib.util
from pathlib import Path
from types import ModuleType

import jax
import numpy as np
import pytest

PATH = Path(__file__).parent.parent / "kernels" / "workbench" / "gpu_bench.py"


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_bench", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_by_default_it_measures_every_size_that_is_promised(bench):
    found = list(bench.runs(bench.parse([])))
    attention = [run for run in found if run.what == "attention"]
    assert {run.T for run in attention} == {2**n for n in range(12, 17)}
    assert {run.H for run in attention} == {64, 128}
    assert {run.mask for run in attention} == {"causal", "full"}
    assert {run.N // run.K for run in attention} == {1, 4}
    assert {(run.backend, run.direction) for run in attention} == {
        ("burst", "forward"), ("burst", "backward"), ("cudnn", "forward"), ("cudnn", "backward"),
        ("tokamax", "forward"),
    }  # fmt: skip
    assert {run.T for run in found if run.what == "hop"} == {2**n for n in range(13, 17)}
    assert found[0].what == "matmul"
    assert len(set(found)) == len(found)


def test_arguments_narrow_it_down(bench):
    given = "--what attention --tokens 4096 --head-dims 128 --groups 1 --passes backward".split()
    found = list(bench.runs(bench.parse([*given, "--masks", "full", "--backends", "burst"])))
    assert found == [
        bench.Run("attention", "burst", "backward", "full", B=4, T=4096, N=16, K=16, H=128)
    ]


@pytest.mark.parametrize(
    ("arguments", "match"),
    [("--tokens 0", "at least 1, got"), ("--head-dims 96", "no whole number of heads of 96")],
)
def test_sizes_that_make_no_sense_are_refused(bench, arguments, match, capsys):
    with pytest.raises(SystemExit):
        bench.parse(arguments.split())
    assert match in capsys.readouterr().err


@pytest.mark.parametrize("mask", ["full", "causal", "earlier", "later"])
def test_flop_count_the_pairs_that_see_each_other(bench, mask):
    T, ring, run = 12, 8, bench.Run("hop", "burst", "forward", mask, B=3, T=12, N=2, K=1, H=64)
    both = bench.positions(run, ring)
    seen = np.ones((T, T), bool) if both is None else both[1][None, :] <= both[0][:, None]
    assert bench.pairs(run, ring) == seen.sum()
    # A hop of a zigzag ring: half of all pairs, whoever's keys they are.
    expected = {"full": T * T, "causal": T * (T + 1) // 2}.get(mask, T * T // 2)
    assert seen.sum() == expected
    assert bench.flop(run, ring) == 4 * 64 * 3 * 2 * expected
    assert bench.flop(run._replace(direction="backward"), ring) == 10 * 64 * 3 * 2 * expected


def test_a_row_compares_with_the_matmul_and_with_the_best_plain_attention(bench):
    args = bench.parse([])
    best = {}
    matmul = bench.row(bench.Run("matmul", "jax"), [2e-3, 1e-3, 3e-3], best, args)
    assert matmul["median_s"] == 2e-3 and (matmul["least_s"], matmul["greatest_s"]) == (1e-3, 3e-3)
    assert matmul["tflop_per_s"] == pytest.approx(2 * 8192**3 / 2e-3 / 1e12, abs=0.1)
    full = bench.Run("attention", "burst", "forward", "full", T=8192, N=16, K=16, H=128)
    slow = bench.row(full, [4e-2], best, args)
    bench.row(full._replace(backend="cudnn"), [2e-2], best, args)
    assert slow["share_of_matmul"] == pytest.approx(
        slow["tflop_per_s"] / matmul["tflop_per_s"], abs=2e-3
    )
    hop = full._replace(what="hop", mask="earlier")
    found = bench.row(hop, [2e-2], best, args)
    assert found["share_of_ideal"] == 0.5  # half the pairs in the time of all, at the best rate
    assert bench.row(hop._replace(T=16384), [1.0], best, args)["share_of_ideal"] is None


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_what_is_timed_takes_its_operands_and_has_no_constants(bench, direction, monkeypatch):
    profiler = pytest.importorskip("jax.experimental.mosaic.gpu.profiler")
    run = bench.Run("attention", "burst", direction, "causal", T=256, N=2, K=1, H=16)
    call = bench.prepared(run, 8, "float32", "xla")
    programs = []

    def measure(function):
        def timed(*operands):
            programs.append(jax.make_jaxpr(function)(*operands))
            return None, 1.0

        return timed

    monkeypatch.setattr(profiler, "measure", measure)
    assert bench.seconds(call, rounds=1) == [1e-3]
    # q, k, v and both positions; do, lse, delta too.
    assert len(programs[0].jaxpr.invars) == {"forward": 5, "backward": 8}[direction]
    (inner,) = programs[0].jaxpr.eqns
    assert not programs[0].consts and not inner.params["jaxpr"].consts


def test_a_table_of_bfloat16_is_not_filled_with_another_dtype(bench, capsys):
    with pytest.raises(SystemExit):
        bench.parse("--tune --write --dtype float16".split())
    assert "table of bfloat16" in capsys.readouterr().err


def test_without_a_hopper_gpu_it_says_so(bench, monkeypatch):
    if jax.default_backend() == "gpu":
        pytest.skip("runs on machines without a GPU")
    monkeypatch.setattr("sys.argv", ["gpu_bench.py"])
    with pytest.raises(SystemExit, match="nothing to time on 'cpu'.*H100, H200 or H20"):
        bench.main()
