"""How a tile is cut into blocks. It changes speed and memory, never the result beyond rounding."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class TileConfig:
    """Block sizes; a field left None is chosen by the backend from the shapes.

    Attributes:
        block_q: query tokens in a block.
        block_kv: key tokens in a block.
        kv_heads: kv heads that one step of the `xla` backend computes together.
    """

    block_q: int | None = None
    block_kv: int | None = None
    kv_heads: int | None = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(
                    f"TileConfig.{field.name} must be a positive integer or None (chosen from the "
                    f"shapes), got {value!r}."
                )
