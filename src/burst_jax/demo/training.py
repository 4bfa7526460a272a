"""The same short run on many devices and on one."""

from typing import NamedTuple

from rich.console import Console

from burst_jax.lm.config import TrainConfig
from burst_jax.lm.console import working
from burst_jax.lm.data import Corpus
from burst_jax.lm.run import run
from burst_jax.lm.train import Devices, Trainer


class Losses(NamedTuple):
    """Loss of every step, nats per byte.

    Attributes:
        spread: on all devices.
        alone: on one of them.
    """

    spread: list[float]
    alone: list[float]

    @property
    def largest_difference(self) -> float:
        """Between the two, over all steps."""
        return max(abs(a - b) for a, b in zip(self.spread, self.alone, strict=True))

    @property
    def final(self) -> float:
        """Mean over the last fifth of the steps: a step's own loss hangs on what it read."""
        last = self.spread[-max(1, len(self.spread) // 5) :]
        return sum(last) / len(last)


def train_twice(
    config: TrainConfig, corpus: Corpus, *, devices: Devices, console: Console
) -> Losses:
    """Trains on all devices, then on the first alone; everything else is the same."""

    def losses(some: Devices) -> list[float]:
        title = f"{len(some)} device{'s' * (len(some) > 1)}"
        with working(console, f"{title}: initialising the parameters"):
            trainer = Trainer(config, corpus, devices=some)
        return [record.loss for record in run(trainer, console=console, title=title)]

    return Losses(spread=losses(devices), alone=losses(devices[:1]))
