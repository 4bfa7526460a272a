"""Talking to a person: on a terminal with what moves, in a log with whole plain lines."""

import contextlib
import math
from collections.abc import Iterator

from rich.console import Console


def for_people(count: float) -> str:
    """Bytes in binary units: 1536 -> '1.5 KiB'."""
    units = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
    power = min(int(math.log(count, 1024)), len(units) - 1) if count >= 1 else 0
    return f"{count / 1024**power:.3g} {units[power]}" if power else f"{count:.0f} B"


@contextlib.contextmanager
def working(console: Console, text: str) -> Iterator[None]:
    """Says what is being done while the body does it."""
    if not console.is_terminal:
        say(console, f"{text} ...")
        yield
        return
    with console.status(text):
        yield


def say(console: Console, text: str) -> None:
    """One line, whole: not cut at a width that a log does not have, nothing in it coloured."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)
