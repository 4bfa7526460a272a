"""The command line: `burst-jax train | demo | doctor`.

Each command is a function of its arguments that returns the exit code. What the user got wrong is
one sentence on standard error and exit code 2; a traceback means that we did.
"""

import importlib
import sys
from collections.abc import Sequence
from typing import NamedTuple


class Command(NamedTuple):
    """A module with `run(arguments) -> exit code`, imported only when the command is called."""

    module: str
    summary: str


COMMANDS = {
    "train": Command("burst_jax.cli.train", "train a byte-level decoder on your own files"),
    "demo": Command("burst_jax.cli.demo", "see it work on simulated devices, in a few minutes"),
    "doctor": Command("burst_jax.cli.doctor", "what this machine can run, and how to use it"),
}

USAGE = "\n".join(
    [
        "usage: burst-jax COMMAND [OPTIONS]",
        "",
        "Exact attention over a sequence that is spread over many devices.",
        "",
        *(f"  {name:8} {command.summary}" for name, command in COMMANDS.items()),
        "",
        "burst-jax COMMAND --help lists a command's options; burst-jax --version the version.",
    ]
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        arguments: the command and its arguments; None: the process's own.

    Returns:
        The exit code: 0; 1 if what was to be shown did not hold; 2 if the request was wrong.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if arguments else 2
    if arguments[0] == "--version":
        import burst_jax

        print(f"burst-jax {burst_jax.__version__}")
        return 0
    name, *rest = arguments
    if name not in COMMANDS:
        return _refuse(f"there is no command {name!r}; the commands are {', '.join(COMMANDS)}.")
    try:
        return importlib.import_module(COMMANDS[name].module).run(rest)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("rich", "tyro", "matplotlib"):
            raise
        return _refuse(
            f"burst-jax {name} needs {error.name}, which is not installed; "
            f'pip install "burst-jax[train,plots]".'
        )
    except BadRequest as error:
        return _refuse(str(error))
    except SystemExit as end:  # tyro's, after --help or an argument that cannot be
        return end.code if isinstance(end.code, int) else 2
    except KeyboardInterrupt:
        print("\nburst-jax: interrupted.", file=sys.stderr)
        return 130


class BadRequest(Exception):
    """What the user asked for cannot be done; the message says why and what can."""


def _refuse(message: str) -> int:
    print(f"burst-jax: {message}", file=sys.stderr)
    return 2
