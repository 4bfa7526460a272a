"""One HTML file with everything the demo showed: no other file, no network, no script."""

import base64
import html

from burst_jax.demo.comparison import Row, Table
from burst_jax.demo.verdict import Claim
from burst_jax.lm.console import for_people

_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.55 system-ui, sans-serif; }
body { max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
img { width: 100%; background: white; border-radius: 6px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .35rem .6rem; border-bottom: 1px solid #8884; }
th:first-child, td:first-child { text-align: left; }
tr.chosen td { color: #c2410c; font-weight: 600; }
li.holds::marker { content: "\\2713\\00a0"; } li.fails::marker { content: "\\2717\\00a0"; }
li.fails, .failed { color: #b91c1c; font-weight: 600; }
.verdict { font-size: 1.15rem; font-weight: 600; }
small, .notes { color: #777; } code { font-size: .95em; }
"""

COLUMNS = ("strategy", "sent", "weights", "memory", "time", "error")


def cells(row: Row) -> tuple[str, ...]:
    """A row of the table as text, in the order of `COLUMNS`."""
    return (
        row.name + (" ← chosen" if row.chosen else ""),
        for_people(row.sent_bytes),
        for_people(row.weight_bytes),
        for_people(row.temporary_bytes),
        f"{row.time_s * 1e3:.0f} ms",
        f"{row.error:.0e}",
    )


def page(
    *,
    png: bytes,
    claims: list[Claim],
    tables: list[Table],
    verdict: str,
    next_step: str,
    notes: list[str],
    facts: list[str],
) -> str:
    """The page.

    Args:
        png: the picture.
        claims: what was claimed.
        tables: of the comparison.
        verdict: the closing line.
        next_step: what to do now.
        notes: how to read the table.
        facts: what ran: text, model, versions, command.
    """
    say = html.escape
    picture = base64.b64encode(png).decode("ascii")
    failed = "" if all(claim.holds for claim in claims) else " failed"
    items = "".join(
        f'<li class="{"holds" if claim.holds else "fails"}">{say(claim.text)}</li>\n'
        for claim in claims
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>burst_jax demo</title>
<style>{_STYLE}</style>
<h1>burst_jax: exact attention over a spread-out sequence</h1>
<p class="verdict{failed}">{say(verdict)}</p>
<ul>
{items}</ul>
<p>Next: {say(next_step)}</p>
<img alt="Losses of the two runs, and bytes that each strategy sends"
 src="data:image/png;base64,{picture}">
{"".join(_table(table) for table in tables)}
<ul class="notes">{"".join(f"<li>{say(note)}</li>" for note in notes)}</ul>
<h2>What ran</h2>
<ul>{"".join(f"<li>{say(fact)}</li>" for fact in facts)}</ul>
</html>
"""


def _table(table: Table) -> str:
    head = "".join(f"<th>{html.escape(column)}</th>" for column in COLUMNS)
    body = ""
    for row in table.rows:
        marked = ' class="chosen"' if row.chosen else ""
        body += f"<tr{marked}>"
        body += "".join(f"<td>{html.escape(cell)}</td>" for cell in cells(row)) + "</tr>\n"
    return f"<h2>{html.escape(table.shape.name)}</h2>\n<table><tr>{head}</tr>\n{body}</table>\n"
