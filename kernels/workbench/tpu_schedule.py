"""Reads what the TPU compiler writes about a kernel: its schedule, bundle by bundle, and its VMEM.

A TPU core issues one VLIW bundle a cycle. With `--xla_jf_dump_to` the compiler writes, for each
kernel, how many slots of each unit every bundle uses, and the bundles themselves with the regions
(loops, branches) they belong to; for the whole program, how much VMEM each kernel was given. Plain
text for people, with no promise to stay as it is: what is not understood raises `UnknownFormat`,
and `tests/test_tpu_workbench.py` shows what is understood.
"""

import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

UTILIZATION = "final_hlo-static-per-bundle-utilization.txt"
BUNDLES = "final_bundles.txt"
VMEM_REPORT = "vmem_report.html"


class UnknownFormat(ValueError):
    """The compiler wrote something else than what this file can read."""


class Slots(NamedTuple):
    """One bundle: how many slots of three kinds it uses."""

    matmul: int
    spill: int
    fill: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Region:
    """Straight code between branches that has matrix products in it: the body of one kind of tile.

    Attributes:
        depth: how many loops are around it.
        bundles: from its first to its last, prologue and epilogue of the pipeline included.
        matmul_slots, spill_stores, fill_loads: slots used in it.
    """

    depth: int
    bundles: int
    matmul_slots: int
    spill_stores: int
    fill_loads: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kernel:
    """One kernel's static schedule.

    Attributes:
        name: the compiler's name of it.
        mxu_percent: of the matrix unit's slots between the first product and the last, those used.
        bundles: in that span, about cycles where it runs once a grid step.
        total_bundles: in the whole kernel.
        step_bundles: of the grid's loop, outside all regions with products and outside branches
            that a step may skip: what every step costs beside its tile.
        matmul_slots, spill_stores, fill_loads: in that span.
        vmem_bytes: all the compiler gave the kernel (windows, scratch, spills); None: not written.
        regions: the span by parts, where branches cut it; the one part of a kernel with one kind of
            tile.
    """

    name: str
    mxu_percent: float
    bundles: int
    total_bundles: int
    step_bundles: int
    matmul_slots: int
    spill_stores: int
    fill_loads: int
    vmem_bytes: int | None
    regions: tuple[Region, ...]


class _Bundle(NamedTuple):
    depth: int
    region: int | None  # the innermost
    starts: tuple[int, ...]  # regions that begin here, empty ones among them
    skip_to: int | None  # region at which it goes on if the branch in it is taken


def read_kernels(dump: Path) -> list[Kernel]:
    """All kernels with a matrix product in them, in the order of compilation.

    Raises:
        UnknownFormat: a file that cannot be read.
    """
    vmem = _vmem_bytes(dump)
    kernels = []
    for path in sorted(dump.glob(f"*{UTILIZATION}")):
        capacity, slots = read_utilization(path.read_text())
        if not any(s.matmul for s in slots):
            continue
        # 1795564010623333023-NAME.1-70-final_hlo-...: a time, the kernel, the number of the pass.
        found = re.fullmatch(r"\d+-(.+?)-\d+-final_hlo-.*", path.name)
        if found is None:
            raise UnknownFormat(f"no kernel's name in {path.name}")
        beside = path.name.partition(found.group(1))[0] + found.group(1)
        (text,) = (p for p in dump.glob(f"*{BUNDLES}") if _is_beside(p.name, beside))
        bundles = read_bundles(text.read_text())
        kernels.append(summarize(found.group(1), capacity, slots, bundles, vmem))
    return kernels


def _is_beside(name: str, prefix: str) -> bool:
    return re.fullmatch(re.escape(prefix) + r"-\d+-" + re.escape(BUNDLES), name) is not None


def read_utilization(text: str) -> tuple[int, list[Slots]]:
    """Matrix slots that a bundle has, and what each bundle uses."""
    names, rows = None, []
    for line in text.splitlines():
        if "VALU" in line:
            names = [name.strip() for name in line.split(",")]
        elif re.fullmatch(r"\s*\d+(\s+\d+)*\s*", line):
            rows.append([int(n) for n in line.split()])
    if names is None or len(rows) < 2 or any(len(row) != len(names) for row in rows):
        raise UnknownFormat("a table of units, their capacity and their use by bundle was expected")
    # Where pushes of weights have no column of their own, "MXU" counts them with the products.
    wanted = ("MATMUL" if "MATMUL" in names else "MXU", "VSTORE:SPILL", "VLOAD:FILL")
    if not set(wanted) <= set(names):
        raise UnknownFormat(f"{wanted} are not all among the units {names}")
    columns = [names.index(name) for name in wanted]
    slots = [Slots(*(row[i] for i in columns)) for row in rows]
    return slots[0].matmul, slots[1:]


