"""What the planner needs to know of a request, without SGLang: coordinators have it of engines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


class UnreadablePrompt(ValueError):
    """The server would refuse this body, or its prompt cannot be planned."""


@dataclass(frozen=True)
class MediaRun:
    """A picture in a prompt. `end`: the position behind its last token. `patches`: what the vision
    encoder computes on; 0: not known."""

    end: int
    patches: int


@dataclass(frozen=True)
class Prompt:
    """One request as the planner sees it.

    Attributes:
        token_ids: int32 [prompt_tokens]; a picture's tokens are ids that stand for it alone.
        max_output_tokens: the most that it may answer.
        ignore_eos: it will answer exactly that much.
        sequences: requests that the engine makes of it (n > 1 adds one that fills the cache).
        media: its pictures, in order.
    """

    token_ids: NDArray[np.int32]
    max_output_tokens: int
    ignore_eos: bool
    sequences: int
    media: Sequence[MediaRun] = ()
