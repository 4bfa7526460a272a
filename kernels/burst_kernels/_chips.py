"""`Chip`: which generation of hardware a tile is compiled for, as far as kernels differ by it."""

import dataclasses
import re
from typing import Literal

import jax

Platform = Literal["cpu", "gpu", "tpu"]


@dataclasses.dataclass(frozen=True)
class Chip:
    """What a tile runs on.

    Attributes:
        name: a TPU generation ("v4", "v5e", "v5p", "v6e", "tpu7x"), an NVIDIA compute capability
            ("sm_90"), "cpu"; the device's own name where it is none that is known.
        platform: what JAX calls the kind of device.
    """

    name: str
    platform: Platform


# TPUs by JAX's device_kind.
_TPU = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e", "TPU v5e": "v5e",
    "TPU v5": "v5p", "TPU v5p": "v5p",
    "TPU v6 lite": "v6e", "TPU v6e": "v6e",
    "TPU7x": "tpu7x", "TPU v7x": "tpu7x",
}  # fmt: skip

# NVIDIA GPUs by the name that JAX gives as device_kind: for a mesh known only by that name, as
# inside a shard_map. Compute capabilities after NVIDIA's table of CUDA GPUs.
_GPU = (
    (r"Ada\b|L4\b|L20|L40|RTX 40", "sm_89"),  # before "RTX 2000 Ada", which is no RTX 20
    (r"V100|TITAN V", "sm_70"),
    (r"T4\b|RTX 20|GTX 16|Quadro RTX|TITAN RTX", "sm_75"),
    (r"A100|A30\b|A800", "sm_80"),
    (r"A10\b|A10G|A16|A2\b|A40|RTX 30|RTX A\d", "sm_86"),
    (r"Orin", "sm_87"),
    (r"H100|H200|H800|H20\b|GH200", "sm_90"),
    (r"B100|B200|GB200", "sm_100"),
    (r"B300|GB300", "sm_103"),
    (r"Thor", "sm_110"),
    (r"RTX 50|RTX PRO", "sm_120"),
    (r"GB10\b", "sm_121"),
)

CHIPS = ("cpu", *dict.fromkeys(_TPU.values()), *(name for _, name in _GPU))


def chip_of(platform: str, device_kind: str, compute_capability: str | None = None) -> Chip:
    """The chip behind what JAX says of a device.

    Args:
        platform: "cpu", "gpu" (or "cuda"), "tpu".
        device_kind: the device's own name for its kind.
        compute_capability: of an NVIDIA GPU, "9.0"; None: looked up by the name.
    """
    if platform == "tpu":
        return Chip(_TPU.get(device_kind, device_kind), "tpu")
    if platform in ("gpu", "cuda", "rocm"):
        if compute_capability is not None and re.fullmatch(r"\d+\.\d+", compute_capability):
            return Chip(f"sm_{compute_capability.replace('.', '')}", "gpu")
        found = (name for pattern, name in _GPU if re.search(pattern, device_kind))
        return Chip(next(found, device_kind), "gpu")
    return Chip("cpu", "cpu")


def chip_named(name: str) -> Chip:
    """The chip of a name in `CHIPS`.

    Raises:
        ValueError: there is none of that name.
    """
    if name not in CHIPS:
        raise ValueError(f"chip={name!r} is not known; choose one of {', '.join(CHIPS)}.")
    platform = "cpu" if name == "cpu" else "gpu" if name.startswith("sm_") else "tpu"
    return Chip(name, platform)


def chip_at_hand() -> Chip:
    """The chip of JAX's default device."""
    device = jax.devices()[0]
    capability = getattr(device, "compute_capability", None)
    return chip_of(device.platform, device.device_kind, capability)
