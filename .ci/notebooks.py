"""Executes notebooks/*.py (jupytext, the truth) and renders each to the .ipynb beside it.

With `--check` nothing is written: each notebook must still run, and the cells of its .ipynb must be
those of its .py.
"""

import argparse
import re
import sys
import time
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"
CELL_LIMIT_S = 300  # a cell that takes longer hangs: a whole notebook is to run within two minutes


def sources(notebook: nbformat.NotebookNode) -> list[tuple[str, str]]:
    """The cells without what a run adds to them."""
    return [(cell.cell_type, cell.source.strip()) for cell in notebook.cells]


def render(script: Path) -> nbformat.NotebookNode:
    """Executes one notebook from its own folder, as a reader's Jupyter would."""
    notebook = jupytext.read(script)
    notebook.metadata["kernelspec"] = {
        "display_name": "Python 3",
        "language": "python",
        "name": "python3",
    }
    NotebookClient(
        notebook,
        timeout=CELL_LIMIT_S,
        record_timing=False,
        # Errors only: the kernel warns that it talks over an unencrypted port, which is local.
        extra_arguments=["--log-level=40"],
        resources={"metadata": {"path": str(script.parent)}},
    ).execute()
    # Cell ids are drawn anew at each run; numbered ones keep the rendering's history readable.
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{number}"
        cell.metadata.pop("lines_to_next_cell", None)  # jupytext's own note on the .py
    return notebook


def problem_with_rendering(script: Path) -> str | None:
    """Says how the committed .ipynb differs from its .py, if it does."""
    rendering = script.with_suffix(".ipynb")
    if not rendering.exists():
        return f"{rendering.name} is missing; `make notebooks` writes it."
    if sources(nbformat.read(rendering, as_version=4)) != sources(jupytext.read(script)):
        return f"{rendering.name} was rendered from another {script.name}; run `make notebooks`."
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    check = parser.parse_args().check
    scripts = sorted(NOTEBOOKS.glob("[0-9]*.py"))
    problems = [] if scripts else [f"{NOTEBOOKS} holds no notebook."]
    for script in scripts:
        print(f"{script.name} ...", end=" ", flush=True)
        begin = time.monotonic()
        try:
            notebook = render(script)
        except CellExecutionError as error:
            print("FAILED")
            problems.append(f"{script.name}:\n" + re.sub(r"\x1b\[[0-9;]*m", "", str(error)))
            continue
        print(f"{time.monotonic() - begin:.0f} s")
        if not check:
            nbformat.write(notebook, script.with_suffix(".ipynb"))
        elif problem := problem_with_rendering(script):
            problems.append(problem)
    if problems:
        sys.exit("\n".join(problems))


if __name__ == "__main__":
    main()