def read_bundles(text: str) -> list[_Bundle]:
    """For each bundle its loops, its region, and where a forward branch in it leads."""
    bundles: list[_Bundle] = []
    depth, open_regions = 0, []
    for line in text.splitlines():
        # `0x1b LB: >> { ... }`: as many > as loops; comments in it may take more lines.
        if found := re.match(r"\s*(?:0x)?[0-9a-f]+\s+(?:[A-Z]{2})?\s*:\s*(>*)\s*\{", line):
            depth = len(found.group(1))
            bundles.append(_Bundle(depth, None, (), None))
        if not bundles:
            continue
        marks = [
            (what, int(number))
            for what, number in re.findall(r"(Start/End empty|Start|End) region (\d+)", line)
        ]
        open_regions += [number for what, number in marks if what == "Start"]
        branch = re.search(r"sbr\.rel \([^)]*\) target = \$region(\d+)", line)
        bundle = bundles[-1]
        bundles[-1] = bundle._replace(
            region=open_regions[-1] if open_regions else None,
            starts=bundle.starts + tuple(number for what, number in marks if what != "End"),
            skip_to=int(branch.group(1)) if branch else bundle.skip_to,
        )
        ended = {number for what, number in marks if what == "End"}
        open_regions = [number for number in open_regions if number not in ended]
    return bundles


def summarize(
    name: str,
    capacity: int,
    slots: list[Slots],
    bundles: list[_Bundle],
    vmem: dict[str, int],
) -> Kernel:
    """What `Kernel` says, from both texts about a kernel."""
    if len(slots) != len(bundles):
        raise UnknownFormat(
            f"{name}: {len(slots)} bundles in one file, {len(bundles)} in the other"
        )
    active = [i for i, s in enumerate(slots) if s.matmul]
    first, last = active[0], active[-1] + 1
    matmul, spill, fill = (sum(column) for column in zip(*slots[first:last], strict=True))
    return Kernel(
        name=name,
        mxu_percent=round(100 * matmul / (capacity * (last - first)), 1),
        bundles=last - first,
        total_bundles=len(slots),
        step_bundles=_step_bundles(slots, bundles),
        matmul_slots=matmul,
        spill_stores=spill,
        fill_loads=fill,
        vmem_bytes=vmem.get(name),
        regions=tuple(_regions(slots, bundles)),
    )


def _regions(slots: list[Slots], bundles: list[_Bundle]) -> Iterator[Region]:
    """Regions with products, in order. The few products of a mere copy or transpose count too."""
    by_region: dict[int | None, list[int]] = {}
    for i, bundle in enumerate(bundles):
        by_region.setdefault(bundle.region, []).append(i)
    for here in by_region.values():
        matmul, spill, fill = (sum(c) for c in zip(*(slots[i] for i in here), strict=True))
        if matmul:
            yield Region(
                depth=bundles[here[0]].depth,
                bundles=len(here),
                matmul_slots=matmul,
                spill_stores=spill,
                fill_loads=fill,
            )


def _step_bundles(slots: list[Slots], bundles: list[_Bundle]) -> int:
    """Bundles of the grid's loop that no step can skip, without those that compute tiles."""
    active = [i for i, s in enumerate(slots) if s.matmul]
    busy = {bundles[i].region for i in active}
    starts = {region: i for i, bundle in enumerate(bundles) for region in bundle.starts}
    skippable = set(range(active[0], active[-1] + 1))
    for i, bundle in enumerate(bundles):
        target = i if bundle.skip_to is None else starts.get(bundle.skip_to, i)
        if target > i and not i < active[0] < target:  # what leads to the products is no detour
            skippable.update(range(i + 1, target))
    return sum(
        b.depth >= 1 and b.region not in busy and i not in skippable for i, b in enumerate(bundles)
    )


def _vmem_bytes(dump: Path) -> dict[str, int]:
    """Bytes of VMEM by kernel, from the data inside the compiler's report; {} without one."""
    found: dict[str, int] = {}
    for path in dump.glob(f"*{VMEM_REPORT}"):
        before, _, text = path.read_text().partition("const DATA =")
        if not text:
            raise UnknownFormat(f"no data in {path.name}, which begins with {before[:40]!r}")
        data, _ = json.JSONDecoder().raw_decode(text.lstrip())
        for name, breakdown in data["hlo_breakdowns"].items():
            scoped = [b["block_size"] for b in breakdown["blocks"] if b["block_type"] == "SCOPED"]
            found[name] = max(found.get(name, 0), sum(scoped))
    return found
