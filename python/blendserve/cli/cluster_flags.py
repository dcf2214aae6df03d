"""What several engines have in common on the command line: their addresses and their key."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

from blendserve.config import ConfigError

RAY_MISSING = (
    "--ray needs Ray: pip install 'blendserve[ray]', or requirements/ray.txt with --no-deps"
)
_MIN_KEY_CHARACTERS = 16


def read_key(path: str) -> str:
    """The key that a coordinator and its engines share. Raises ConfigError."""
    if not path:
        raise ConfigError(
            "engines on other machines need a key: give --cluster-key-file, a file that only you "
            "can read, with the same line on every machine (`openssl rand -hex 24 > FILE`)"
        )
    try:
        key = Path(path).read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--cluster-key-file {path} cannot be read: {error}") from error
    if len(key) < _MIN_KEY_CHARACTERS or any(char.isspace() for char in key):
        raise ConfigError(
            f"--cluster-key-file {path}: one line of at least {_MIN_KEY_CHARACTERS} characters"
        )
    return key


def engine_urls(text: str) -> list[str]:
    """The addresses in --engine-urls, with commas between. Raises ConfigError."""
    urls = [url.strip().rstrip("/") for url in text.split(",") if url.strip()]
    if not urls:
        raise ConfigError("--engine-urls: give at least one, as http://node-1:31000")
    for url in urls:
        try:
            parts = urlsplit(url)
            sound = parts.scheme in ("http", "https") and bool(parts.hostname) and bool(parts.port)
        except ValueError:
            sound = False
        if not sound or parts.path or parts.query or parts.username:
            raise ConfigError(f"--engine-urls: {url!r} is not like http://node-1:31000")
    if len(set(urls)) < len(urls):
        raise ConfigError("--engine-urls: each engine once")
    return urls


ENGINES_FLAGS = "--"
"""What comes after this on the coordinator's command line is for each engine."""


def partition_flags(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The coordinator's own flags, and the engines'."""
    words = list(argv)
    if ENGINES_FLAGS not in words:
        return words, []
    place = words.index(ENGINES_FLAGS)
    # The port is given to whatever is started, as the last flag.
    return [*words[:place], *words[-2:]], words[place + 1 : -2]
