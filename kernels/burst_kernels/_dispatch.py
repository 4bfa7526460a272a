"""Which backend computes a tile: the first that can, with every reason of those that cannot."""

from collections.abc import Callable
from typing import NamedTuple

from burst_kernels import xla


class Backend(NamedTuple):
    """A pair of tile functions that keep the contract of `burst_kernels._tile`.

    Attributes:
        forward, backward: see the tile contract.
        unavailable: why this machine cannot run it, or None.
    """

    forward: Callable[..., tuple]
    backward: Callable[..., tuple]
    unavailable: Callable[[], str | None]


# In order of preference. The chip kernels come before `xla`, which runs anywhere.
BACKENDS: dict[str, Backend] = {
    "xla": Backend(xla.tile_forward, xla.tile_backward, lambda: None),
}


def unavailable_reasons() -> dict[str, str | None]:
    """For each backend why it cannot run on this machine; None where it can."""
    return {name: backend.unavailable() for name, backend in BACKENDS.items()}


def select(implementation: str | None = None) -> str:
    """The name of the backend to use.

    Args:
        implementation: a name, used or refused; None takes the first that can run here.

    Raises:
        ValueError: no such backend, or it cannot run here, with the reason.
    """
    reasons = unavailable_reasons()
    if implementation is None:
        return next(name for name, reason in reasons.items() if reason is None)
    if implementation not in BACKENDS:
        raise ValueError(
            f"implementation={implementation!r} does not exist; choose one of "
            f"{', '.join(map(repr, BACKENDS))}, or None to let the library choose."
        )
    if (reason := reasons[implementation]) is not None:
        usable = ", ".join(repr(name) for name, r in reasons.items() if r is None)
        raise ValueError(
            f"implementation={implementation!r} cannot run here: {reason} Usable: {usable}."
        )
    return implementation
