"""One run from compilation to the last step: shown on a console, written to a metrics file."""

import dataclasses

import jax
from rich.console import Console

from burst_jax.lm.console import for_people, say, working
from burst_jax.lm.metrics import MetricsFile
from burst_jax.lm.progress import StepDisplay
from burst_jax.lm.train import Compiled, StepRecord, Trainer


def run(
    trainer: Trainer, *, console: Console, title: str = "train", metrics: MetricsFile | None = None
) -> list[StepRecord]:
    """Compiles and runs all steps.

    Args:
        trainer: what to run.
        console: shows progress.
        title: what is running, in a word or two.
        metrics: where each step is written.

    Returns:
        What each step did.

    Raises:
        FloatingPointError, ValueError: as `Trainer.steps`.
    """
    where = f"{trainer.sharding.num_shards} {trainer.devices[0].platform} device"
    where += "s" if trainer.sharding.num_shards > 1 else ""
    with working(console, f"{title}: compiling the step for {where}"):
        compiled = trainer.compile()
    say(console, f"{title}: {_summary(trainer, compiled)}")
    if metrics:
        metrics.write("start", _start_event(trainer, compiled))
    records = []
    display = StepDisplay(console, title=title, trainer=trainer, compiled=compiled)
    with display.showing():
        for record in trainer.steps():
            records.append(record)
            display.show(record)
            if metrics:
                metrics.write("step", record._asdict())
    if metrics:
        time_s = sum(record.time_s for record in records)
        metrics.write("end", {"steps": len(records), "time_s": time_s, "loss": records[-1].loss})
    return records


def _summary(trainer: Trainer, compiled: Compiled) -> str:
    windows, config = trainer.windows, trainer.config
    text = (
        f"{trainer.num_params:,} parameters, {len(windows):,} windows of {config.seq_len:,} bytes "
        f"({config.steps * config.batch_size / len(windows):.3g} epochs)"
    )
    if len(trainer.held_out):
        text += f", {len(trainer.held_out):,} held out"
    text += f"; compiled in {compiled.time_s:.1f} s"
    if compiled.temporary_bytes is not None:
        text += f", {for_people(compiled.temporary_bytes)} temporary memory a device"
    sent = compiled.sent
    if sum(sent):
        text += (
            f"; each sends {for_people(sent.attention)} a step for attention and "
            f"{for_people(sent.gradients)} for the parameters' gradients"
        )
    return text + "."


def _start_event(trainer: Trainer, compiled: Compiled) -> dict[str, object]:
    corpus = trainer.windows.corpus
    return {
        "config": dataclasses.asdict(trainer.config),
        "jax": jax.__version__,
        "devices": trainer.sharding.num_shards,
        "device_kind": trainer.devices[0].device_kind,
        "num_params": trainer.num_params,
        "files": len(corpus.files),
        "files_left_out": len(corpus.left_out),
        "bytes": corpus.num_bytes,
        "windows": len(trainer.windows),
        "windows_held_out": len(trainer.held_out),
        "compile_time_s": compiled.time_s,
        "temporary_bytes": compiled.temporary_bytes,
        "sent_bytes_attention": compiled.sent.attention,
        "sent_bytes_gradients": compiled.sent.gradients,
    }
