"""Command-line options from a frozen dataclass: tyro reads them, the dataclass checks them."""

import argparse
from collections.abc import Sequence
from typing import TypeVar

import tyro

from burst_jax.cli import BadRequest
from burst_jax.lm.config import TrainConfig
from burst_jax.lm.config_file import load_config

Options = TypeVar("Options")


def parse(
    schema: type[Options], arguments: Sequence[str], *, command: str, default: Options | None = None
) -> Options:
    """Options as the arguments say them, the rest as in `default`. Exits with 2 if they cannot be.

    Args:
        schema: a dataclass; its docstring becomes the help.
        arguments: without the command's name.
        command: the command's name.
        default: None: the schema's own defaults.
    """
    default = schema() if default is None else default
    return tyro.cli(
        schema,
        prog=f"burst-jax {command}",
        args=list(arguments),
        default=default,
        config=(tyro.conf.FlagConversionOff,),
    )


def parse_train(arguments: Sequence[str]) -> TrainConfig:
    """Options of a run: those of `--config FILE`, if there is one, and the flags over them.

    Raises:
        BadRequest: the config file is missing or wrong.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    first.add_argument("--config")
    try:
        found, rest = first.parse_known_args(list(arguments))
        default = load_config(found.config) if found.config is not None else None
    except argparse.ArgumentError:
        raise BadRequest("--config needs the path of a TOML file.") from None
    except ValueError as error:
        raise BadRequest(str(error)) from error
    return parse(TrainConfig, rest, command="train [--config FILE]", default=default)
