"""SGLang's flags as its users write them: shortened, and in the file that --config names.

SGLang's parser takes any unambiguous beginning of a flag (`--tp 8`), and reads a YAML file of
flags. Here the one is written out and the other read, so that whoever looks for a flag afterwards
finds it under its own name. Run as a program, this prints SGLang's flags: so the front process,
which does not import SGLang, asks for them.
"""

from __future__ import annotations

import argparse
import functools
import json
import subprocess
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import yaml

CONFIG_FLAG = "--config"
# The spellings of one flag.
Flag = tuple[str, ...]


class ConfigFileError(ValueError):
    """The file of --config cannot be used; the message names it."""


def stock_flags() -> tuple[list[Flag], frozenset[str]]:
    """SGLang's flags, and the spellings of those without a value. Imports SGLang.

    Raises:
        UnsupportedSGLang: it cannot be imported on this machine.
    """
    from blendserve.runtime import cpu_platform, guard

    cpu_platform.activate()
    parser = argparse.ArgumentParser(add_help=False)
    guard.resolve("sglang.srt.server_args.ServerArgs").add_cli_args(parser)
    flags = [tuple(action.option_strings) for action in parser._actions if action.option_strings]
    switches = [
        option
        for action in parser._actions
        if isinstance(action, argparse._StoreTrueAction)
        for option in action.option_strings
    ]
    return flags, frozenset(switches)


def in_full(argv: Sequence[str], flags: Collection[Flag], own: Collection[str] = ()) -> list[str]:
    """The command line with each unambiguous beginning of a flag written out.

    Args:
        flags: SGLang's.
        own: further flags, which are taken as they stand only.
    """
    exact = {spelling for flag in flags for spelling in flag} | set(own)
    found = []
    for word in argv:
        name, equals, value = word.partition("=")
        if name.startswith("--") and len(name) > 2 and name not in exact:
            meant = {
                flag: spelling
                for flag in flags
                for spelling in reversed(flag)
                if spelling.startswith(name)
            }
            if len(meant) == 1:
                name = next(iter(meant.values()))
        found.append(f"{name}{equals}{value}")
    return found


def front_in_full(argv: Sequence[str], names: Collection[str]) -> list[str]:
    """As `in_full`, in a process without SGLang, for the flags that this process reads itself.

    SGLang is asked for its flags only if a word begins like one of `names`.
    """
    shortened = [
        name
        for word in argv
        if len(name := word.partition("=")[0]) > 2
        and name.startswith("--")
        and name not in names
        and any(full.startswith(name) for full in names)
    ]
    if not shortened:
        return list(argv)
    return in_full(argv, _told_flags(), own=names)


@functools.cache
def _told_flags() -> tuple[Flag, ...]:
    """SGLang's flags, from a process that imports it; none if it cannot be imported: the engine,
    which meets the same fault, tells of it."""
    asked = subprocess.run(
        [sys.executable, "-m", __name__], stdout=subprocess.PIPE, text=True, check=False
    )
    said = [] if asked.returncode else json.loads(asked.stdout.splitlines()[-1])
    return tuple(tuple(flag) for flag in said)


def read(
    parser: argparse.ArgumentParser, argv: Sequence[str]
) -> tuple[argparse.Namespace, list[str]]:
    """The flags that a parser knows, shortened or in the file of --config as well; and the rest of
    the command line. The parser takes no abbreviations itself. Raises ConfigFileError."""
    names = frozenset(parser._option_string_actions)
    flags = front_in_full(argv, names)
    return parser.parse_known_args([*config_flags(flags, names.__contains__), *flags])


def config_flags(argv: Sequence[str], wanted: Callable[[str], bool]) -> list[str]:
    """The flags that the file of --config gives, of those that are wanted.

    A truth value is written `--flag=true` or `--flag=false`; see `switches_set`.

    Raises:
        ConfigFileError: no file, several, or one that does not hold flags.
    """
    path = _config_path(argv)
    if path is None:
        return []
    if path.suffix.lower() not in (".yaml", ".yml"):
        raise ConfigFileError(f"--config {path}: SGLang takes a .yaml or .yml file")
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigFileError(f"--config {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigFileError(f"--config {path}: not YAML: {error}") from error
    found = {} if found is None else found
    if not isinstance(found, dict):
        raise ConfigFileError(f"--config {path}: must hold flags and their values, one a line")
    flags: list[str] = []
    for key, value in found.items():
        flag = f"--{key}"
        if not wanted(flag):
            continue
        if isinstance(value, bool):
            flags.append(f"{flag}={str(value).lower()}")
        elif isinstance(value, list):
            flags += [flag, *map(str, value)] if value else []
        else:
            flags += [flag, json.dumps(value) if isinstance(value, dict) else str(value)]
    return flags


def without_config(argv: Sequence[str]) -> list[str]:
    """The command line without --config and its file."""
    rest: list[str] = []
    words = iter(argv)
    for word in words:
        if word == CONFIG_FLAG:
            next(words, None)
        elif not word.startswith(f"{CONFIG_FLAG}="):
            rest.append(word)
    return rest


def switches_set(argv: Sequence[str], switches: Collection[str]) -> list[str]:
    """`--switch=true` as the switch alone, and `--switch=false` as nothing."""
    found = []
    for word in argv:
        name, _, value = word.partition("=")
        if name not in switches or value not in ("true", "false"):
            found.append(word)
        elif value == "true":
            found.append(name)
    return found


def _config_path(argv: Sequence[str]) -> Path | None:
    given = []
    for position, word in enumerate(argv):
        if word == CONFIG_FLAG:
            if position + 1 == len(argv):
                raise ConfigFileError("--config: give the file")
            given.append(argv[position + 1])
        elif word.startswith(f"{CONFIG_FLAG}="):
            given.append(word.partition("=")[2])
    if len(given) > 1:
        raise ConfigFileError(f"--config was given {len(given)} times; SGLang takes one file")
    return Path(given[0]) if given else None


if __name__ == "__main__":
    print(json.dumps(stock_flags()[0]))
