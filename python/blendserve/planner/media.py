"""What the vision encoder computes for the pictures in prompts: paid once where they are shared.

To the prefix tree a picture is a run of tokens like any other. A request that finds all of the run
in the cache is spared the encoder, too, as SGLang keeps no other trace of the picture.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from .annotation import SavedSeconds
from .cost_model import CostModel
from .prefix_tree import Floats, Ints, PrefixTree

_SHIFT = 32  # A prompt has fewer tokens than 2^32.


@dataclass(frozen=True, eq=False)
class MediaRuns:
    """The k pictures in the prompts of a job.

    request: (k,) request index, ascending.
    end: (k,) the position behind a picture's last token, ascending within a request.
    patches: (k,) what the encoder computes on.
    """

    request: Ints
    end: Ints
    patches: Ints

    @staticmethod
    def none() -> MediaRuns:
        nothing = np.empty(0, dtype=np.int64)
        return MediaRuns(nothing, nothing, nothing)

    def __len__(self) -> int:
        return len(self.request)


@dataclass(frozen=True, eq=False)
class EncoderWork:
    """Seconds of the encoder in each prefix of each prompt.

    media: the pictures. seconds: (k,) of each.
    """

    media: MediaRuns
    seconds: Floats

    @staticmethod
    def of(cost_model: CostModel, media: MediaRuns) -> EncoderWork:
        return EncoderWork(media, cost_model.encoder_seconds(media.patches))

    def within(self, requests: Ints, tokens: NDArray[np.integer]) -> Floats:
        """(r,) seconds for the pictures that lie wholly in the first tokens of these requests."""
        if not len(self.media):
            return np.zeros(len(requests))
        low = np.searchsorted(self._places, requests << _SHIFT)
        ends = (requests << _SHIFT) + tokens.astype(np.int64)
        high = np.searchsorted(self._places, ends, side="right")
        return self._until[high] - self._until[low]

    def saved(self, cost_model: CostModel) -> SavedSeconds:
        """What finding a prefix in the cache saves: its prefill, and its pictures' encoder."""

        def seconds(tree: PrefixTree) -> Floats:
            prefill = cost_model.prefill_seconds_saved(tree.depth)
            if not len(self.media) or not tree.num_leaves:
                return prefill
            # Any of the leaves will do; those of a node have its prefix in common.
            leaf = np.minimum(tree.first, tree.num_leaves - 1)
            return prefill + self.within(tree.requests[leaf], tree.depth)

        return seconds

    def compute_seconds(
        self, cost_model: CostModel, requests: Ints, prompt: Ints, output: Floats
    ) -> Floats:
        """(r,) compute of these requests by themselves, the encoder's included."""
        return cost_model.compute_seconds(prompt, output) + self.within(requests, prompt)

    def saved_seconds(self, cost_model: CostModel, requests: Ints, cached: Ints) -> Floats:
        """(r,) what these requests save that find so many of their tokens in the cache."""
        return cost_model.prefill_seconds_saved(cached) + self.within(requests, cached)

    @cached_property
    def _places(self) -> Ints:
        return np.asarray((self.media.request << _SHIFT) + self.media.end)

    @cached_property
    def _until(self) -> Floats:
        return np.concatenate(([0.0], np.cumsum(self.seconds)))
