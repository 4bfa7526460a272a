"""Are the TPU tiles right, and how fast, on the TPU of this machine? One command, one verdict.

    python -m workbench.tpu_check              on a machine with a TPU, in the clone's environment
    python -m workbench.tpu_check --interpret  no TPU: only that the command works, on tiny shapes

It needs `pip install -e '.[test]' 'jax[tpu]'` and takes some minutes. One JSON line a step, then
the verdict in words:

    tests    `pytest -m tpu`: the tile contract on this TPU, against attention in float64
    numbers  at the size that is timed: errors of ours and of splash attention against the float32
             `xla` tile; ours may be up to twice splash's
    time     ours and JAX's splash attention in turns, at equal blocks and at our own choice:
             median of the rounds, and their spread

No chip of ours has run this yet: the lines of a first run, good or bad, are worth an issue.
"""

import argparse
import dataclasses
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from burst_kernels import xla
from burst_kernels._chips import chip_at_hand
from workbench import tpu_programs
from workbench.tpu_programs import MASKS, OURS, PASSES, SPLASH, Program

ROOT = Path(__file__).resolve().parents[2]
# bfloat16 rounds once more or less by the order of its sums; twice is what the test-suite allows.
MAX_ERROR_RATIO = 2.0


def main(argv: Sequence[str] | None = None) -> int:
    args = _arguments(argv)
    lines = []

    def tell(step: str, ok: bool, **figures: Any) -> None:
        lines.append({"step": step, "ok": ok} | figures)
        print(json.dumps(lines[-1]), flush=True)

    # In a process of its own, and before this one takes the TPU: it can be held only once.
    if args.tests:
        tell("tests", **run_tests())
    device = jax.devices()[0]
    if device.platform != "tpu" and not args.interpret:
        tell("device", False, found=device.device_kind)
        return _verdict(lines, args.interpret)
    tell("device", True, found=device.device_kind, count=jax.device_count(), **_versions())
    for program in programs(args, _chip(args)):
        attempt = {k: getattr(program, k) for k in ("direction", "mask", "block_q", "block_kv")}
        try:
            tell(**attempt, **compared(program, args.rounds, args.interpret))
        except Exception as error:  # whatever a device may raise: the other steps still tell
            tell("numbers", False, **attempt, error=f"{type(error).__name__}: {error}"[:600])
    return _verdict(lines, args.interpret)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    first, _, rest = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        description=first, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--interpret", action="store_true")
    parser.add_argument("--no-tests", dest="tests", action="store_false")
    parser.add_argument("--tokens", type=int, help="default: 8192; interpreted: 256")
    parser.add_argument("--heads", type=int, help="default: 8; interpreted: 1")
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--block", type=int, help="default: 1024; interpreted: 128")
    parser.add_argument("--rounds", type=int, help="default: 20; interpreted: 1")
    args = parser.parse_args(argv)
    defaults = (256, 1, 128, 1) if args.interpret else (8192, 8, 1024, 20)
    for name, value in zip(("tokens", "heads", "block", "rounds"), defaults, strict=True):
        setattr(args, name, getattr(args, name) or value)
    args.tests = args.tests and not args.interpret
    return args


def _chip(args: argparse.Namespace) -> str:
    return "v5e" if args.interpret else chip_at_hand().name


def _versions() -> dict[str, str]:
    return {"jax": jax.__version__, "date": time.strftime("%Y-%m-%d")}


