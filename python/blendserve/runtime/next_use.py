"""The future of a request's prefixes, as it travels to the radix cache: four ``custom_params``.

``blendserve_job`` names the job, ``blendserve_due`` is the request's own number in the job's
timetable, ``blendserve_since`` the number of the timetable's first request, and
``blendserve_next_uses`` the corners of the request's staircase as text: "prefix:side:due" separated
by blanks, the shortest prefix first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from blendserve.planner import NextUse, Side

_JOB = "blendserve_job"
_DUE = "blendserve_due"
_SINCE = "blendserve_since"
_NEXT_USES = "blendserve_next_uses"
_LETTERS = {Side.LEFT: "L", Side.RIGHT: "R"}
_SIDES = {letter: side for side, letter in _LETTERS.items()}


@dataclass(frozen=True)
class UseTag:
    """What the cache is told about one planned request.

    Attributes:
        job: name of its job; any text that no other job of this server has.
        side: the scanner that dispatched it.
        due: its number in the job's timetable. Numbers go on from plan to plan.
        since: number of the first request of the same timetable; what came before has been sent.
        next_uses: who needs its prefixes next, shortest prefix and soonest use first; what lies
            beyond the last is not needed again.
    """

    job: str
    side: Side
    due: int
    since: int
    next_uses: tuple[NextUse, ...]

    def to_params(self) -> dict[str, str | int]:
        """Scalars for ``custom_params``; the side travels in the plan tag."""
        corners = (f"{use.prefix_tokens}:{_LETTERS[use.side]}:{use.due}" for use in self.next_uses)
        return {_JOB: self.job, _DUE: self.due, _SINCE: self.since, _NEXT_USES: " ".join(corners)}

    @classmethod
    def from_params(cls, params: Mapping[str, Any] | None) -> UseTag | None:
        """The tag in a request's ``custom_params``; None without one, or if a client made it up."""
        if not params or _DUE not in params:
            return None
        try:
            due, since = int(params[_DUE]), int(params[_SINCE])
            job, side = str(params[_JOB]), Side(params["blendserve_side"])
            corners = [corner.split(":") for corner in str(params[_NEXT_USES]).split()]
            uses = tuple(
                NextUse(int(prefix), int(use_due), _SIDES[letter])
                for prefix, letter, use_due in corners
            )
        except (KeyError, TypeError, ValueError, OverflowError):
            return None
        return cls(job, side, due, since, uses) if _ascending(uses) else None


def _ascending(uses: Sequence[NextUse]) -> bool:
    prefixes = [0, *(use.prefix_tokens for use in uses)]
    return all(a < b for a, b in pairwise(prefixes))
