"""What a person sees of a run: a bar in a terminal, a line now and then in a log."""

import contextlib
from collections.abc import Iterator

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from burst_jax.lm.console import for_people, say
from burst_jax.lm.train import Compiled, StepRecord, Trainer

# Of a run whose output is no terminal, about this many lines are printed.
_LINES = 10


class StepDisplay:
    """Shows the steps of a run.

    Args:
        console: where to.
        title: what is running, in a word or two.
        trainer: what runs.
        compiled: what its step sends.
    """

    def __init__(
        self, console: Console, *, title: str, trainer: Trainer, compiled: Compiled
    ) -> None:
        config = trainer.config
        self._console = console
        self._title = title
        self._steps = config.steps
        sent = for_people(sum(compiled.sent))
        self._fixed = f"{config.seq_len:,} context · {sent} sent/step"
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            TextColumn("{task.completed}/{task.total}"),
            TextColumn("[bold]{task.fields[numbers]}[/bold] · " + self._fixed),
            TimeRemainingColumn(compact=True),
            console=console,
        )
        self._task = self._bar.add_task(title, total=config.steps, numbers="first step")

    @contextlib.contextmanager
    def showing(self) -> Iterator[None]:
        """The bar lives inside this."""
        if not self._console.is_terminal:
            yield
            return
        with self._bar:
            yield

    def show(self, record: StepRecord) -> None:
        """One more step is done."""
        numbers = f"{record.loss:.3f} nats/byte · {record.tokens_per_s:,.0f} tokens/s"
        if self._console.is_terminal:
            self._bar.update(self._task, completed=record.step, numbers=numbers)
        elif record.step % max(1, self._steps // _LINES) == 0 or record.step in (1, self._steps):
            progress = f"{self._title} {record.step}/{self._steps}"
            say(self._console, f"{progress} · {numbers} · {self._fixed}")
        if record.held_out_loss is not None:
            held_out = f"held-out loss {record.held_out_loss:.3f} nats/byte"
            say(self._console, f"{self._title} {record.step}/{self._steps} · {held_out}")
