"""From a table of options to argparse, environment variables and YAML keys.

A settings class is a frozen dataclass whose fields are made with `option(...)`: default, help, unit
and parser live in the field's metadata, and nowhere else. Precedence: command line, environment
(`PDSERVE_<NAME>`), YAML file, default. Whatever is wrong ends in a sentence and exit code 2.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import yaml

from pdserve.cluster.foreign_options import explained
from pdserve.protocol.errors import PdserveError

ENVIRONMENT_PREFIX = "PDSERVE_"
EXIT_USAGE = 2
"""Exit code of every process that was given something it cannot work with."""
EXIT_INTERRUPTED = 130
"""Ctrl-C before a command had begun, or while it waited; 128 + SIGINT, as shells say it."""


class SettingsError(PdserveError):
    """A setting that is unknown, malformed or contradicts another."""


@dataclass(frozen=True, slots=True)
class Option:
    """How one setting is written, checked and explained."""

    help: str
    parse: Callable[[str], Any]
    """From text to value; raises ValueError with the rule that the text breaks."""
    unit: str
    many: bool
    choices: tuple[str, ...]
    shown: str
    """The default, for people."""
    secret: bool
    """Not offered on the command line, which every user of the machine can read."""
    hidden: bool = False
    """For developers: works everywhere but is not in --help."""


def option(
    default: Any,
    help: str,
    *,
    parse: Callable[[str], Any] = str,
    unit: str = "",
    many: bool = False,
    choices: Sequence[str] = (),
    shown: str = "",
    secret: bool = False,
    hidden: bool = False,
) -> Any:
    """A dataclass field that is also an option. `many`: a tuple of values, each parsed alone."""
    if isinstance(default, bool):
        parse = boolean
    if choices:
        parse = one_of(choices)
    shown = shown or (" ".join(map(str, default)) if many else str(default)) or "none"
    row = Option(help, parse, unit, many, tuple(choices), shown, secret, hidden)
    return dataclasses.field(default=default, metadata={"option": row})


Table = dict[str, Option]


def options_of(settings: type[Any], without: Sequence[str] = ()) -> Table:
    """The options of a settings class by field name."""
    return {
        field.name: field.metadata["option"]
        for field in dataclasses.fields(settings)
        if "option" in field.metadata and field.name not in without
    }


# parsers


def integer(low: int, high: int = 2**63 - 1) -> Callable[[str], int]:
    """Parser for whole numbers from `low` to `high`."""

    def parse(text: str) -> int:
        limits = f"from {low} to {high}" if high < 2**63 - 1 else f"of at least {low}"
        try:
            value = int(text)
        except ValueError:
            raise ValueError(f"must be a whole number {limits}; given: {text!r}") from None
        if not low <= value <= high:
            raise ValueError(f"must be a whole number {limits}; given: {value}")
        return value

    return parse


def seconds(low: float, unit: str = "seconds") -> Callable[[str], float]:
    """Parser for a duration in seconds, or another unit, of at least `low`."""

    def parse(text: str) -> float:
        rule = f"must be a number of {unit} of at least {low:g}; given: {text!r}"
        try:
            value = float(text)
        except ValueError:
            raise ValueError(rule) from None
        if not low <= value < float("inf"):
            raise ValueError(rule)
        return value

    return parse


_SIZES = {"": 1, "B": 1} | {
    f"{prefix}{suffix}": base**power
    for power, prefix in enumerate("KMGT", start=1)
    for suffix, base in (("B", 1000), ("iB", 1024))
}


def share(text: str) -> float:
    """A number above 0 and up to 1."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise ValueError(f"must be a number above 0 and up to 1; given: {text!r}")
    return value


def size(text: str) -> int:
    """Bytes from "1GiB", "512MiB", "2GB" or "1073741824"."""
    number = text.rstrip("BiKMGTkb")
    unit = text[len(number) :].strip().replace("k", "K").replace("b", "B")
    try:
        value = float(number) * _SIZES[unit]
    except (ValueError, KeyError):
        raise ValueError(
            f"must be a number of bytes such as 1GiB, 512MiB or 2GB; given: {text!r}"
        ) from None
    if not 1 <= value < 2**62:
        raise ValueError(f"must be at least 1 byte; given: {text!r}")
    return int(value)


def boolean(text: str) -> bool:
    """true / false and their usual other names."""
    if text.lower() in ("1", "true", "yes", "on"):
        return True
    if text.lower() in ("0", "false", "no", "off"):
        return False
    raise ValueError(f"must be true or false; given: {text!r}")


def one_of(choices: Sequence[str]) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in choices:
            raise ValueError(f"must be one of {', '.join(choices)}; given: {text!r}")
        return text

    return parse


def word(text: str) -> str:
    """Text without blanks and commas, which separate values in environment variables."""
    if not text or any(mark.isspace() or mark == "," for mark in text):
        raise ValueError(f"must not be empty nor hold blanks or commas; given: {text!r}")
    return text


def cores(text: str) -> int:
    """One core number (lists of them are options with `many`)."""
    return integer(0, 2**16)(text)


# sources


