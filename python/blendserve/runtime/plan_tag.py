"""The plan data that travels with a request of a job, from the engine process to the scheduler.

``sampling_params.custom_params`` is the one field of a request that SGLang carries unchanged
through HTTP, tokenizer and scheduler. The tag is JSON text under one key of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Annotated, Any

import msgspec

from blendserve.planner import NextUse, Side
from blendserve.planner.prefix_tree import Floats

# Set on SGLang's request object when it arrives with a plan tag: the tag.
PLAN_ATTRIBUTE = "blendserve_plan"
KEY = "blendserve_plan"
# JSON has no infinity; a density this high is compute-bound on any hardware.
_LARGEST_DENSITY = 1e12

_Number = Annotated[float, msgspec.Meta(ge=0)]
_Count = Annotated[int, msgspec.Meta(ge=0)]


@dataclass(frozen=True)
class LengthUpdate:
    """What a new plan expects of a request that was sent before it.

    Attributes:
        rid: SGLang's id of the request.
        output_tokens: expected output, what it has produced so far included.
        likely_output_tokens, guessed: as in the plan tag.
    """

    rid: str
    output_tokens: _Number
    likely_output_tokens: tuple[_Number, ...]
    guessed: bool = False


@dataclass(frozen=True)
class UseTag:
    """What the radix cache is told about the future of a request's prefixes.

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
    due: _Count
    since: _Count
    next_uses: tuple[NextUse, ...]


@dataclass(frozen=True)
class PlanTag:
    """Where the plan puts one request.

    Attributes:
        side: the scanner that dispatched it.
        rank: position in dispatch order of that side, from 0; smaller goes first.
        density: compute density of its leaf, as the scanner sees it.
        output_tokens: estimated output length.
        likely_output_tokens: lengths that it may have, ascending, each as likely as the others;
            empty where the estimate is exact.
        guessed: nothing tells yet how long it gets (see `Plan`).
        compute_seconds, memory_seconds: that it will take by the cost model, what it shares with
            the request before it in the plan left out.
        rest_compute_seconds, rest_memory_seconds: those of all that had not been dispatched of any
            job right after it.
        use: who needs its prefixes next; for the radix cache.
        goes_on: of a program that runs already; it goes before those that have not begun.
        updates: of other requests. They travel with this one because only what comes as a request
            reaches all tensor-parallel ranks at the same step.
    """

    side: Side
    rank: _Count
    density: _Number
    output_tokens: _Number
    likely_output_tokens: tuple[_Number, ...] = ()
    guessed: bool = False
    compute_seconds: _Number = 0.0
    memory_seconds: _Number = 0.0
    rest_compute_seconds: _Number = 0.0
    rest_memory_seconds: _Number = 0.0
    use: UseTag | None = None
    goes_on: bool = False
    updates: tuple[LengthUpdate, ...] = ()

    def to_params(self) -> dict[str, str]:
        """For ``custom_params``."""
        finite = replace(self, density=min(self.density, _LARGEST_DENSITY))
        return {KEY: msgspec.json.encode(finite).decode()}

    @classmethod
    def from_params(cls, params: Mapping[str, Any] | None) -> PlanTag | None:
        """The tag in a request's ``custom_params``, or None if it is not a planned request."""
        text = params.get(KEY) if params else None
        if not isinstance(text, str):
            return None
        try:
            tag: PlanTag = _DECODER.decode(text)
        except (msgspec.MsgspecError, UnicodeEncodeError):
            # A client wrote the key itself. Its request is served, as any online request.
            return None
        return tag if tag.sound() else None

    def sound(self) -> bool:
        """Whether all that should ascend does."""
        uses = () if self.use is None else self.use.next_uses
        prefixes = (0, *(use.prefix_tokens for use in uses))
        likely = [self.likely_output_tokens, *(one.likely_output_tokens for one in self.updates)]
        return all(a < b for a, b in pairwise(prefixes)) and all(map(_ascending, likely))


_DECODER = msgspec.json.Decoder(PlanTag)


def without_tag(params: Mapping[str, Any]) -> dict[str, Any] | None:
    """What of a request's ``custom_params`` is not ours; None if that is nothing.

    SGLang adds the request itself to the parameters (``__req__``). Left there, each request would
    be part of a cycle of references that only the garbage collector can break.
    """
    rest = {key: value for key, value in params.items() if key != KEY}
    return rest if rest.keys() - {"__req__"} else None


def likely_tokens(lengths: Floats) -> tuple[float, ...]:
    """A plan's likely output tokens of a request, as a tag has them."""
    likely: tuple[float, ...] = tuple(lengths.tolist())
    return likely if likely[0] < likely[-1] else ()


def _ascending(lengths: Iterable[float]) -> bool:
    return all(a <= b < math.inf for a, b in pairwise((0.0, *lengths)))
