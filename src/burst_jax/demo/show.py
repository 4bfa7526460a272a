"""The demo from beginning to end: train twice, compare, say what holds, save picture and page."""

import pathlib
import sys
import time

import jax
from rich import box
from rich.console import Console
from rich.table import Table as RichTable

from burst_jax.demo import figure
from burst_jax.demo.comparison import SHAPES, WIDTH, Table, compare
from burst_jax.demo.config import DemoConfig
from burst_jax.demo.page import COLUMNS, cells, page
from burst_jax.demo.training import train_twice
from burst_jax.demo.verdict import Claim, claims_about_attention, claims_about_training
from burst_jax.lm.config import TrainConfig
from burst_jax.lm.console import for_people, say, working
from burst_jax.lm.data import Corpus, open_corpus
from burst_jax.lm.train import Devices


def prepare(config: DemoConfig) -> Corpus:
    """Opens the text and the output folder.

    Raises:
        ValueError: the text is missing, empty or unreadable, or the folder cannot be made.
    """
    training = config.training()
    corpus = open_corpus(training.data, training.include)
    try:
        pathlib.Path(config.output).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"output folder {config.output} cannot be made: {error}.") from error
    return corpus


def show(config: DemoConfig, corpus: Corpus, *, devices: Devices, console: Console) -> bool:
    """Runs everything; returns whether every claim held."""
    start = time.perf_counter()
    training = config.training()
    source = "packages of Python's standard library" if not config.data else ", ".join(config.data)
    facts = _facts(training, corpus, source, devices)
    for fact in facts:
        say(console, fact)

    _heading(console, f"1. The same training run on {len(devices)} devices and on 1")
    losses = train_twice(training, corpus, devices=devices, console=console)
    claims = claims_about_training(losses, num_devices=len(devices))
    _show_claims(console, claims)

    _heading(console, "2. One attention layer, spread in four ways")
    tables = []
    for shape in SHAPES:
        length, repeats = config.seq_len, config.repeats
        table = compare(shape, devices=devices, length=length, repeats=repeats, console=console)
        console.print(_rich_table(table))
        tables.append(table)
    notes = _notes(devices)
    for note in notes:
        console.print(note, style="dim", highlight=False, markup=False)
    about_attention = claims_about_attention(tables)
    _show_claims(console, about_attention)

    claims += about_attention
    with working(console, "drawing"):
        png = figure.draw(losses, tables, num_devices=len(devices))
    took_s = time.perf_counter() - start
    failed = sum(not claim.holds for claim in claims)
    verdict = f"PASSED: all {len(claims)} claims hold, after {took_s:.0f} s."
    if failed:
        verdict = f"FAILED: {failed} of {len(claims)} claims do not hold, after {took_s:.0f} s."
    next_step = _next_step(config, failed=bool(failed))
    text = page(
        png=png, claims=claims, tables=tables, verdict=verdict, next_step=next_step, notes=notes,
        facts=facts,
    )  # fmt: skip
    folder = pathlib.Path(config.output)
    (folder / "demo.png").write_bytes(png)
    (folder / "demo.html").write_text(text, encoding="utf-8")
    _heading(console, verdict)
    say(console, f"Picture: {folder / 'demo.png'}   Page: {folder / 'demo.html'}")
    say(console, f"Next: {next_step}")
    return not failed


def _facts(training: TrainConfig, corpus: Corpus, source: str, devices: Devices) -> list[str]:
    model = training.model
    kind = devices[0].platform
    return [
        f"Text: {source}, {len(corpus.files):,} files, {for_people(corpus.num_bytes)}.",
        f"Model: {model.num_layers} layers of width {model.width}, query heads {model.num_heads}, "
        f"kv heads {model.num_kv_heads}; context {training.seq_len:,} bytes, zigzag; float32.",
        f"Devices: {len(devices)}{' simulated' if kind == 'cpu' else ''} ({kind}).",
        f"Versions: Python {sys.version.split()[0]}, jax {jax.__version__}.",
    ]


def _notes(devices: Devices) -> list[str]:
    notes = [
        f"One attention layer of width {WIDTH}, forward and backward, in float32, causal, zigzag; "
        f"all strategies compute with the same tiles and keep the same for the backward pass.",
        "sent: bytes that each device sends of activations and their gradients, counted from the "
        "program. memory: what the compiled program needs on each device besides arguments and "
        "results. Both grow in proportion to the context.",
        "weights: bytes to sum the weights' gradients over the devices, once a step, the same for "
        "any context. Tensor parallelism has none, but sends as much again for the MLP, which the "
        "others compute where the tokens are, and needs a kv head for every device.",
        "error: largest difference from float64 of output and gradients, relative to the largest "
        "value.",
    ]
    if devices[0].platform == "cpu":
        notes.append(
            "time: median. Simulated devices share this machine's cores and memory, so it shows "
            "the work and not what real links would add."
        )
    return notes


def _next_step(config: DemoConfig, *, failed: bool) -> str:
    if failed:
        return (
            "run `burst-jax doctor`, and if the devices and versions look right, report the "
            "failed claim with its output."
        )
    return (
        f"train on your own text with `burst-jax train --data PATH --devices {config.devices} "
        f"--seq-len 8192`."
    )


def _heading(console: Console, text: str) -> None:
    console.print()
    console.print(text, style="bold", highlight=False, markup=False, soft_wrap=True)


def _show_claims(console: Console, claims: list[Claim]) -> None:
    for claim in claims:
        style = "green" if claim.holds else "bold red"
        mark = "✓" if claim.holds else "✗"
        console.print(
            f"  {mark} {claim.text}", style=style, highlight=False, markup=False, soft_wrap=True
        )


def _rich_table(table: Table) -> RichTable:
    shown = RichTable(
        title=table.shape.name, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False,
        collapse_padding=True,
    )  # fmt: skip
    for i, column in enumerate(COLUMNS):
        shown.add_column(column, justify="right" if i else "left", no_wrap=True)
    for row in table.rows:
        shown.add_row(*cells(row), style="bold" if row.chosen else "")
    return shown
