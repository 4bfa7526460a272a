"""Reads a TOML file into the schema of `config.py`; every error names the key and the file."""

import dataclasses
import difflib
import pathlib
import tomllib
from typing import TypeVar

from burst_jax.lm.config import TrainConfig, check_type, fields_of

Schema = TypeVar("Schema")


def load_config(path: str | pathlib.Path) -> TrainConfig:
    """The run that a TOML file describes; keys it lacks keep their defaults.

    Paths in the file's `data` and `output` are relative to the working directory, as on the
    command line.

    Raises:
        ValueError: no such file, unreadable, no TOML, an unknown key, or a value that its key
            cannot have.
    """
    path = pathlib.Path(path)
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"config file {path} does not exist.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"config file {path} cannot be read: {error}.") from error
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"config file {path} is not valid TOML: {error}.") from error
    return _build(TrainConfig, table, str(path))


def _build(schema: type[Schema], table: dict[str, object], where: str) -> Schema:
    """A dataclass from a TOML table; `where` names file and table in errors."""
    fields = fields_of(schema)
    values = {}
    for key, value in table.items():
        if key not in fields:
            raise ValueError(f"{where}: unknown key {key!r}; {_suggest(key, list(fields))}")
        kind = fields[key].type
        if isinstance(kind, type) and dataclasses.is_dataclass(kind) and isinstance(value, dict):
            value = _build(kind, value, f"{where}, table [{key}]")
        elif isinstance(value, list):
            value = tuple(value)
        elif kind is float and type(value) is int:
            value = float(value)
        values[key] = value
    try:
        for key, value in values.items():
            check_type(key, value, fields[key].type)
        return schema(**values)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _suggest(key: str, known: list[str]) -> str:
    close = difflib.get_close_matches(key, known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"the keys are {', '.join(known)}."
