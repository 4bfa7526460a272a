"""Reads the machine code of a Hopper kernel: what a loop around tensor-core products does beside.

Text of `nvdisasm -c`, for people, with no promise to stay as it is; `tests/test_gpu_workbench.py`
shows what is understood. A kernel's products (HGMMA) are asynchronous: groups of them are closed by
`gsb0`, and WARPGROUP.DEPBAR waits until no more than so many groups are under way.
"""

import collections
import dataclasses
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

# Multiply-adds of 16-bit numbers that the tensor cores of one SM of sm_90 do a cycle.
_RATE = 2048
_ROWS, _DEPTH = 64, 16  # of one HGMMA
_LINE = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?([A-Z][A-Z0-9_.x]+)\s*([^;]*);")
_LABEL = re.compile(r"(\.L_x?_?\w+):")
_REGISTER = re.compile(r"\bR(\d+)")
# By the beginning of an instruction's name; the first that fits.
KINDS = {
    "HGMMA": "products",
    "MUFU": "exp2",
    "FFMA": "fma",
    "FMUL": "mul",
    "FADD": "add",
    "FMNMX": "max",
    "F2F": "convert",
    **dict.fromkeys(("FSEL", "SEL", "ISETP", "FSETP", "PRMT", "FCHK"), "select"),
    "SHFL": "shuffle",
    **dict.fromkeys(("LDS", "STS"), "shared"),
    **dict.fromkeys(("LDL", "STL"), "spill"),
    **dict.fromkeys(("LDG", "STG", "LD.", "ST.", "UTMA", "LDC"), "global"),
    **dict.fromkeys(
        ("SYNCS", "BAR", "WARP", "DEPBAR", "MEMBAR", "FENCE", "BRA", "BSYNC", "BSSY", "NANOSLEEP"),
        "sync",
    ),
}
_ADDRESS = "address"
# They write no register: their first operand is a source, a predicate or a uniform register.
_NO_RESULT = re.compile(
    r"ST|RED|UTMA|SYNCS|BAR|BRA|WARP|DEPBAR|NANO|USETMAX|EXIT|.?SETP|R2UR|PLOP|NOP|CCTL|FENCE|MEMBAR"
)


