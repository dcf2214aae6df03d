"""What a scheduler may know about output lengths."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from blendserve.planner import LengthModel, PrefixTree
from blendserve.planner.length_model import LIKELY_LENGTHS

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


class LengthBook:
    """Expected output lengths of all requests, or the true ones.

    true: (n,) output tokens; known: tell them. outcomes: lengths that a request may have; 1: its
    mean only.
    """

    def __init__(
        self,
        tree: PrefixTree,
        true: Ints,
        max_output: Ints,
        known: bool = False,
        outcomes: int = LIKELY_LENGTHS,
    ) -> None:
        self.known = known
        self._outcomes = outcomes
        self._true = true
        if known:
            self._mean = true.astype(np.float64)
            self._table = self._mean[:, None]
            return
        self._model = LengthModel(tree, max_output, np.zeros(len(true), dtype=bool))
        self.learn({})

    def learn(self, finished: Mapping[int, int], running: Mapping[int, int] | None = None) -> None:
        """Estimates anew from these output lengths, and those so far of running requests."""
        if self.known:
            return
        self._model.fit(finished, running)
        self._mean = self._model.mean()
        if self._outcomes == 1:
            self._table = self._mean[:, None]
            return
        self._table = self._model.likely(self._outcomes)

    def observed(self, requests: Ints) -> dict[int, int]:
        """True lengths of these requests."""
        return dict(zip(requests.tolist(), self._true[requests].tolist(), strict=True))

    def mean(self, request: int) -> float:
        return float(self._mean[request])

    def means(self) -> Floats:
        return self._mean

    def outcomes(self, request: int) -> list[float]:
        """Lengths it may have, ascending and equally likely."""
        found: list[float] = self._table[request].tolist()
        return found

    def rest(self, request: int, done: int) -> list[float]:
        """The same, of what it will yet produce after `done` tokens; half as much again beyond all
        that it was expected to."""
        lengths = self.outcomes(request)
        if not done:
            return lengths
        return [length - done for length in lengths if length > done] or [0.5 * done + 1.0]
