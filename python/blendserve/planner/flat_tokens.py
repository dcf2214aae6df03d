"""All prompts of a job in one array: 4 bytes a token and 8 a request, no object per prompt."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

Tokens = NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class FlatTokens(Sequence[Tokens]):
    """n prompts end to end. tokens: (N,) ids; offsets: (n + 1,), prompt r is
    tokens[offsets[r] : offsets[r + 1]]. As a sequence it yields views, not copies."""

    tokens: Tokens
    offsets: NDArray[np.int64]

    @staticmethod
    def of(prompts: Sequence[NDArray[Any]]) -> FlatTokens:
        """The prompts as they are if they are flat already, else copied into one array.

        Raises ValueError for a prompt that is not a 1-d array of integers in 0 .. 2^31 - 1.
        """
        if isinstance(prompts, FlatTokens):
            return prompts
        arrays = [np.asarray(ids) for ids in prompts]
        for index, array in enumerate(arrays):
            if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
                raise ValueError(f"prompt {index} must be a 1-d array of integer token ids")
            if array.size and array.dtype != np.int32 and int(array.max()) > 0x7FFFFFFF:
                raise ValueError(f"prompt {index} holds a token id outside 0 .. 2^31 - 1")
            if array.size and array.dtype.kind == "i" and array.itemsize > 4 and array.min() < 0:
                raise ValueError(f"prompt {index} holds a token id outside 0 .. 2^31 - 1")
        offsets = _ends(len(array) for array in arrays)
        tokens = np.empty(int(offsets[-1]), dtype=np.int32)
        for index, array in enumerate(arrays):
            tokens[offsets[index] : offsets[index + 1]] = array
        return FlatTokens.checked(tokens, offsets)

    @staticmethod
    def checked(tokens: NDArray[Any], offsets: NDArray[Any]) -> FlatTokens:
        """Of arrays from outside; int32 tokens are taken without a copy.

        Raises ValueError for tokens that are not 1-d integers in 0 .. 2^31 - 1, or offsets that do
        not run from 0 to the number of tokens without a step back.
        """
        tokens, offsets = np.asarray(tokens), np.asarray(offsets, dtype=np.int64)
        if tokens.ndim != 1 or (tokens.size and tokens.dtype.kind not in "iu"):
            raise ValueError("tokens must be a 1-d array of integer token ids")
        if offsets.ndim != 1 or not len(offsets) or offsets[0] != 0 or offsets[-1] != len(tokens):
            raise ValueError(f"offsets must be 1-d and run from 0 to {len(tokens)}")
        if np.any(offsets[1:] < offsets[:-1]):
            raise ValueError("offsets must not decrease")
        if tokens.size and (int(tokens.min()) < 0 or int(tokens.max()) > 0x7FFFFFFF):
            wrong = int(np.argmax((tokens < 0) | (tokens > 0x7FFFFFFF)))
            prompt = int(np.searchsorted(offsets, wrong, side="right")) - 1
            raise ValueError(f"prompt {prompt} holds a token id outside 0 .. 2^31 - 1")
        return FlatTokens(np.ascontiguousarray(tokens, dtype=np.int32), offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @overload
    def __getitem__(self, index: int) -> Tokens: ...
    @overload
    def __getitem__(self, index: slice) -> list[Tokens]: ...
    def __getitem__(self, index: int | slice) -> Tokens | list[Tokens]:
        if isinstance(index, slice):
            return [self[k] for k in range(*index.indices(len(self)))]
        n = len(self)
        if not -n <= index < n:
            raise IndexError(f"prompt {index} of {n}")
        index %= n
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]

    @property
    def lengths(self) -> NDArray[np.int64]:
        """(n,) tokens of each prompt."""
        return np.diff(self.offsets)


def _ends(lengths: Iterable[int]) -> NDArray[np.int64]:
    sizes = np.fromiter(lengths, dtype=np.int64)
    return np.concatenate((np.zeros(1, dtype=np.int64), np.cumsum(sizes)))
