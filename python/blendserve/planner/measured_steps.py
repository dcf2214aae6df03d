"""Steps of an engine that was measured with a model, four numbers each, as a hardware file has them
(`blendserve calibrate` writes it)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .model_spec import ModelSpec

_ROUNDS = 20
# A step that took so many times as long as its terms say is no step alone: a wait for requests, the
# first chunk of a server's life.
_UNUSUAL = 2.0
_LEAST_STEPS = 20

Floats = NDArray[np.float64]


class UnusableSteps(ValueError):
    """Steps that say nothing, or fields that are not right; says which."""


@dataclass(frozen=True)
class MeasuredSteps:
    """model: its name, for people. total_params, layers: what it is known by. ranks: tensor
    parallel. Seconds: of a token's GEMMs; of prefill attention by end^2 - begin^2; of decode
    attention by the token of context; of reading the weights, which no step undercuts. error: mean
    part by which steps are off. steps: how many were measured."""

    model: str
    total_params: int
    layers: int
    ranks: int
    token_seconds: float
    pair_seconds: float
    context_seconds: float
    weight_seconds: float
    error: float
    steps: int

    @classmethod
    def read(cls, given: Any) -> MeasuredSteps:
        """From a file's object. Raises UnusableSteps."""
        names = [field.name for field in fields(cls)]
        if not isinstance(given, Mapping) or set(given) != set(names):
            raise UnusableSteps(f"each entry is an object with {', '.join(names)}")
        for name in names[1:]:
            value = given[name]
            whole = name in ("total_params", "layers", "ranks", "steps")
            good = type(value) is int or (type(value) is float and not whole)
            if not good or not 0 <= value < math.inf:
                raise UnusableSteps(
                    f"{name} is {value!r}; it must be a number that is not negative"
                )
        if not given["token_seconds"] > 0 or not given["ranks"] > 0:
            raise UnusableSteps("token_seconds and ranks must be above 0")
        return cls(**{**given, "model": str(given["model"])})

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def fits(self, model: ModelSpec, ranks: int) -> bool:
        """Whether these are steps of this model on so many devices."""
        mine = (self.total_params, self.layers, self.ranks)
        return mine == (int(model.total_params), model.shape.num_layers, ranks)


@dataclass(frozen=True)
class StepTerms:
    """See `MeasuredSteps`; variance_explained, mean_error: how well they explain the steps that
    were taken for usual, `steps`; `left_out` were not."""

    token_seconds: float
    pair_seconds: float
    context_seconds: float
    weight_seconds: float
    variance_explained: float
    mean_error: float
    steps: int
    left_out: int


def fit_steps(seconds: Floats, work: Floats) -> StepTerms:
    """Terms of a step, max(weight, tokens x token) + context x context + pairs x pair, by least
    squares, none of them negative.

    Args:
        seconds: (n,) of each step.
        work: (n, 3): tokens in its GEMMs, context of its decodes, pairs of its prefill attention.

    Raises:
        UnusableSteps: too few of them.
    """
    if len(seconds) < _LEAST_STEPS:
        raise UnusableSteps(f"{len(seconds)} steps are too few; at least {_LEAST_STEPS} are needed")
    tokens = work[:, 0]
    floor, usual = tokens <= np.median(tokens), np.ones(len(seconds), dtype=bool)
    fitted = seconds
    found = np.zeros(4)
    for _ in range(_ROUNDS):  # Which steps wait for weights, and what each kind takes, in turn.
        columns = np.column_stack((floor, np.where(floor, 0, tokens), work[:, 1:]))
        active = [k for k in range(4) if columns[:, k].any()]
        while True:
            found = np.zeros(4)
            solution = np.linalg.lstsq(columns[usual][:, active], seconds[usual], rcond=None)
            found[active] = solution[0]
            if (found >= 0).all():
                break
            active.remove(int(found.argmin()))
        weight, token = float(found[0]), float(found[1])
        fitted = np.maximum(weight, tokens * token) + work[:, 1:] @ found[2:]
        floor, usual = tokens * token < weight, seconds < _UNUSUAL * fitted
    left = seconds[usual] - fitted[usual]
    return StepTerms(
        token_seconds=float(found[1]),
        pair_seconds=float(found[3]),
        context_seconds=float(found[2]),
        weight_seconds=float(found[0]),
        variance_explained=float(1 - np.var(left) / np.var(seconds[usual])),
        mean_error=float(np.abs(left).sum() / seconds[usual].sum()),
        steps=int(usual.sum()),
        left_out=int((~usual).sum()),
    )
