"""How exact bfloat16 attention is on 1 to 8 devices, and that more devices do not make it worse.

    python benchmarks/error_curve.py        prints the table, and draws docs/error_curve.png

Errors are root mean square, against float64, of outputs and gradients (random cotangents), divided
by those of plain bfloat16 attention on one device (jax.nn.dot_product_attention): 1.0 is as exact,
below it more exact. Shown with gradients that travel in float32 (the default) and in
bfloat16, for either side that may travel in the backward ring. Simulated devices; no timing.
"""

import argparse
import functools
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import burst_jax as bj

PNG = Path(__file__).resolve().parent.parent / "docs" / "error_curve.png"
NAMES = ("out", "dq", "dk", "dv")
PLANS = {
    "queries travel back, dq in float32": bj.Plan(backward="q"),
    "queries travel back, dq in bfloat16": bj.Plan(backward="q", gradient_dtype=jnp.bfloat16),
    "keys travel back, dk and dv in float32": bj.Plan(backward="kv"),
    "keys travel back, dk and dv in bfloat16": bj.Plan(backward="kv", gradient_dtype=jnp.bfloat16),
}


def with_gradients(attend: Callable[..., jax.Array], *arrays: jax.Array) -> list[np.ndarray]:
    """out, dq, dk, dv."""

    @jax.jit
    def run(q, k, v, do):
        out, vjp = jax.vjp(attend, q, k, v)
        return out, *vjp(do.astype(out.dtype))

    return list(run(*arrays))


def errors(got: list[np.ndarray], truth: list[np.ndarray]) -> np.ndarray:
    """Root mean square error of each result."""
    differences = (
        np.asarray(a, np.float64) - np.asarray(b) for a, b in zip(got, truth, strict=True)
    )
    return np.array([np.sqrt(np.mean(d**2)) for d in differences])


def sharded(plan: bj.Plan, R: int, arrays: list[np.ndarray]) -> list[np.ndarray]:
    """Causal attention over R devices, in natural order."""
    mesh = jax.make_mesh((R,), ("sp",), devices=jax.devices()[:R])
    where = bj.SequenceSharding(mesh, "sp", "zigzag", length=arrays[0].shape[1])
    attend = functools.partial(bj.burst_attention, sharding=where, mask=bj.Mask.causal(), plan=plan)
    return [where.restore(x) for x in with_gradients(attend, *map(where.place, arrays))]


def measure(args: argparse.Namespace) -> Iterator[tuple[str, int, np.ndarray]]:
    """(plan, R, errors relative to plain attention's)."""
    rng = np.random.default_rng(0)
    q, k, v, do = (
        jnp.asarray(rng.normal(size=(1, args.tokens, heads, args.head_dim)), jnp.bfloat16)
        for heads in (args.heads, args.kv_heads, args.kv_heads, args.heads)
    )
    causal = functools.partial(bj.reference.attention, mask=bj.Mask.causal())
    truth = with_gradients(causal, *(x.astype(jnp.float64) for x in (q, k, v, do)))
    plain = functools.partial(jax.nn.dot_product_attention, is_causal=True)
    baseline = errors(with_gradients(plain, q, k, v, do), truth)
    print("plain bfloat16, one device: " + ", ".join(map("{} {:.2e}".format, NAMES, baseline)))
    for name, plan in PLANS.items():
        print(f"\n{name}\n  R " + "".join(f"{x:>8}" for x in NAMES))
        for R in range(1, args.devices + 1):
            found = sharded(plan, R, [np.asarray(x) for x in (q, k, v, do)])
            ratios = errors(found, truth) / baseline
            print(f"{R:>3} " + "".join(f"{x:8.3f}" for x in ratios), flush=True)
            yield name, R, ratios


def draw(rows: list[tuple[str, int, np.ndarray]], path: Path) -> None:
    """One panel a result, one line a plan."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 4, figsize=(12, 3.2), sharey=True, layout="constrained")
    top = 1.1 * max(ratios.max() for _, _, ratios in rows)
    for i, (panel, name) in enumerate(zip(panels, NAMES, strict=True)):
        for plan in PLANS:
            points = [(R, ratios[i]) for label, R, ratios in rows if label == plan]
            style = "--" if "bfloat16" in plan else "-"
            color = "tab:blue" if plan.startswith("queries") else "tab:orange"
            panel.plot(*zip(*points, strict=True), style, marker=".", color=color, label=plan)
        panel.axhline(1.0, color="gray", linewidth=0.8)
        panel.set(title=name, xlabel="devices R", ylim=(0, top))
    panels[0].set_ylabel("error / error of plain\nbfloat16 attention")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=90)
    plt.close(figure)
    print(f"\n{path} ({path.stat().st_size / 1000:.0f} kB)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=1680, help="a multiple of 2 R for R = 1..8")
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument("--png", type=Path, default=PNG)
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", args.devices)
    jax.config.update("jax_enable_x64", True)
    draw(list(measure(args)), args.png)


if __name__ == "__main__":
    main()
