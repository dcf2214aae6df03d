"""The plan data that travels with a request of a job, from the front process to the scheduler.

``sampling_params.custom_params`` is the one field of a request that SGLang carries unchanged
through HTTP, tokenizer and scheduler; it holds scalars under keys of ours.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from blendserve.planner import Side
from blendserve.planner.prefix_tree import Floats
from blendserve.runtime.next_use import UseTag

# Set on SGLang's request object when it arrives with a plan tag: the tag.
PLAN_ATTRIBUTE = "blendserve_plan"
_PREFIX = "blendserve_"
# As text: numbers separated by commas; "rid:tokens:likely tokens", separated by blanks.
_LIKELY = "blendserve_likely_output_tokens"
_UPDATES = "blendserve_updates"
_NUMBERS = (
    *("rank", "density", "output_tokens"),
    *("compute_seconds", "memory_seconds", "rest_compute_seconds", "rest_memory_seconds"),
)
# JSON has no infinity; a density this high is compute-bound on any hardware.
_LARGEST_DENSITY = 1e12


@dataclass(frozen=True)
class LengthUpdate:
    """What a new plan expects of a request that was sent before it.

    Attributes:
        rid: SGLang's id of the request.
        output_tokens: expected output, what it has produced so far included.
        likely_output_tokens: as in the plan tag.
    """

    rid: str
    output_tokens: float
    likely_output_tokens: tuple[float, ...]


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
        compute_seconds, memory_seconds: that it will take by the cost model, what it shares with
            the request before it in the plan left out.
        rest_compute_seconds, rest_memory_seconds: those of all that had not been dispatched of any
            job right after it.
        use: who needs its prefixes next; the radix cache reads that from the request by itself.
        updates: of other requests. They travel with this one because only what comes as a request
            reaches all tensor-parallel ranks at the same step.
    """

    side: Side
    rank: int
    density: float
    output_tokens: float
    likely_output_tokens: tuple[float, ...] = ()
    compute_seconds: float = 0.0
    memory_seconds: float = 0.0
    rest_compute_seconds: float = 0.0
    rest_memory_seconds: float = 0.0
    use: UseTag | None = None
    updates: tuple[LengthUpdate, ...] = ()

    def to_params(self) -> dict[str, str | int | float]:
        """Scalars for ``custom_params``."""
        return {
            f"{_PREFIX}side": self.side.value,
            f"{_PREFIX}rank": self.rank,
            f"{_PREFIX}density": _finite(self.density),
            f"{_PREFIX}output_tokens": float(self.output_tokens),
            f"{_PREFIX}compute_seconds": float(self.compute_seconds),
            f"{_PREFIX}memory_seconds": float(self.memory_seconds),
            f"{_PREFIX}rest_compute_seconds": float(self.rest_compute_seconds),
            f"{_PREFIX}rest_memory_seconds": float(self.rest_memory_seconds),
            **(self.use.to_params() if self.use is not None else {}),
            **({_LIKELY: _joined(self.likely_output_tokens)} if self.likely_output_tokens else {}),
            **({_UPDATES: _written(self.updates)} if self.updates else {}),
        }

    @classmethod
    def from_params(cls, params: Mapping[str, Any] | None) -> PlanTag | None:
        """The tag in a request's ``custom_params``, or None if it is not a planned request."""
        if not params or f"{_PREFIX}side" not in params:
            return None
        try:
            numbers = [float(params[f"{_PREFIX}{name}"]) for name in _NUMBERS]
            side = Side(params[f"{_PREFIX}side"])
            likely = _split(str(params.get(_LIKELY, "")))
            updates = _read(str(params.get(_UPDATES, "")))
        except (KeyError, TypeError, ValueError, OverflowError):
            # A client wrote these keys itself. Its request is served, as any online request.
            return None
        if not all(math.isfinite(number) and number >= 0 for number in numbers):
            return None
        rank, density, output_tokens, *seconds = numbers
        compute, memory, rest_compute, rest_memory = seconds
        return cls(
            *(side, int(rank), density, output_tokens, likely),
            *(compute, memory, rest_compute, rest_memory),
            updates=updates,
        )


def without_tag(params: Mapping[str, Any]) -> dict[str, Any] | None:
    """What of a request's ``custom_params`` is not ours; None if that is nothing.

    SGLang adds the request itself to the parameters (``__req__``). Left there, each request would
    be part of a cycle of references that only the garbage collector can break.
    """
    rest = {key: value for key, value in params.items() if not key.startswith(_PREFIX)}
    return rest if rest.keys() - {"__req__"} else None


def _written(updates: tuple[LengthUpdate, ...]) -> str:
    return " ".join(
        f"{update.rid}:{update.output_tokens:g}:{_joined(update.likely_output_tokens)}"
        for update in updates
    )


def _read(text: str) -> tuple[LengthUpdate, ...]:
    """Raises ValueError for a text that `_written` did not write."""
    updates = []
    for item in text.split():
        rid, tokens, likely = item.rsplit(":", 2)
        update = LengthUpdate(rid, float(tokens), _split(likely))
        if not 0 <= update.output_tokens < math.inf:
            raise ValueError(item)
        updates.append(update)
    return tuple(updates)


def likely_tokens(lengths: Floats) -> tuple[float, ...]:
    """A plan's likely output tokens of a request, as a tag has them."""
    likely: tuple[float, ...] = tuple(lengths.tolist())
    return likely if likely[0] < likely[-1] else ()


def _joined(lengths: tuple[float, ...]) -> str:
    return ",".join(f"{length:.0f}" for length in lengths)


def _split(text: str) -> tuple[float, ...]:
    """Raises ValueError for a text that `_joined` did not write."""
    lengths = tuple(map(float, text.split(","))) if text else ()
    if not all(0 <= length < math.inf for length in lengths) or list(lengths) != sorted(lengths):
        raise ValueError(text)
    return lengths


def _finite(density: float) -> float:
    return density if math.isfinite(density) and density < _LARGEST_DENSITY else _LARGEST_DENSITY
