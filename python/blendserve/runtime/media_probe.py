"""What a model's processor puts in the place of a picture, learnt by running it once."""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from blendserve.runtime.media_parts import IMAGE, Part

Ints = NDArray[np.int64]
Encode = Callable[[str], list[int]]
# Kind, text and sources in; SGLang's MultimodalProcessorOutput out.
Process = Callable[[str, str, Sequence[Any]], Any]

# Words around the placeholder, which nothing that a processor writes has in it.
_BEFORE, _BETWEEN, _BEHIND = "Kilimanjaro", "Popocatepetl", "Matterhorn"


class ProbeFailed(RuntimeError):
    """The processor does something that this way of counting does not follow."""


@dataclass(frozen=True)
class Expansion:
    """What stands for one picture in a prompt.

    Attributes:
        text: in the place of the placeholder, with each run of one token as a single one.
        tokens: int64 [runs], those tokens, in order.
        counts: int64 [runs], how often each stands there.
        patches: of the vision encoder; 0: not known.
    """

    text: str
    tokens: Ints
    counts: Ints
    patches: int


@dataclass(frozen=True)
class Probe:
    """One way to learn: a processor, and how its prompts are tokenised.

    Attributes:
        process: SGLang's processor.
        encode, decode: its tokenizer; special tokens included.
        patch_elements: numbers that the encoder's features have for each patch; 0: not known.
    """

    process: Process
    encode: Encode
    decode: Callable[[list[int]], str]
    patch_elements: int

    def learn(self, placeholder: str, part: Part, alone: bool) -> Expansion:
        """Run the processor on blank pictures of the part's size, or on the video itself, which
        stands for all of its size.

        Args:
            alone: the part is the only one of its prompt; some processors cut up only those.

        Raises:
            ProbeFailed: what comes out is not what is learnt of it.
            Exception: of any type, out of the processor.
        """
        copies = 1 if alone else 2
        text = _BEFORE + placeholder + (_BETWEEN + placeholder) * (copies - 1) + _BEHIND
        found = self.process(part.kind, text, [blank(part)] * copies)
        ids = np.asarray(found.input_ids, dtype=np.int64)
        tokens, counts = _runs(ids, found.mm_items)
        if len(tokens) % copies or not len(tokens):
            raise ProbeFailed(f"{len(tokens)} runs of tokens for {copies} pictures")
        short = self.decode(_shortened(ids, found.mm_items).tolist())
        start = short.find(_BEFORE) + len(_BEFORE)
        end = short.find(_BETWEEN if copies > 1 else _BEHIND, start)
        if short.find(_BEFORE) < 0 or end < 0:
            raise ProbeFailed("the words around a placeholder do not come out again")
        each = len(tokens) // copies
        elements = sum(_elements(item) for item in found.mm_items)
        expansion = Expansion(
            text=short[start:end],
            tokens=tokens[:each],
            counts=counts[:each],
            patches=elements // copies // self.patch_elements if self.patch_elements else 0,
        )
        again = text.replace(placeholder, expansion.text)
        planned, _ = expanded(np.asarray(self.encode(again)), [expansion] * copies)
        if not np.array_equal(planned, ids):
            raise ProbeFailed("the prompt of a blank picture comes out differently")
        return expansion


def expanded(ids: Ints, expansions: Sequence[Expansion]) -> tuple[Ints, Ints]:
    """Tokens of a prompt with runs in full, and for each its expansion's number, -1 in text.

    Args:
        ids: int64 [n], of the prompt with the expansions' texts in it.
        expansions: in the prompt's order.

    Raises:
        ProbeFailed: the prompt has other media tokens than the expansions.
    """
    tokens = np.concatenate([one.tokens for one in expansions])
    counts = np.concatenate([one.counts for one in expansions])
    owner = np.repeat(np.arange(len(expansions)), [len(one.tokens) for one in expansions])
    at = np.flatnonzero(np.isin(ids, tokens))
    if not np.array_equal(ids[at], tokens):
        raise ProbeFailed("the text has tokens of its own that stand for pictures")
    times, owners = np.ones(len(ids), dtype=np.int64), np.full(len(ids), -1, dtype=np.int64)
    times[at], owners[at] = counts, owner
    return np.repeat(ids, times), np.repeat(owners, times)


def blank(part: Part) -> Any:
    """A source like the part's, with a picture of its size in one colour; a video as it is."""
    if part.kind != IMAGE:
        return part.source
    height, width = (int(side) for side in part.size)
    stream = BytesIO()
    Image.new("RGB", (width, height)).save(stream, "PNG", compress_level=1)
    url = "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()
    return url if isinstance(part.source, str) else replace(part.source, url=url)


def patch_elements(hf_config: Any) -> int:
    """Numbers in one patch of the features that a model's vision encoder gets; 0: not known."""
    hf_config = getattr(hf_config, "thinker_config", hf_config)
    vision = getattr(hf_config, "vision_config", None)
    size = getattr(vision, "patch_size", None)
    if not size:
        return 0
    channels = getattr(vision, "in_channels", None) or getattr(vision, "num_channels", None) or 3
    area = math.prod(size) if isinstance(size, list | tuple) else size * size
    return int(channels * area * (getattr(vision, "temporal_patch_size", None) or 1))


def _places(mm_items: Iterable[Any]) -> list[tuple[int, int]]:
    """First and last position of all runs, in order."""
    return sorted(tuple(place) for item in mm_items for place in item.offsets)


def _starts(ids: Ints, mm_items: Iterable[Any]) -> tuple[Ints, NDArray[np.bool_]]:
    """[n] number of the run that a token belongs to, -1 in text; true where one starts."""
    inside = np.full(len(ids), -1, dtype=np.int64)
    for number, (first, last) in enumerate(_places(mm_items)):
        inside[first : last + 1] = number
    changes = np.ones(len(ids), dtype=bool)
    changes[1:] = (ids[1:] != ids[:-1]) | (inside[1:] != inside[:-1])
    return inside, changes & (inside >= 0)


def _runs(ids: Ints, mm_items: Iterable[Any]) -> tuple[Ints, Ints]:
    inside, starts = _starts(ids, mm_items)
    first = np.flatnonzero(starts)
    number = np.cumsum(starts)[inside >= 0]
    return ids[first], np.bincount(number, minlength=len(first) + 1)[1:]


def _shortened(ids: Ints, mm_items: Iterable[Any]) -> Ints:
    inside, starts = _starts(ids, mm_items)
    return ids[(inside < 0) | starts]


def _elements(item: Any) -> int:
    feature = item.feature
    if isinstance(feature, list | tuple):
        return sum(math.prod(one.shape) for one in feature)
    return math.prod(feature.shape) if hasattr(feature, "shape") else 0
