"""`burst-jax train`: the user's files, a mesh, a run."""

import contextlib
from collections import Counter
from collections.abc import Sequence

from rich.console import Console

from burst_jax.cli import BadRequest
from burst_jax.cli.devices import find_devices
from burst_jax.cli.options import parse_train
from burst_jax.lm.console import for_people, say, working
from burst_jax.lm.data import Corpus, open_corpus


def run(arguments: Sequence[str]) -> int:
    """Trains; returns the exit code."""
    config = parse_train(arguments)
    console = Console()
    try:
        with working(console, "looking at the data"):
            corpus = open_corpus(config.data, config.include)
    except ValueError as error:
        raise BadRequest(str(error)) from error
    say(console, describe(corpus))
    devices = find_devices(config.devices)

    # Flax and optax are slow to import; a wrong request has been refused by now.
    from burst_jax.lm.metrics import MetricsFile
    from burst_jax.lm.run import run as run_training
    from burst_jax.lm.train import Trainer

    with contextlib.ExitStack() as stack:
        try:
            # Opened first: a folder that cannot be written is no surprise for the end of a run.
            metrics = stack.enter_context(MetricsFile(config.output))
            with working(console, "initialising the parameters"):
                trainer = Trainer(config, corpus, devices=devices)
        except ValueError as error:
            raise BadRequest(str(error)) from error
        try:
            records = run_training(trainer, console=console, metrics=metrics)
        except FloatingPointError as error:
            metrics.write("failed", {"reason": str(error)})
            say(console, f"train: stopped, {error}")
            return 1
    say(console, f"train: done, loss {records[-1].loss:.3f} nats/byte; metrics in {metrics.path}.")
    return 0


def describe(corpus: Corpus) -> str:
    """What is read, and what of it is not."""
    count = len(corpus.files)
    text = f"data: {count:,} file{'s' * (count != 1)}, {for_people(corpus.num_bytes)}"
    reasons = Counter(reason for _, reason in corpus.left_out)
    if reasons:
        left = ", ".join(f"{n:,} {reason}" for reason, n in sorted(reasons.items()))
        text += f"; left out: {left}"
    return text + "."
