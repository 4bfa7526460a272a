"""How arrays come to lie as a SequenceSharding says, and which are refused for lying otherwise."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

import burst_kernels
from burst_jax._sharding import SequenceSharding, names
from burst_kernels import Chip


def placed(
    name: str, x: Array | np.ndarray, spec: PartitionSpec, where: SequenceSharding
) -> Array | np.ndarray:
    """The array on the mesh; an array that is not sharded at all may be given too.

    Args:
        name: what the caller calls it.
        x: a concrete or traced array.
        spec: how it should lie.
        where: the sharding whose mesh it should lie on.

    Raises:
        ValueError: it is sharded, but otherwise.
    """
    if isinstance(x, Tracer):
        return _explicitly_placed(name, x, spec, where)
    if not isinstance(where.mesh, Mesh):
        return x
    sharding = getattr(x, "sharding", None)
    target = NamedSharding(where.mesh, _that_divides(spec, x.shape, where))
    if sharding is None or sharding.is_fully_replicated:
        return jax.device_put(x, target)
    if not sharding.is_equivalent_to(target, x.ndim):
        found = getattr(sharding, "spec", sharding)
        raise _wrong(name, found, spec, where)
    return x


def _explicitly_placed(name: str, x: Array, spec: PartitionSpec, where: SequenceSharding) -> Array:
    """The same under a trace, as far as types tell: only Explicit axes are part of the type."""
    explicit = explicit_axes(where)
    if not explicit:
        return x
    found = jax.typeof(x).sharding.spec
    target = only(_that_divides(spec, x.shape, where), explicit)
    padded = (*found, *[None] * (x.ndim - len(found)))
    if all(part is None for part in padded):
        return jax.sharding.reshard(x, NamedSharding(current_mesh(where), target))
    if [names(a) for a in padded] != [names(b) for b in target]:
        raise _wrong(name, found, spec, where)
    return x


def _wrong(name: str, found: object, spec: PartitionSpec, where: SequenceSharding) -> ValueError:
    axes = dict(where.mesh.shape)
    return ValueError(
        f"{name} is sharded as {found}, but `sharding` says {spec} on the mesh {axes}. Place it "
        "with sharding.place(x) from natural order, move it with jax.device_put(x, "
        f"NamedSharding(mesh, {spec})) (under jit: jax.sharding.reshard), or describe it: "
        "SequenceSharding(mesh, axis_name=..., batch_axis=..., head_axis=...)."
    )


def _that_divides(
    spec: PartitionSpec, shape: tuple[int, ...], where: SequenceSharding
) -> PartitionSpec:
    """The spec without axes that do not divide their dimension: padded before it is sharded."""
    parts = [p if n % where.axis_size(p) == 0 else None for p, n in zip(spec, shape, strict=True)]
    return PartitionSpec(*parts)


def current_mesh(where: SequenceSharding) -> Mesh | AbstractMesh:
    """The sharding's mesh, as it is known here: inside a shard_map some of its axes are Manual.

    Raises:
        ValueError: the caller's shard_map is over an axis of the sharding, or another mesh's.
    """
    here = jax.sharding.get_abstract_mesh()
    if here.empty or AxisType.Manual not in here.axis_types:
        return where.mesh
    used = {n for axis in (where.axis_name, where.batch_axis, where.head_axis) for n in names(axis)}
    types = zip(here.axis_names, here.axis_types, strict=True)
    manual = {name for name, kind in types if kind == AxisType.Manual}
    if used & manual:
        raise ValueError(
            f"burst_attention was called inside a shard_map over {sorted(used & manual)}, where "
            "arrays are one device's shards. Use burst_attention_shard(..., axis_name="
            f"{where.axis_name!r}) there, or name only other axes in the shard_map."
        )
    if dict(here.shape) != dict(where.mesh.shape):
        raise ValueError(
            f"`sharding` has the mesh {dict(where.mesh.shape)}, but the shard_map around this call "
            f"has {dict(here.shape)}. Build the SequenceSharding on the mesh in use."
        )
    return here


def free_axes(where: SequenceSharding) -> frozenset[str]:
    """Mesh axes that are not Manual yet."""
    mesh = current_mesh(where)
    types = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return frozenset(name for name, kind in types if kind != AxisType.Manual)


def explicit_axes(where: SequenceSharding) -> frozenset[str]:
    """Mesh axes of Explicit type."""
    mesh = current_mesh(where)
    types = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return frozenset(name for name, kind in types if kind == AxisType.Explicit)


def only(spec: PartitionSpec, axes: frozenset[str]) -> PartitionSpec:
    """The spec with no axes but these."""
    kept = [tuple(n for n in names(part) if n in axes) for part in spec]
    return PartitionSpec(*[p[0] if len(p) == 1 else p or None for p in kept])


def padded(x: Array, axis: int, length: int, value: int = 0) -> Array:
    """x with `axis` filled up to `length`."""
    if x.shape[axis] == length:
        return x
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, length - x.shape[axis])
    return jnp.pad(x, widths, constant_values=value)


def reshard(x: Array, spec: PartitionSpec, where: SequenceSharding) -> Array:
    """Moves x where its type has to say so: on Explicit axes. Auto axes are the compiler's."""
    explicit = explicit_axes(where)
    if not explicit:
        return x
    return jax.sharding.reshard(x, NamedSharding(current_mesh(where), only(spec, explicit)))


def chip(where: SequenceSharding) -> Chip:
    """What the mesh is made of."""
    mesh = where.mesh
    return _chip(mesh.devices.flat[0] if isinstance(mesh, Mesh) else mesh.abstract_device)


def chip_here() -> Chip:
    """What the mesh of the shard_map around this call is made of; JAX's default device in pmap."""
    return _chip(jax.sharding.get_abstract_mesh().abstract_device)


def _chip(device: Any) -> Chip:
    if device is None:
        return burst_kernels.chip_at_hand()
    capability = getattr(device, "compute_capability", None)
    return burst_kernels.chip_of(device.platform, device.device_kind, capability)
