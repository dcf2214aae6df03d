"""Regular expressions at which an answer stops, as far as the scheduler may search for them.

SGLang's scheduler searches the answers of all requests for them after every step, with Python's
own ``re``, which backtracks: one pattern can hold every request of the server up for years.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from re import _constants, _parser  # type: ignore[attr-defined]
from typing import Any

# SGLang's limit is on bytes; said here for releases that have none.
_MAX_CHARACTERS = 256
# An open end counts as so many repeats. That allows one of them, and some that are bounded.
_OPEN_END = 1000
_MAX_WAYS_BITS = math.log2(20 * _OPEN_END)

_REPEATS = frozenset({_constants.MAX_REPEAT, _constants.MIN_REPEAT, _constants.POSSESSIVE_REPEAT})


def check_stop_regex(pattern: str) -> None:
    """Raises ValueError: it is none, or one that may take too long."""
    if len(pattern) > _MAX_CHARACTERS:
        raise ValueError(
            f"stop_regex may have {_MAX_CHARACTERS} characters; this one has {len(pattern)}."
        )
    try:
        re.compile(pattern)
        bits = _ways_bits(_parser.parse(pattern))
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"stop_regex {pattern!r:.80} is no regular expression: {error}") from error
    if bits > _MAX_WAYS_BITS:
        raise ValueError(
            f"stop_regex {pattern!r:.80} can match one text in too many ways, and a search for it "
            "would hold up the engine. It may have one * or + that is not within another repeat; "
            "write other repeats with a small upper bound, as in a{0,9}, and no alternatives that "
            "begin alike within a repeat."
        )


def _ways_bits(pattern: Iterable[tuple[Any, Any]]) -> float:
    """The logarithm to base 2 of the ways that `re` may try at one place of a text, at the most."""
    return sum(_bits(kind, value) for kind, value in pattern)


def _bits(kind: Any, value: Any) -> float:
    if kind in _REPEATS:
        least, most, body = value
        most = min(most, _OPEN_END)
        return float(most * _ways_bits(body) + math.log2(max(most - least, 0) + 1))
    if kind is _constants.BRANCH:
        branches = value[1]
        bits = max(map(_ways_bits, branches))
        return bits if _differ_at_once(branches) else bits + math.log2(len(branches))
    if kind is _constants.SUBPATTERN:
        return _ways_bits(value[3])
    if kind is _constants.ATOMIC_GROUP:
        return _ways_bits(value)
    if kind in (_constants.ASSERT, _constants.ASSERT_NOT):
        return _ways_bits(value[1])
    if kind is _constants.GROUPREF_EXISTS:
        return sum(_ways_bits(branch) for branch in value[1:] if branch is not None)
    return 0.0


def _differ_at_once(branches: Sequence[Any]) -> bool:
    """Whether the first character tells which of the alternatives it is, whatever its case."""
    firsts = [branch[0] for branch in branches if len(branch)]
    letters = {chr(value).lower() for kind, value in firsts if kind is _constants.LITERAL}
    # Beyond ASCII, letters may be one without their case that are two in lower case.
    return len(letters) == len(branches) and all(map(str.isascii, letters))
