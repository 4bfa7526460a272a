"""The demo's picture: losses of the two runs, and what each strategy sends and holds."""

import io

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from burst_jax.demo.comparison import Table
from burst_jax.demo.training import Losses
from burst_jax.demo.verdict import LOSS_TARGET

ACCENT, GREY, INK = "#c2410c", "#b8b4ad", "#292524"
MIB = 2**20


def draw(losses: Losses, tables: list[Table], *, num_devices: int) -> bytes:
    """The picture as PNG."""
    figure = Figure(figsize=(12, 4.4), dpi=150, layout="constrained")
    curves, *bars = figure.subplots(1, 1 + len(tables), width_ratios=[1.25, *[1] * len(tables)])
    _draw_losses(curves, losses, num_devices)
    widest = max(row.sent_bytes for table in tables for row in table.rows) / MIB
    for axes, table in zip(bars, tables, strict=True):
        _draw_bytes(axes, table, widest)
    for axes in (curves, *bars):
        axes.spines[["top", "right"]].set_visible(False)
    png = io.BytesIO()
    figure.savefig(png, format="png")
    return png.getvalue()


def _draw_losses(axes: Axes, losses: Losses, num_devices: int) -> None:
    steps = range(1, len(losses.spread) + 1)
    axes.plot(steps, losses.spread, color=ACCENT, linewidth=2, label=f"{num_devices} devices")
    axes.plot(
        steps, losses.alone, linestyle="none", marker="o", markersize=3.5, markerfacecolor="none",
        markeredgecolor=INK, markeredgewidth=0.7, label="1 device",
    )  # fmt: skip
    axes.axhline(LOSS_TARGET, color=GREY, linewidth=1, linestyle="--")
    axes.annotate(f"{LOSS_TARGET}", (1, LOSS_TARGET), color=INK, fontsize=8, va="bottom", ha="left")
    axes.set(xlabel="step", ylabel="loss, nats/byte")
    axes.set_title(
        f"Same losses on {num_devices} devices and on 1\n"
        f"(largest difference {losses.largest_difference:.0e})",
        fontsize=10, loc="left",
    )  # fmt: skip
    axes.legend(frameon=False)


def _draw_bytes(axes: Axes, table: Table, widest: float) -> None:
    """Bars of what a device sends; the library's choice in colour."""
    rows = table.rows[::-1]
    sent = [row.sent_bytes / MIB for row in rows]
    colors = [ACCENT if row.chosen else GREY for row in rows]
    bars = axes.barh([row.name for row in rows], sent, color=colors, height=0.6)
    labels = [
        f"{count:.1f} MiB{' (chosen)' if row.chosen else ''}"
        for count, row in zip(sent, rows, strict=True)
    ]
    axes.bar_label(bars, labels, padding=3, fontsize=8)
    axes.set_xlim(0, widest * 1.45)
    axes.tick_params(axis="y", length=0, labelsize=8)
    axes.set_xlabel("MiB sent by a device")
    axes.set_title(f"Attention, forward and backward\n{table.shape.name}", fontsize=10, loc="left")
