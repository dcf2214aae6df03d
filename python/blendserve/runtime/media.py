"""The tokens of a prompt with pictures or videos, as the engine will count them.

A chat template leaves a placeholder for each. The model's processor puts text and special tokens in
its place, as many as its size asks for. What it puts there is learnt by running it once on a blank
picture of that size, or on the first video of it; the same text is then put into every prompt,
which is tokenised like any other.
"""

from __future__ import annotations

import logging
import re
from collections import OrderedDict
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from blendserve.batch.errors import reason_of
from blendserve.runtime.media_parts import IMAGE, Part, UnreadableMedia, parts_of, reading_processor
from blendserve.runtime.media_probe import (
    Expansion,
    Probe,
    ProbeFailed,
    Process,
    expanded,
    patch_elements,
)
from blendserve.runtime.prompt_data import MediaRun

logger = logging.getLogger(__name__)

# Sizes that are remembered, and that are learnt one by one before the model's own formula is
# trusted for the others, if it was right for all of these.
_REMEMBERED = 8192
_LEARNT = 256


class MediaReader:
    """Reads prompts with pictures. Safe to call from one worker thread.

    Args:
        mm_processor: SGLang's processor of the model.
        process: runs it on a text and sources.
    """

    def __init__(self, mm_processor: Any, process: Process) -> None:
        self._mm_processor = mm_processor = reading_processor(mm_processor)
        self._tokenizer = mm_processor._tokenizer
        elements = patch_elements(mm_processor.hf_config)
        self._probe = Probe(process, self._encode, self._decode, elements)
        self._known: OrderedDict[tuple[Any, ...], Expansion | None] = OrderedDict()
        self._formulas: dict[tuple[Any, ...], _Formula] = {}
        bos = getattr(self._tokenizer, "bos_token", None)
        adds_first = getattr(mm_processor, "_tokenizer_auto_adds_specials", False)
        self._bos = bos if bos and adds_first else None

    def read(self, adapted: Any) -> tuple[NDArray[np.int32], list[MediaRun]]:
        """Tokens of a request that SGLang's handlers have made, and where its pictures end.

        Returns:
            int32 [prompt_tokens], and the pictures in the order of the prompt.

        Raises:
            UnreadableMedia: it cannot be known, or the engine will refuse it.
        """
        turns = bool(getattr(self._mm_processor, "smart_rgb_conversion", False))
        parts = list(parts_of(adapted, turns=turns))
        if not isinstance(adapted.text, str):
            raise UnreadableMedia("only a prompt that is one text can have pictures")
        pieces, placed = self._placed(adapted.text, parts)
        expansions = []
        for at, part in placed:
            expansion = self._expansion(pieces[at], part, alone=len(parts) == 1)
            pieces[at] = expansion.text
            expansions.append(expansion)
        try:
            ids, owner = expanded(np.asarray(self._encode("".join(pieces))), expansions)
        except ProbeFailed as error:
            raise UnreadableMedia(str(error)) from error
        runs = []
        for number, ((_, part), expansion) in enumerate(zip(placed, expansions, strict=True)):
            mine = np.flatnonzero(owner == number)
            ids[mine] = part.token_id
            runs.append(MediaRun(int(mine[-1]) + 1, expansion.patches))
        return ids.astype(np.int32), runs

    def _placed(self, text: str, parts: list[Part]) -> tuple[list[str], list[tuple[int, Part]]]:
        """The text in pieces; which of them are placeholders, and of which part."""
        tokens = self._mm_processor.mm_tokens
        waiting: dict[str, list[Part]] = {}
        for part in reversed(parts):
            waiting.setdefault(part.kind, []).append(part)
        pieces, placed = [], []
        position = 0
        for match in re.finditer(tokens.get_combined_regex(), text):
            modality = tokens.get_modality_of_token(match[0])
            kind = modality.name.lower() if modality is not None else ""
            if not waiting.get(kind):
                raise UnreadableMedia("the text has more placeholders than there are pictures")
            pieces += [text[position : match.start()], match[0]]
            placed.append((len(pieces) - 1, waiting[kind].pop()))
            position = match.end()
        if any(waiting.values()):
            raise UnreadableMedia("the chat template leaves no place for a picture")
        return [*pieces, text[position:]], placed

    def _expansion(self, placeholder: str, part: Part, alone: bool) -> Expansion:
        shared = (placeholder, part.kind, part.options, alone)
        key = (*shared, part.size)
        if key in self._known:
            self._known.move_to_end(key)
        else:
            formula = self._formulas.setdefault(shared, _Formula(self._mm_processor))
            self._known[key] = formula.expansion(part) or self._learn(placeholder, part, alone)
            if (learnt := self._known[key]) is not None:
                formula.compare(part, learnt)
            if len(self._known) > _REMEMBERED:
                self._known.popitem(last=False)
        found = self._known[key]
        if found is None:
            raise UnreadableMedia("what the model's processor makes of a picture cannot be learnt")
        return found

    def _learn(self, placeholder: str, part: Part, alone: bool) -> Expansion | None:
        try:
            return self._probe.learn(placeholder, part, alone)
        except Exception as error:
            # Of any type: it runs the model's processor, which may refuse such a size.
            logger.warning(
                "lines with a %s of size %s are not planned: %s",
                part.kind,
                part.size,
                reason_of(error),
            )
            return None

    def _encode(self, text: str) -> list[int]:
        # As SGLang's processors do it: templates may have written the first token already.
        has_first = self._bos is not None and text.startswith(self._bos)
        return list(self._tokenizer.encode(text, add_special_tokens=not has_first))

    def _decode(self, ids: list[int]) -> str:
        return str(
            self._tokenizer.decode(
                ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
        )


class _Formula:
    """The model's own count of a picture's tokens, while it has been right for all that was
    learnt. For sizes beyond `_LEARNT`."""

    def __init__(self, mm_processor: Any) -> None:
        self._mm_processor = mm_processor
        self._sizes: set[tuple[float, ...]] = set()
        self._like: Expansion | None = None
        self._is_right = True

    def expansion(self, part: Part) -> Expansion | None:
        """By formula; None while it is not to be trusted."""
        if not self._is_right or len(self._sizes) < _LEARNT or self._like is None:
            return None
        tokens = self._count(part)
        patches = self._like.patches * tokens // int(self._like.counts[0])
        return Expansion(self._like.text, self._like.tokens, np.array([tokens]), patches)

    def compare(self, part: Part, learnt: Expansion) -> None:
        """Learn whether it is right for a size."""
        if not self._is_right or len(self._sizes) >= _LEARNT:
            return
        self._sizes.add(part.size)
        like = self._like = self._like or learnt
        try:
            self._is_right = (
                part.kind == IMAGE
                and len(learnt.counts) == 1
                and learnt.text == like.text
                and np.array_equal(learnt.tokens, like.tokens)
                and self._count(part) == learnt.counts[0]
                and learnt.patches * like.counts[0] == like.patches * learnt.counts[0]
            )
        except Exception:  # Of any type; many processors have none.
            self._is_right = False

    def _count(self, part: Part) -> int:
        height, width = part.size
        picture = SimpleNamespace(height=int(height), width=int(width))
        return int(self._mm_processor.resolve_image_token_counts([picture])[0])
