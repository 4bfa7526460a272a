"""Which backend computes a tile: the first that can, with every reason of those that cannot."""

import dataclasses
import functools
import importlib
from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

from burst_kernels._chips import CHIPS, Chip, chip_at_hand, chip_named
from burst_kernels._config import TileConfig
from burst_kernels._problem import Problem

# The TPU generations that the kernels are compiled for (tests marked `aot`).
TPUS = ("v4", "v5e", "v5p", "v6e", "tpu7x")


@dataclasses.dataclass(frozen=True)
class Backend:
    """A pair of tile functions that keep the contract of `burst_kernels._tile`.

    Its module is imported when it is first used: Pallas takes longer to import than all of
    burst_jax.

    Attributes:
        module: has `tile_forward` and `tile_backward`, see the tile contract; `refuses(problem,
            chip's name)`, a sentence why it cannot compute such tiles, or None; and
            `configure(problem, chip's name, config)`, the config with its open fields filled in,
            or a ValueError where what is given does not fit.
        unavailable: (chip) -> why that chip cannot run it, in a sentence, or None.
        fields: of `TileConfig` that mean something to it, besides `chip` and `interpret`.
        interpreted: whether `TileConfig(interpret=True)` runs it on a CPU.
        stacked: whether it takes k and v in one array, see the tile contract.
    """

    module: str
    unavailable: Callable[[Chip], str | None]
    fields: tuple[str, ...]
    interpreted: bool = False
    stacked: bool = False

    def load(self) -> ModuleType:
        """The module."""
        return importlib.import_module(self.module)

    @property
    def forward(self) -> Callable[..., tuple]:
        """Its `tile_forward`."""
        return self.load().tile_forward

    @property
    def backward(self) -> Callable[..., tuple]:
        """Its `tile_backward`."""
        return self.load().tile_backward


class Chosen(NamedTuple):
    """The backend for a call, and how it cuts its tiles. Hashable.

    Attributes:
        name: in `BACKENDS`.
        config: with no field left open that the backend asks for.
    """

    name: str
    config: TileConfig


def _no_tpu(chip: Chip) -> str | None:
    if chip.platform != "tpu":
        return f"it is for TPUs, and {chip.name} is none."
    if chip.name not in TPUS:
        return f"it knows the TPUs {', '.join(TPUS)}, and {chip.name} is another."
    return None


def _no_hopper(chip: Chip) -> str | None:
    if chip.platform != "gpu":
        return f"it is for NVIDIA Hopper GPUs, and {chip.name} is none."
    return importlib.import_module("burst_kernels.mosaic_gpu").unavailable(chip.name)


# In order of preference. The chip kernels come before `xla`, which runs anywhere.
BACKENDS: dict[str, Backend] = {
    "mosaic_tpu": Backend(
        "burst_kernels.mosaic_tpu",
        _no_tpu,
        (
            "block_q",
            "block_kv",
            "block_compute",
            "block_compute_q",
            "block_q_backward",
            "block_kv_backward",
            "block_compute_backward",
            "fused_backward",
        ),
        interpreted=True,
    ),
    "mosaic_gpu": Backend(
        "burst_kernels.mosaic_gpu",
        _no_hopper,
        (
            "block_q",
            "block_kv",
            "stages",
            "block_q_backward",
            "block_kv_backward",
            "stages_backward",
        ),
        stacked=True,
    ),
    "triton": Backend(
        "burst_kernels.triton",
        lambda chip: importlib.import_module("burst_kernels.triton").unavailable(chip.name),
        ("block_q", "block_kv", "block_q_backward", "block_kv_backward", "stages", "warps"),
        interpreted=True,
        stacked=True,
    ),
    "xla": Backend("burst_kernels.xla", lambda chip: None, ("block_q", "block_kv", "kv_heads")),
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
    known = isinstance(implementation, str) and implementation in BACKENDS
    if implementation is not None and not known:
        raise ValueError(
            f"implementation={implementation!r} does not exist; choose one of "
            f"{', '.join(map(repr, BACKENDS))}, or None to let the library choose."
        )
    return _chosen(problem, chip, implementation, config or TileConfig())


@functools.lru_cache(maxsize=1024)  # a model asks the same of every layer, and of every step
def _chosen(problem: Problem, chip: Chip, implementation: str | None, config: TileConfig) -> Chosen:
    chip = _chip(chip, config)
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
    _check_fields(name, config)
    if chip.name in CHIPS:
        config = dataclasses.replace(config, chip=chip.name)
    return Chosen(name, BACKENDS[name].load().configure(problem, chip.name, config))


def _chip(here: Chip, config: TileConfig) -> Chip:
    """The chip whose kernel is wanted: another one than is here only to interpret it."""
    if config.chip is None:
        return here
    chip = chip_named(config.chip)
    if not config.interpret and chip.platform != here.platform:
        raise ValueError(
            f"TileConfig(chip={chip.name!r}), but the mesh is made of {here.name!r}. Leave `chip` "
            "out, or give interpret=True to run that chip's kernel by the interpreter."
        )
    return chip


def _check_fields(name: str, config: TileConfig) -> None:
    known = (*BACKENDS[name].fields, "chip", "interpret")
    for field in dataclasses.fields(config):
        if field.name not in known and getattr(config, field.name) is not None:
            raise ValueError(
                f"TileConfig.{field.name} means nothing to the {name!r} tiles, which would compute "
                f"this; they take {', '.join(BACKENDS[name].fields)}. Leave it out, or name "
                "another implementation."
            )


def _why_not(backend: Backend, problem: Problem, chip: Chip, config: TileConfig) -> str | None:
    if config.interpret and not backend.interpreted:
        return "it is no chip's kernel, so TileConfig(interpret=True) means nothing to it."
    if (reason := backend.unavailable(chip)) is not None:
        if config.interpret:
            reason += " TileConfig(interpret=True, chip=...) names the chip whose kernel to run."
        return reason
    return backend.load().refuses(problem, chip.name)
