"""What can be asked of the demo, and the sizes it has otherwise."""

import dataclasses
import pathlib
import sysconfig

from burst_jax.lm.config import ModelConfig, OptimizerConfig, TrainConfig, check_types


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DemoConfig:
    """Trains on real text over simulated devices, and compares with the other ways to do it.

    Attributes:
        data: files and folders to learn from; none: the sources of Python's standard library.
        devices: devices the sequence is spread over.
        steps: steps of the training run.
        seq_len: context of the training run and of the comparison, in tokens.
        repeats: timed runs of each strategy in the comparison; their median is shown.
        output: folder for demo.html and demo.png.
    """

    data: tuple[str, ...] = ()
    devices: int = 8
    steps: int = 72
    seq_len: int = 2048
    repeats: int = 3
    output: str = "burst-demo"

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("devices", "steps", "seq_len", "repeats"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if 8 % self.devices:
            # The comparison's tensor parallelism shares 8 kv heads.
            raise ValueError(f"devices must be 1, 2, 4 or 8 in the demo, got {self.devices}.")

    def training(self) -> TrainConfig:
        """A run small enough for two CPU cores, whose loss still falls below 2.6 nats/byte."""
        return TrainConfig(
            data=self.data or standard_library(),
            include=("*",) if self.data else ("*.py",),
            seq_len=self.seq_len,
            steps=self.steps,
            batch_size=2,
            # Few large heads: on this text they learn faster than many small ones, and cost less.
            model=ModelConfig(width=128, num_layers=2, num_heads=2, num_kv_heads=1),
            optimizer=OptimizerConfig(learning_rate=5e-3, warmup_steps=min(5, self.steps)),
        )


# Packages of pure code, alike on all Pythons: a short run learns more from text that is of a piece
# than from the whole library, with its tables of codes and locales.
_PACKAGES = (
    "asyncio", "concurrent", "json", "logging", "multiprocessing", "unittest", "xml",
)  # fmt: skip


def standard_library() -> tuple[str, ...]:
    """Packages of Python's standard library: real text that every machine has.

    Raises:
        ValueError: this Python has none, for example because its library is a zip file.
    """
    folder = pathlib.Path(sysconfig.get_path("stdlib"))
    packages = tuple(str(folder / name) for name in _PACKAGES if (folder / name).is_dir())
    if not packages:
        raise ValueError(
            f"no Python sources in {folder}; name text to learn from with --data PATH."
        )
    return packages