UNKNOWN = "unrecognized arguments: "
"""argparse's words before options that it does not know."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        told = explained(message.partition(UNKNOWN)[2])
        fail(self.prog, f"{message}. {told}" if told else message)


def fail(program: str, message: str) -> NoReturn:
    """Print one sentence and leave with EXIT_USAGE."""
    print(f"{program}: error: {message}", file=sys.stderr)
    print(f"See `{program} --help`.", file=sys.stderr)
    raise SystemExit(EXIT_USAGE)


def load(
    program: str,
    description: str,
    table: Table,
    argv: Sequence[str],
    environment: Mapping[str, str] | None = None,
    words: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """The values that were given for the options of `table`; those left to their defaults are
    absent. `words` are what must be given without a flag, in order: name → help. Prints a sentence
    and exits with code 2 if anything is wrong."""
    parser = make_parser(program, description, table)
    for name, text in (words or {}).items():
        parser.add_argument(name, metavar=name.upper(), help=text)
    given = vars(parser.parse_args(list(argv)))
    found = {name: given.pop(name) for name in words or ()}
    try:
        return found | _merge(table, given, os.environ if environment is None else environment)
    except SettingsError as error:
        fail(program, str(error))


def make_parser(program: str, description: str, table: Table) -> argparse.ArgumentParser:
    parser = _Parser(
        prog=program,
        description=description,
        allow_abbrev=False,
        epilog=_epilog(table),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="YAML file with these options as keys, e.g. `block-size: 16` "
        f"(default: none; environment: {ENVIRONMENT_PREFIX}CONFIG)",
    )
    for name, row in table.items():
        if not row.secret:
            parser.add_argument(
                flag(name), dest=name, default=argparse.SUPPRESS, **_shape(name, row)
            )
    return parser


def flag(name: str) -> str:
    """The command-line spelling of a field's name."""
    return "--" + name.replace("_", "-")


def _shape(name: str, row: Option) -> dict[str, Any]:
    """The argparse arguments of one option."""
    unit = f", in {row.unit}" if row.unit else ""
    text = f"{row.help}{unit} (default: {row.shown}; environment: {_variable(name)})"
    metavar = "|".join(row.choices) or name.upper()
    text = argparse.SUPPRESS if row.hidden else text.replace("%", "%%")
    if row.parse is boolean:
        return {"help": text, "nargs": "?", "const": "true", "metavar": "true|false"}
    if row.many:
        return {"help": text, "nargs": "+", "action": "extend", "metavar": metavar}
    return {"help": text, "metavar": metavar}


def _epilog(table: Table) -> str:
    lines = ["Precedence: command line, environment, YAML file, default."]
    lines += [
        f"Only by environment ({_variable(name)}) or YAML ({name.replace('_', '-')}): {row.help}"
        f" (default: {row.shown})"
        for name, row in table.items()
        if row.secret
    ]
    return "\n".join(lines)


def _variable(name: str) -> str:
    return ENVIRONMENT_PREFIX + name.upper()


def _merge(table: Table, given: dict[str, Any], environment: Mapping[str, str]) -> dict[str, Any]:
    path = given.pop("config", None) or environment.get(f"{ENVIRONMENT_PREFIX}CONFIG", "")
    values = _from_yaml(Path(path), table) if path else {}
    for name, row in table.items():
        if _variable(name) in environment:
            values[name] = _from_variable(name, row, environment[_variable(name)])
    for name, raw in given.items():
        values[name] = _parsed(table[name], raw, flag(name))
    return values


def _from_variable(name: str, row: Option, text: str) -> Any:
    variable = _variable(name)
    if "://" in text and text.startswith("tcp"):
        raise SettingsError(
            f"{variable}={text} looks like a link that Kubernetes sets for a Service named "
            "pdserve; give the Service another name or set enableServiceLinks: false."
        )
    raw = [part for part in text.split(",") if part] if row.many else text
    return _parsed(row, raw, variable)


def _from_yaml(path: Path, table: Table) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text()) or {}
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not text"
        raise SettingsError(f"The configuration file {path} cannot be read: {reason}.") from None
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise SettingsError(f"The configuration file {path} is not valid YAML: {reason}.") from None
    if not isinstance(content, dict):
        raise SettingsError(
            f"The configuration file {path} must hold `option: value` lines; "
            f"it holds a {type(content).__name__}."
        )
    values = {}
    for key, raw in content.items():
        name = str(key).replace("-", "_")
        if name not in table:
            raise SettingsError(_unknown_key(path, str(key), table))
        values[name] = _parsed(table[name], raw, f"`{key}` in {path}")
    return values


def _unknown_key(path: Path, key: str, table: Table) -> str:
    known = [name.replace("_", "-") for name in table]
    close = difflib.get_close_matches(key.replace("_", "-"), known, n=1)
    hint = f"did you mean {close[0]!r}?" if close else "--help lists the options."
    return f"The configuration file {path} has the unknown key {key!r}; {hint}"


def _listed(raw: Any) -> list[Any]:
    """The values of an option that takes many; each can itself be a list, as JSON."""
    found: list[Any] = []
    for item in raw if isinstance(raw, list) else [raw]:
        inner = None
        if isinstance(item, str) and item.startswith("["):
            with contextlib.suppress(ValueError):
                inner = json.loads(item)
        found += inner if isinstance(inner, list) else [item]
    return found


def _parsed(row: Option, raw: Any, source: str) -> Any:
    """One value from argparse (text or list of texts), the environment or YAML (any scalar)."""
    items = _listed(raw) if row.many else raw if isinstance(raw, list) else [raw]
    if not row.many and isinstance(raw, list):
        raise SettingsError(f"{source} takes one value; given: {len(raw)}.")
    texts = []
    for item in items:
        if item is None or isinstance(item, (list, dict)):
            raise SettingsError(f"{source} must be text or a number; given: {item!r}.")
        texts.append(str(item).lower() if isinstance(item, bool) else str(item))
    try:
        values = tuple(row.parse(text) for text in texts)
    except ValueError as error:
        raise SettingsError(f"{source} {error}.") from None
    return values if row.many else values[0]
