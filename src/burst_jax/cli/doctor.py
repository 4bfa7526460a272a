"""`burst-jax doctor`: what this machine has, what can run on it, and how to lay a mesh over it."""

import dataclasses
import importlib.metadata
import platform
from collections.abc import Iterator, Sequence

import jax
from rich import box
from rich.console import Console
from rich.table import Table

import burst_jax as bj
import burst_kernels
from burst_jax.cli.devices import Devices
from burst_jax.cli.options import parse
from burst_jax.lm.console import for_people, say

_PACKAGES = ("jax", "jaxlib", "numpy", "flax", "optax", "rich", "tyro", "matplotlib", "libtpu")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DoctorConfig:
    """Says what this machine can run: versions, devices, tile backends, a mesh to begin with."""


def run(arguments: Sequence[str]) -> int:
    """Prints the findings; returns 0 if attention can run here, 1 if not."""
    parse(DoctorConfig, arguments, command="doctor")
    console = Console()
    console.print(_versions())
    try:
        devices = jax.devices()
    except RuntimeError as error:
        say(console, f"JAX finds no device to run on: {error}")
        return 1
    reasons = burst_kernels.unavailable_reasons()
    console.print(_device_table(devices))
    console.print(_backend_table(reasons))
    for line in suggest_mesh(len(devices), jax.process_count(), devices[0].platform):
        say(console, line)
    usable = [name for name, reason in reasons.items() if reason is None]
    if not usable:
        say(console, "\nNo tile backend can run here.")
        return 1
    say(console, f"\nAttention runs here, with the {usable[0]!r} tiles.")
    return 0


def suggest_mesh(num_devices: int, num_processes: int, platform: str) -> Iterator[str]:
    """Lines that say how to lay the sequence over these devices."""
    if num_devices == 1:
        yield "One device: the sequence cannot be spread. To try it out, simulate devices:"
        yield "    burst-jax train --data PATH --devices 8"
        yield "or, before anything else uses JAX (with an accelerator, under JAX_PLATFORMS=cpu):"
        yield '    jax.config.update("jax_num_cpu_devices", 8)'
        yield '    mesh = jax.make_mesh((8,), ("sp",))'
        return
    local = num_devices // num_processes
    if num_processes == 1 or local == 1:
        yield f"Mesh for one sequence over all {num_devices} {platform} devices:"
        yield f'    mesh = jax.make_mesh(({num_devices},), ("sp",))'
        yield '    where = bj.SequenceSharding(mesh, "sp", layout="zigzag", length=T)'
        return
    yield f"{num_processes} processes with {local} {platform} devices each. The ring is fastest"
    yield "inside one host, so give each host sequences of its own:"
    yield f'    mesh = jax.make_mesh(({num_processes}, {local}), ("data", "sp"))'
    yield "    where = bj.SequenceSharding("
    yield '        mesh, "sp", batch_axis="data", layout="zigzag", length=T)'
    yield "A sequence that is too long for one host goes over all of them:"
    yield '    where = bj.SequenceSharding(mesh, ("data", "sp"), layout="zigzag", length=T)'


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _versions() -> Table:
    table = _table("Versions", "package", "version")
    table.add_row("burst_jax", bj.__version__)
    table.add_row("python", f"{platform.python_version()} ({platform.system()})")
    for name in _PACKAGES:
        try:
            table.add_row(name, importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            table.add_row(name, "not installed")
    return table


def _device_table(devices: Devices) -> Table:
    table = _table("Devices", "platform", "kind", "count", "memory each", "processes")
    for kind in sorted({device.device_kind for device in devices}):
        same = [device for device in devices if device.device_kind == kind]
        stats = next(d for d in same if d.process_index == jax.process_index()).memory_stats()
        limit = (stats or {}).get("bytes_limit")
        table.add_row(
            same[0].platform,
            kind,
            str(len(same)),
            for_people(limit) if limit else "not said",
            str(len({device.process_index for device in same})),
        )
    return table


def _backend_table(reasons: dict[str, str | None]) -> Table:
    table = _table("Tile backends", "backend", "runs here", "why not")
    for name, reason in reasons.items():
        table.add_row(name, "no" if reason else "yes", reason or "")
    return table
