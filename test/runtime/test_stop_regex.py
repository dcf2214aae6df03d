"""A pattern at which an answer stops must not hold up the scheduler that searches for it."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from blendserve.runtime.stop_regex import check_stop_regex

GOOD = [
    "",
    ".",
    "a+",
    "\\d{3}",
    "</answer>\\s*$",
    "Question:.*\\n{1,3}",
    "(?:ab|cd)+",
    "(?:\\n|;)+",
    "(ab){2,5}",
    "a{1000000}",
    "a?b?c?",
    "a{0,20}b{0,20}c{0,20}",
    "(?i)é",
    "(?P<q>['`]).{0,99}(?P=q)",
    "(?<=x)end",
    "x" * 256,
]
# What a search for them can meet, and does not come back from.
CATASTROPHIC = {
    "(a+)+$": "a" * 40 + "b",
    "(a*)*b": "a" * 40,
    "(?:a|a)+$": "a" * 40 + "b",
    "(a|ab|b)*$": "ab" * 40 + "c",
    "(a|aa)+$": "a" * 60 + "b",
    "(a?){40}b": "a" * 40,
    "(a{1,9}){1,40}$": "a" * 60 + "b",
    "(?:a{1,2})+$": "a" * 60 + "b",
    "(?i)(?:ab|AB)+$": "ab" * 40 + "c",
    "((?=(a+)+$)x|y)": "a" * 40 + "b",
    "(?>(a+)+$)": "a" * 40 + "b",
}
SLOW = ["a*a*a*b", ".*.*.*x", "(.*)=(.*)", "\\s*\\w+\\s*$", "(?:x+x+)+y"]


@pytest.mark.parametrize("pattern", GOOD)
def test_ordinary_patterns_pass(pattern: str) -> None:
    check_stop_regex(pattern)


@pytest.mark.parametrize("pattern", [*CATASTROPHIC, *SLOW])
def test_patterns_that_may_take_for_ever_are_refused(pattern: str) -> None:
    re.compile(pattern)
    with pytest.raises(ValueError, match=r"in too many ways.*small upper bound"):
        check_stop_regex(pattern)


@pytest.mark.parametrize("pattern", ["(a+)+$", "(a|aa)+$", "(a?){40}b"])
def test_they_do_take_for_ever(pattern: str) -> None:
    search = "import re, sys; re.search(sys.argv[1], sys.argv[2])"
    command = [sys.executable, "-S", "-c", search, pattern, CATASTROPHIC[pattern]]
    with pytest.raises(subprocess.TimeoutExpired):
        subprocess.run(command, timeout=1, check=False)


@pytest.mark.parametrize("pattern", ["(", "[", "(?<=a+)b", "a{99999999999}", "\\p{L}"])
def test_what_is_no_expression_is_refused(pattern: str) -> None:
    with pytest.raises(ValueError, match="is no regular expression"):
        check_stop_regex(pattern)


def test_a_pattern_has_a_length() -> None:
    with pytest.raises(ValueError, match="256 characters; this one has 257"):
        check_stop_regex("x" * 257)
