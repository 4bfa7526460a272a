"""`SequenceSharding`: how a sequence lies on the mesh; data, labels and attention share it.

Layouts, for R devices (a device's tokens in order):
    contiguous  device r holds tokens r T/R ... (r+1) T/R - 1
    zigzag      device r holds chunks r and 2R-1-r of 2R equal chunks: causal work is the same on
                every device at every hop (zhuzilin/ring-flash-attention; Llama 3, arXiv 2407.21783)
    striped     device r holds tokens r, r + R, r + 2R, ... (Striped Attention, arXiv 2311.09431)
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int

from burst_jax._schedule import LAYOUTS

AxisName = str | tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class SequenceSharding:
    """Which mesh axis carries the sequence, in which order, and how long it really is.

    Args:
        mesh: the device mesh; Auto and Explicit axes both work.
        axis_name: mesh axis (or axes, as one ring over all their devices, the last fastest).
        layout: "contiguous", "zigzag" or "striped". For causal masks choose "zigzag".
        batch_axis: mesh axis over which dimension 0, the batch, is sharded.
        head_axis: mesh axis over which the heads of [B, T, N, H] arrays are sharded.
        length: the true number of tokens T. What `place` pads beyond it is never attended to and
            gets no gradient. None: every token counts, and T must suit the layout.
        key_length: the true number of keys S for cross attention; by default `length`.

    Raises:
        ValueError: an axis that the mesh lacks or that is named twice, an unknown layout, or a
            length below 1.
    """

    mesh: Mesh | AbstractMesh
    axis_name: AxisName = "sp"
    layout: str = "contiguous"
    batch_axis: AxisName | None = None
    head_axis: AxisName | None = None
    length: int | None = None
    key_length: int | None = None

    def __post_init__(self) -> None:
        axes = self.mesh.axis_names
        named: list[str] = []
        for field in ("axis_name", "batch_axis", "head_axis"):
            value = getattr(self, field)
            if isinstance(value, list):
                value = tuple(value)
                object.__setattr__(self, field, value)
            for name in names(value):
                if name not in axes:
                    raise ValueError(
                        f"{field}={value!r}: the mesh has no axis {name!r}, its axes are "
                        f"{tuple(axes)}. Name one of them, or make the mesh with "
                        f"jax.make_mesh(sizes, axis_names)."
                    )
                if name in named:
                    raise ValueError(
                        f"{field}={value!r}: mesh axis {name!r} is already used for another "
                        "dimension. The sequence, the batch and the heads need different axes."
                    )
                named.append(name)
        if not names(self.axis_name):
            raise ValueError(
                f"axis_name={self.axis_name!r}: name the mesh axis that carries the sequence, one "
                f"of {tuple(axes)}."
            )
        check_layout(self.layout)
        for field in ("length", "key_length"):
            value = getattr(self, field)
            integer = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
            if value is not None and (not integer or value < 1):
                raise ValueError(
                    f"{field}={value!r}: a number of tokens is an integer >= 1, or None where "
                    "every token of the arrays counts."
                )

    @property
    def num_shards(self) -> int:
        """R, the devices that share one sequence."""
        return self.axis_size(self.axis_name)

    @property
    def padded_length(self) -> int:
        """`length` rounded up to what the layout can share equally."""
        return self.padded(self._known_length())

    def _known_length(self) -> int:
        if self.length is None:
            raise ValueError(
                "padded_length and positions() need the true number of tokens: give "
                "SequenceSharding(..., length=T)."
            )
        return self.length

    def axis_size(self, axis: AxisName | None) -> int:
        """Devices along a mesh axis or several; 1 for None."""
        return math.prod(self.mesh.shape[name] for name in names(axis))

    @property
    def multiple(self) -> int:
        """What the number of tokens must be a multiple of: R, or 2R for zigzag."""
        return self.num_shards * (2 if self.layout == "zigzag" else 1)

    def padded(self, length: int) -> int:
        """A number of tokens rounded up to what the layout can share equally."""
        return -(-length // self.multiple) * self.multiple

    def spec(self, ndim: int, axis: int = 1) -> PartitionSpec:
        """PartitionSpec of an array whose dimension `axis` is the sequence.

        Dimension 0 is the batch unless it is the sequence; with 4 dimensions the one after the
        sequence is the heads.
        """
        if not 0 <= axis < ndim:
            raise ValueError(f"axis={axis} is no dimension of an array with {ndim} of them.")
        parts: list[AxisName | None] = [None] * ndim
        if axis != 0:
            parts[0] = self.batch_axis
        parts[axis] = self.axis_name
        if ndim == 4 and axis + 1 < ndim:
            parts[axis + 1] = self.head_axis
        return PartitionSpec(*parts)

    def place(self, x: Array | np.ndarray, axis: int = 1, pad_value: int | float = 0) -> Array:
        """Pads, permutes and shards an array in natural order: call it once, on the batch.

        Args:
            x: any array whose dimension `axis` is the sequence: `length` (or `key_length`) long
                where given, else any multiple of `multiple`.
            axis: the sequence's dimension.
            pad_value: what the padding holds.

        Returns:
            The array in layout order, sharded as `spec(x.ndim, axis)` says.

        Raises:
            ValueError: the length is neither of those.
        """
        x = x if isinstance(x, (np.ndarray, jax.Array)) else np.asarray(x)
        spec = self.spec(x.ndim, axis)
        found: int = x.shape[axis]
        if found == 0:
            raise ValueError(f"place: dimension {axis} of an array {x.shape} has no tokens.")
        if self.length is None and self.key_length is None:
            if found % self.multiple:
                raise ValueError(
                    f"place: {found} tokens cannot be shared by {self.num_shards} devices in the "
                    f"{self.layout!r} layout, which needs a multiple of {self.multiple}. Give "
                    f"SequenceSharding(..., length={found}), and padding is added and masked."
                )
        elif found not in (self.length, self.key_length):
            raise ValueError(
                f"place: dimension {axis} of an array {x.shape} has {found} tokens, but this "
                f"sharding has length={self.length}, key_length={self.key_length}. Give the array "
                f"in natural order, unpadded, or another sharding with length={found}."
            )
        np_or_jnp = np if isinstance(x, np.ndarray) else jnp
        widths = [(0, 0)] * x.ndim
        widths[axis] = (0, self.padded(found) - found)
        if widths[axis][1]:
            x = np_or_jnp.pad(x, widths, constant_values=pad_value)
        x = reorder(x, self.layout, self.num_shards, axis)
        return jax.device_put(x, NamedSharding(self.mesh, spec))

    def restore(self, x: Array, axis: int = 1, length: int | None = None) -> Array:
        """The inverse of `place`: natural order, padding gone, the sequence no longer sharded.

        Args:
            x: an array in layout order.
            axis: the sequence's dimension.
            length: tokens to keep; by default `length` or `key_length`, whichever the padded
                array comes from, or all of them where neither is given.

        Raises:
            ValueError: the array's length does not suit the layout.
        """
        found = x.shape[axis]
        if found % self.multiple:
            raise ValueError(
                f"restore: {found} tokens in dimension {axis} of an array {x.shape} are no "
                f"multiple of {self.multiple}, so the array is not in the {self.layout!r} layout "
                f"of {self.num_shards} devices. Restore arrays that `place` has made."
            )
        if length is None:
            lengths = [n for n in (self.length, self.key_length) if n and self.padded(n) == found]
            if (self.length or self.key_length) and not lengths:
                raise ValueError(
                    f"restore: {found} tokens are not the padded length of length={self.length} "
                    f"or key_length={self.key_length}. Give length= to say how many to keep."
                )
            length = lengths[0] if lengths else found
        if not 1 <= length <= found:
            raise ValueError(f"restore: length={length} of an array with {found} tokens.")
        parts = list(self.spec(x.ndim, axis))
        parts[axis] = None
        x = jax.device_put(x, NamedSharding(self.mesh, PartitionSpec(*parts)))
        natural = reorder(x, self.layout, self.num_shards, axis, inverse=True)
        return jax.lax.slice_in_dim(natural, 0, length, axis=axis)

    def positions(self) -> Int[Array, " T"]:
        """Position of each token in layout order, [padded_length], int32; padding is -1."""
        x = self.positions_of(self._known_length(), self.padded_length)
        return jax.device_put(x, NamedSharding(self.mesh, self.spec(1, axis=0)))

    def positions_of(self, length: int, tokens: int) -> Int[Array, " T"]:
        """`positions` of any number of `tokens` of which `length` are true; not sharded."""
        natural = np.arange(tokens, dtype=np.int32)
        natural = np.where(natural < length, natural, -1).astype(np.int32)
        if tokens % self.multiple == 0:
            natural = reorder(natural, self.layout, self.num_shards, 0)
        return jnp.asarray(natural)


def names(axis: AxisName | None) -> tuple[str, ...]:
    """The mesh axes of an axis argument."""
    return () if axis is None else (axis,) if isinstance(axis, str) else tuple(axis)


def check_layout(layout: str) -> None:
    """Raises ValueError for a layout that does not exist."""
    if layout not in LAYOUTS:
        raise ValueError(
            f"layout={layout!r} does not exist; choose one of {', '.join(map(repr, LAYOUTS))} "
            "(zigzag shares causal work equally)."
        )


def reorder(
    x: Array | np.ndarray, layout: str, num_shards: int, axis: int, *, inverse: bool = False
) -> Array | np.ndarray:
    """Natural order to layout order, or back. The dimension must suit the layout."""
    if layout == "contiguous":
        return x
    T, shape = x.shape[axis], x.shape
    if layout == "striped":
        cut = (num_shards, T // num_shards) if inverse else (T // num_shards, num_shards)
        x = x.reshape(*shape[:axis], *cut, *shape[axis + 1 :]).swapaxes(axis, axis + 1)
        return x.reshape(shape)
    order = np.arange(2 * num_shards).reshape(2, num_shards)
    order = np.stack([order[0], order[1][::-1]], axis=1).reshape(-1)  # 0, 2R-1, 1, 2R-2, ...
    if inverse:
        order = np.argsort(order)
    x = x.reshape(*shape[:axis], 2 * num_shards, T // (2 * num_shards), *shape[axis + 1 :])
    taken = x[(slice(None),) * axis + (order,)]
    return taken.reshape(shape)


@dataclasses.dataclass(frozen=True)
class ShardTokens:
    """Positions of the tokens on one device, from the layout alone: nothing on the wire.

    Attributes:
        layout: one of `LAYOUTS`.
        num_shards: R.
        local: tokens of one shard, padding included.
        length: true tokens; those at positions beyond are padding.
    """

    layout: str
    num_shards: int
    local: int
    length: int

    @property
    def padded(self) -> bool:
        """Whether any shard holds padding."""
        return self.local * self.num_shards != self.length

    def positions(self, shard: Int[Array, ""] | int) -> Int[Array, "1 t"]:
        """int32 positions of the tokens that device `shard` holds; padding is -1."""
        here = jnp.arange(self.local, dtype=jnp.int32)
        shard = jnp.asarray(shard, jnp.int32)
        if self.layout == "contiguous":
            position = shard * self.local + here
        elif self.layout == "striped":
            position = here * self.num_shards + shard
        else:
            chunk = self.local // 2
            late = (2 * self.num_shards - 1 - shard) * chunk + here - chunk
            position = jnp.where(here < chunk, shard * chunk + here, late)
        return jnp.where(position < self.length, position, -1)[None]
