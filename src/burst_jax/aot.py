"""Compile for hardware that is not here: the real compiler, the real schedule, no device.

TPUs need libtpu (the `aot` extra). GPUs need the jax-cuda plugin of the same version as jax,
installed without its CUDA libraries, and `ptxas` on the PATH.
"""

import dataclasses
import re
from collections.abc import Callable
from importlib import resources
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils, topologies
from jax.sharding import AxisType, Mesh

# Names that people use, and the compiler's own where they differ.
_TPU = {"v4": "v4", "v5e": "v5e", "v5p": "v5p", "v6e": "v6e", "v7x": "tpu7x", "tpu7x": "tpu7x"}
_GPU = {name: f"{name}.txtpb" for name in ("h100", "a100", "l4", "t4", "b200")}


@dataclasses.dataclass(frozen=True)
class Target:
    """A machine to compile for.

    Attributes:
        platform: "tpu" or "cuda".
        name: the chip: "v5e", "h100", ...
        shape: chips along each dimension of a TPU slice, or (GPUs,).
    """

    platform: str
    name: str
    shape: tuple[int, ...]


def parse_target(target: str) -> Target:
    """Reads "v5e:2x4", "v5p:4x4x4" or "h100:8".

    Raises:
        ValueError: no such chip, or no such form.
    """
    found = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", target)
    name = found.group(1) if found else None
    if found is None or (name not in _TPU and name not in _GPU):
        raise ValueError(
            f"target={target!r}: give CHIP:SHAPE with a chip of {', '.join([*_TPU, *_GPU])}, for "
            'example "v5e:2x4", "v5p:4x4x4" or "h100:8".'
        )
    shape = tuple(int(n) for n in found.group(2).split("x"))
    return Target("tpu" if name in _TPU else "cuda", name, shape)


def mesh_for(target: str, axis_names: tuple[str, ...] = ("sp",), **sizes: int) -> Mesh:
    """A mesh of the target's devices, which can be compiled for but not run on.

    Args:
        target: see `parse_target`.
        axis_names: names of the mesh axes; the sizes of all but the last default to 1.
        **sizes: devices along each axis; what is not named falls to the last axis.

    Returns:
        A mesh with Auto axes over all devices of the target.

    Raises:
        ValueError: no such target, or sizes that do not divide its devices.
        ImportError: the compiler for that platform is not installed.
    """
    devices = np.array(_topology(parse_target(target)).devices)
    shape = [sizes.get(name, 1) for name in axis_names]
    if axis_names[-1] not in sizes:
        shape[-1] = devices.size // max(1, int(np.prod(shape[:-1])))
    if int(np.prod(shape)) != devices.size:
        raise ValueError(f"{target} has {devices.size} devices, the mesh {dict(sizes)} does not.")
    # As jax.make_mesh orders them: neighbours in the mesh are neighbours on the torus.
    laid = mesh_utils.create_device_mesh(shape, list(devices.flat), allow_split_physical_axes=True)
    return Mesh(laid, axis_names, axis_types=(AxisType.Auto,) * len(axis_names))


def compile_for(target: str, fn: Callable[..., Any], *args: Any) -> jax.stages.Compiled:
    """Compiles `fn(*args)` for the target.

    Args:
        target: "v5e:2x4", "v6e:4x4", "h100:8", ...: see `parse_target`.
        fn: a function, jitted or not, over a mesh of `mesh_for(target)`.
        *args: `jax.ShapeDtypeStruct`s sharded over that mesh.

    Returns:
        The compiled program: `.as_text()`, `.memory_analysis()`, `burst_jax.inspect.overlap`.

    Raises:
        ValueError: no such target, or arguments that lie on other devices.
        ImportError: the compiler for that platform is not installed.
    """
    wanted = {str(d) for d in _topology(parse_target(target)).devices}
    for x in jax.tree.leaves(args):
        sharding = getattr(x, "sharding", None)
        found = {str(d) for d in sharding.device_set} if sharding is not None else set()
        if found != wanted:
            raise ValueError(
                f"an argument {getattr(x, 'shape', x)} does not lie on the devices of {target}. "
                "Give jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh_for("
                f"{target!r}), spec))."
            )
    lower = getattr(fn, "lower", None) or jax.jit(fn).lower
    return lower(*args).compile()


def _topology(target: Target) -> Any:
    try:
        if target.platform == "tpu":
            name = f"{_TPU[target.name]}:{'x'.join(map(str, target.shape))}"
            # A v4 chip is one device of two cores, as JAX runs it, and not two devices.
            kwargs = {"chip_config_name": "megacore"} if target.name == "v4" else {}
            return topologies.get_topology_desc(platform="tpu", topology_name=name, **kwargs)
        config = resources.files("burst_jax").joinpath("targets", _GPU[target.name]).read_text()
        shape = f"1x1x{int(np.prod(target.shape))}"
        return topologies.get_topology_desc(
            platform="cuda", topology_name=shape, topology=shape, target_config=config
        )
    except Exception as error:
        need = (
            "the `aot` extra (libtpu): pip install 'burst-jax[aot]'"
            if target.platform == "tpu"
            else f"jax-cuda13-plugin and jax-cuda13-pjrt {jax.__version__} (pip install --no-deps) "
            "and ptxas on the PATH"
        )
        raise ImportError(
            f"cannot compile for {target.name}: {error}. It needs {need}, and a shape that exists."
        ) from error