def run_tests() -> dict[str, Any]:
    """`pytest -m tpu`: whether all passed, and how many."""
    environment = os.environ | {"JAX_PLATFORMS": "tpu,cpu"}
    command = [sys.executable, "-m", "pytest", "-q", "-m", "tpu", "--tb=short", "tests"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    return read_tests(done.returncode, done.stdout)


def read_tests(returncode: int, stdout: str) -> dict[str, Any]:
    """The figures of pytest's closing line. Where all were skipped, nothing was shown."""
    counts = {
        what: int(n) for n, what in re.findall(r"(\d+) (passed|failed|errors?|skipped)", stdout)
    }
    figures: dict[str, Any] = {"passed": counts.get("passed", 0), "failed": counts.get("failed", 0)}
    figures["ok"] = returncode == 0 and figures["passed"] > 0
    if not figures["ok"]:
        figures["output"] = stdout[-2000:]
    return figures


def programs(args: argparse.Namespace, chip: str) -> list[Program]:
    """Both passes, with and without a mask, at equal blocks and at our own choice."""
    return [
        Program(
            direction=direction, mask=mask, chip=chip, tokens=args.tokens, heads=args.heads,
            kv_heads=args.heads, head_dim=args.head_dim, block_q=block, block_kv=block,
        )
        for mask in MASKS
        for direction in PASSES
        for block in (args.block, None)
    ]  # fmt: skip


def compared(program: Program, rounds: int, interpret: bool) -> dict[str, Any]:
    """Errors and times of ours and of splash on the same arrays."""
    yardstick = dataclasses.replace(
        program,
        implementation=SPLASH,
        block_q=min(program.block_q or 1024, program.tokens),
        block_kv=min(program.block_kv or 1024, program.tokens),
    )
    arrays = _arrays(program)
    want, rows = truth(program, arrays)
    calls: dict[str, Callable[[], Any]] = {}
    for name, one in ((OURS, program), (SPLASH, yardstick)):
        given = arrays + (rows if name == OURS and program.direction == "backward" else ())
        run = jax.jit(tpu_programs.function(one, interpret))
        calls[name] = lambda run=run, given=given: run(*given)
    errors = {name: error(call(), want) for name, call in calls.items()}
    times = in_turns(calls, rounds, inner=1 if interpret else 10)
    medians = {name: statistics.median(each) for name, each in times.items()}
    flop = 2.0 * 2 * program.heads * program.tokens**2 * program.head_dim
    flop *= (2.5 if program.direction == "backward" else 1) * (
        0.5 if program.mask == "causal" else 1
    )
    ok = errors[OURS] <= MAX_ERROR_RATIO * errors[SPLASH]
    return {
        "step": "numbers and time",
        "ok": bool(ok),
        "error": round(errors[OURS], 6),
        "error_splash": round(errors[SPLASH], 6),
        "time_s": medians[OURS],
        "time_s_splash": medians[SPLASH],
        "spread": round(max(times[OURS]) / min(times[OURS]) - 1, 3),
        "times_splash": round(medians[OURS] / medians[SPLASH], 3),
        "flop_per_s": round(flop / medians[OURS]),
        "tokens": program.tokens,
        "heads": program.heads,
    }


def _arrays(program: Program) -> tuple[jax.Array, ...]:
    rng = np.random.default_rng(0)
    return tuple(
        jnp.asarray(rng.standard_normal(x.shape, np.float32), x.dtype) for x in program.shapes()
    )


def truth(program: Program, arrays: tuple[jax.Array, ...]) -> tuple[Any, tuple[jax.Array, ...]]:
    """What the `xla` tile finds in float32 on the same values, and lse and delta for a backward."""
    tile = tpu_programs.tile_of(program)
    with jax.default_matmul_precision("highest"):
        q, k, v, *do = (x.astype(jnp.float32) for x in arrays)
        out, lse = jax.jit(lambda q, k, v: xla.tile_forward(q, k, v, tile))(q, k, v)
        if not do:
            return (out,), ()
        delta = (do[0] * out).sum(-1)
        gradients = jax.jit(lambda *a: xla.tile_backward(*a, tile=tile))
        return gradients(q, k, v, do[0], lse, delta), (lse, delta)


def error(found: Sequence[jax.Array], want: Sequence[jax.Array]) -> float:
    """Greatest relative error in the root mean square, of out or of dq, dk, dv; NaN counts."""
    worst = 0.0
    for got, true in zip(found, want, strict=False):  # our forward also gives lse
        got, true = (np.asarray(x, np.float64) for x in (got, true))
        one = float(np.sqrt(np.mean((got - true) ** 2) / np.mean(true**2)))
        worst = max(worst, one) if np.isfinite(one) else np.inf
    return worst


def in_turns(
    calls: dict[str, Callable[[], Any]], rounds: int, inner: int
) -> dict[str, list[float]]:
    """Seconds of one call, `rounds` times each, in turns so that a slow moment meets both.

    `inner` calls are queued before the last is waited for: a device runs them one after the other,
    and what the host needs to start one is hidden behind the one before.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            jax.block_until_ready([call() for _ in range(inner)])
            times[name].append((time.perf_counter() - start) / inner)
    return times


def _verdict(lines: list[dict], interpret: bool) -> int:
    wrong = [line for line in lines if not line["ok"]]
    ratios = [line["times_splash"] for line in lines if "times_splash" in line]
    if not wrong:
        pace = (
            f"{min(ratios):.2f} to {max(ratios):.2f} times splash's time" if ratios else "untimed"
        )
        pace = "; " + ("interpreted, so the times mean nothing" if interpret else pace)
        print(f"VERDICT: all {len(lines)} steps are right{pace}.")
        return 0
    what = ", ".join(dict.fromkeys(line["step"] for line in wrong))
    print(f"VERDICT: {len(wrong)} of {len(lines)} steps are WRONG: {what}. See the lines above.")
    return 1


if __name__ == "__main__":
    sys.exit(main())