class Instruction(NamedTuple):
    """One instruction: its name with modifiers, its operands, and what it is predicated on."""

    name: str
    operands: str
    predicate: str

    @property
    def kind(self) -> str:
        """One of the values of `KINDS`, or address arithmetic."""
        return next((k for start, k in KINDS.items() if self.name.startswith(start)), _ADDRESS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loop:
    """An innermost loop with products in it, as one warp goes through it.

    Attributes:
        products: HGMMA instructions.
        tensor_cycles: that the SM's tensor cores need for them.
        instructions: in all, one issue slot each; a warpgroup has a warp on each scheduler.
        kinds: how many of each kind.
        exp2_under: exponentials that are computed while products are under way.
        masked: whether there are comparisons for most of the scores.
    """

    products: int
    tensor_cycles: int
    instructions: int
    kinds: dict[str, int]
    exp2_under: int
    masked: bool


def parse(text: str) -> list[Instruction | str]:
    """Instructions and labels, in order."""
    found: list[Instruction | str] = []
    for line in text.splitlines():
        if (label := _LABEL.match(line.strip())) is not None:
            found.append(label.group(1))
        elif (m := _LINE.search(line)) is not None:
            found.append(Instruction(m.group(2), m.group(3).strip(), (m.group(1) or "").strip()))
    return found


def bodies(code: list[Instruction | str]) -> list[list[Instruction]]:
    """Innermost loops with products, from their head to the branch back."""
    at = {x: i for i, x in enumerate(code) if isinstance(x, str)}
    spans = []
    # Behind the last exit there are waits that were moved out of loops, and their ways back.
    exits = [i for i, x in enumerate(code) if isinstance(x, Instruction) and x.name == "EXIT"]
    for i, x in enumerate(code[: exits[-1] if exits else None]):
        if isinstance(x, str) or not x.name.startswith("BRA"):
            continue
        target = re.search(r"\.L_x?_?\w+", x.operands)
        start = at.get(target.group(0), i) if target else i
        body = [y for y in code[start : i + 1] if isinstance(y, Instruction)]
        if start < i and any(y.kind == "products" for y in body):
            spans.append((start, i, body))
    return [
        body
        for start, end, body in spans
        if not any(start <= a and b <= end and (a, b) != (start, end) for a, b, _ in spans)
    ]


def loops(code: list[Instruction | str]) -> list[Loop]:
    """What each of `bodies` does."""
    return [_loop(body) for body in bodies(code)]


def _loop(body: list[Instruction]) -> Loop:
    kinds = collections.Counter(x.kind for x in body)
    # Twice round, so that what is under way at the loop's end is so at its head.
    under = sum(
        bool(flight) and x.kind == "exp2" for x, flight in list(_flights(body * 2))[len(body) :]
    )
    comparisons = sum(x.name.startswith(("ISETP", "FSETP")) for x in body)
    return Loop(
        products=kinds["products"],
        tensor_cycles=sum(_cycles(x) for x in body if x.kind == "products"),
        instructions=len(body),
        kinds=dict(kinds),
        exp2_under=under,
        masked=comparisons >= 32,
    )


def _cycles(product: Instruction) -> int:
    return _ROWS * _columns(product) * _DEPTH // _RATE


def _columns(product: Instruction) -> int:
    found = re.search(r"64x(\d+)x16", product.name)
    assert found, f"an HGMMA of another form: {product}"
    return int(found.group(1))


class Flight(NamedTuple):
    """Registers of a product under way: sums that it adds to, and those that it reads."""

    sums: frozenset[int]
    read: frozenset[int]


def hazards(code: list[Instruction | str]) -> list[str]:
    """Registers of products under way that something else touches: there should be none."""
    found = []
    for body in ([x for x in code if isinstance(x, Instruction)], *(b * 2 for b in bodies(code))):
        for x, flight in _flights(body):
            writes, reads = _registers(x)
            for one in flight:
                if x.kind == "products":
                    own = _flight(x)
                    wrong = (own.read & one.sums) | (own.sums & one.read)
                else:
                    wrong = (writes & (one.sums | one.read)) | (reads & one.sums)
                if wrong:
                    found.append(f"{x.name} {x.operands}: R{min(wrong)} is in flight")
    return found


def _flights(body: Iterable[Instruction]) -> Iterator[tuple[Instruction, list[Flight]]]:
    """Each instruction with the products that are under way before it."""
    groups: list[list[Flight]] = []
    last: list[Flight] = []  # the group that is not closed yet
    for x in body:
        yield x, [one for group in (*groups, last) for one in group]
        if x.kind == "products":
            last.append(_flight(x))
            if "gsb0" in x.operands:
                groups, last = [*groups, last], []
        elif x.name.startswith("WARPGROUP.DEPBAR"):
            left = int(x.operands.rsplit(",", 1)[-1].strip(), 16)
            groups = groups[len(groups) - left :] if left else []


def _flight(product: Instruction) -> Flight:
    sums, first, *_ = product.operands.split(",")
    number = re.fullmatch(r"R(\d+)", first.strip())
    read = _some(int(number.group(1)), 4) if number else frozenset()
    start = _REGISTER.search(sums)
    assert start, f"an HGMMA of another form: {product}"
    return Flight(_some(int(start.group(1)), _columns(product) // 2), read)


def _registers(x: Instruction) -> tuple[frozenset[int], frozenset[int]]:
    """What an instruction writes and reads, wide accesses included."""
    width = 4 if ".128" in x.name else 2 if ".64" in x.name or ".WIDE" in x.name else 1
    if x.name == "CS2R":
        width = 2
    operands = re.split(r",(?![^\[]*\])", x.operands)
    stores = _NO_RESULT.match(x.name) is not None
    writes: frozenset[int] = frozenset()
    if not stores and (m := _REGISTER.search(operands[0])) is not None:
        writes = _some(int(m.group(1)), width)
    reads: set[int] = set()
    for operand in operands if stores else operands[1:]:
        for m in _REGISTER.finditer(operand):
            address = "[" in operand
            several = 2 if address and ".64" in operand else width if stores and not address else 1
            reads |= _some(int(m.group(1)), several)
    return writes, frozenset(reads)


def _some(first: int, number: int) -> frozenset[int]:
    return frozenset(range(first, first + number))
