"""How a tile is cut into blocks. It changes speed and memory, never the result beyond rounding."""

import dataclasses

from burst_kernels._chips import chip_named


@dataclasses.dataclass(frozen=True, kw_only=True)
class TileConfig:
    """Block sizes; a field left None is chosen by the backend from chip and shapes.

    Attributes:
        block_q: query tokens in a block.
        block_kv: key tokens in a block.
        block_compute: key tokens whose scores the `mosaic_tpu` backend's kernels hold at once: a
            pair of blocks is computed in pieces, one after the other.
        block_compute_q: query tokens of a piece; its backward takes those of the whole block.
        block_q_backward, block_kv_backward: blocks of the backward of `mosaic_tpu`, `mosaic_gpu`
            and `triton`. None: chosen for the backward; `mosaic_tpu` takes those of the forward
            where they are given.
        block_compute_backward: `block_compute` of the backward of `mosaic_tpu`.
        fused_backward: whether one kernel of `mosaic_tpu` makes dq, dk and dv from one pass over
            the scores, or one makes dk and dv and another dq.
        stages: blocks of keys that the `mosaic_gpu` backend has on their way or in use at once; of
            loops of the `triton` backend, as Triton counts them. There None, as for `warps`, is
            each kernel's own.
        stages_backward: blocks of queries, the same, of the backward of `mosaic_gpu`.
        warps: of 32 threads, that compute one program of the `triton` backend.
        kv_heads: kv heads that one step of the `xla` backend computes together.
        chip: name of the chip to compile for, see `burst_kernels.CHIPS`; None: the mesh's, or
            that of JAX's default device.
        interpret: run a chip's kernel by Pallas's or Triton's interpreter on CPU: slow, for
            checking numbers. Pallas's takes no vmap, jax.checkpoint or gradient of a scan around
            it; Triton's and compiled kernels do.

    Raises:
        ValueError: a size is not a positive integer, or the chip is not known.
    """

    block_q: int | None = None
    block_kv: int | None = None
    block_compute: int | None = None
    block_compute_q: int | None = None
    block_q_backward: int | None = None
    block_kv_backward: int | None = None
    block_compute_backward: int | None = None
    fused_backward: bool | None = None
    stages: int | None = None
    stages_backward: int | None = None
    warps: int | None = None
    kv_heads: int | None = None
    chip: str | None = None
    interpret: bool = False

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type == int | None and value is not None and not _is_size(value):
                raise ValueError(
                    f"TileConfig.{field.name} must be a positive integer or None (chosen from the "
                    f"shapes), got {value!r}."
                )
        if self.chip is not None:
            chip_named(self.chip)
        if not isinstance(self.interpret, bool):
            raise ValueError(f"TileConfig.interpret must be True or False, got {self.interpret!r}.")
        if self.fused_backward is not None and not isinstance(self.fused_backward, bool):
            raise ValueError(
                "TileConfig.fused_backward must be True, False or None (chosen from the shapes), "
                f"got {self.fused_backward!r}."
            )


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
