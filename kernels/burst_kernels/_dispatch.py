"""Which backend computes a tile: the first that can, with every reason of those that cannot."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

from burst_kernels import xla
from burst_kernels._chips import Chip, chip_at_hand, chip_named
from burst_kernels._config import TileConfig
from burst_kernels._problem import Problem


class Backend(NamedTuple):
    """A pair of tile functions that keep the contract of `burst_kernels._tile`.

    Attributes:
        forward, backward: see the tile contract.
        unavailable: (chip) -> why that chip cannot run it, in a sentence, or None.
        refuses: (problem, chip's name) -> why it cannot compute such tiles, or None.
        configure: (problem, chip's name, config) -> the config with its open fields filled in;
            ValueError where what is given does not fit.
        interpreted: whether `TileConfig(interpret=True)` runs it on a CPU.
    """

    forward: Callable[..., tuple]
    backward: Callable[..., tuple]
    unavailable: Callable[[Chip], str | None]
    refuses: Callable[[Problem, str], str | None]
    configure: Callable[[Problem, str, TileConfig], TileConfig]
    interpreted: bool = False


class Chosen(NamedTuple):
    """The backend for a call, and how it cuts its tiles. Hashable.

    Attributes:
        name: in `BACKENDS`.
        config: with no field left open that the backend asks for.
    """

    name: str
    config: TileConfig


# In order of preference. The chip kernels come before `xla`, which runs anywhere.
BACKENDS: dict[str, Backend] = {
    "xla": Backend(
        forward=xla.tile_forward,
        backward=xla.tile_backward,
        unavailable=lambda chip: None,
        refuses=lambda problem, chip: None,
        configure=lambda problem, chip, config: config,
    ),
}


def unavailable_reasons(chip: Chip | None = None) -> dict[str, str | None]:
    """For each backend why a chip cannot run it; None where it can.

    Args:
        chip: None: that of JAX's default device.
    """
    chip = chip or chip_at_hand()
    return {name: backend.unavailable(chip) for name, backend in BACKENDS.items()}


def select(
    problem: Problem,
    chip: Chip,
    implementation: str | None = None,
    config: TileConfig | None = None,
) -> Chosen:
    """The backend that computes a call's tiles.

    Args:
        problem: the sizes.
        chip: what the mesh is made of; `config.chip` overrides it.
        implementation: a backend's name, used or refused; None takes the first that can.
        config: block sizes and the like; None leaves all to the backend.

    Raises:
        ValueError: no such backend, or it cannot compute this here, with the reason; or block
            sizes that do not fit.
    """
    config = config or TileConfig()
    chip = chip if config.chip is None else chip_named(config.chip)
    if implementation is not None and implementation not in BACKENDS:
        raise ValueError(
            f"implementation={implementation!r} does not exist; choose one of "
            f"{', '.join(map(repr, BACKENDS))}, or None to let the library choose."
        )
    reasons = {name: _why_not(backend, problem, chip, config) for name, backend in BACKENDS.items()}
    usable = [name for name, reason in reasons.items() if reason is None]
    if implementation is not None and reasons[implementation] is not None:
        raise ValueError(
            f"implementation={implementation!r} cannot compute this on {chip.name!r}: "
            f"{reasons[implementation]} Usable: {', '.join(map(repr, usable)) or 'none'}."
        )
    if not usable:
        listed = " ".join(f"{name}: {reason}" for name, reason in reasons.items())
        raise ValueError(f"no tile backend can compute this on {chip.name!r}. {listed}")
    name = implementation or usable[0]
    config = dataclasses.replace(config, chip=chip.name)
    return Chosen(name, BACKENDS[name].configure(problem, chip.name, config))


def _why_not(backend: Backend, problem: Problem, chip: Chip, config: TileConfig) -> str | None:
    if config.interpret and not backend.interpreted:
        return "it is no chip's kernel, so TileConfig(interpret=True) means nothing to it."
    if not config.interpret and (reason := backend.unavailable(chip)) is not None:
        return reason
    return backend.refuses(problem, chip.name)
