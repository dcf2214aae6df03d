"""Requests of which no answer tells yet how long theirs will be.

A family is what stands under one node right below the root, if it is large enough for a request of
its own in the sample; all others are one family. Until a few of a family have been answered, any of
it may turn out to decode for thousands of steps: the short ones have ended, the long ones have not.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np
from numpy.typing import NDArray

from .length_sample import COVERED_REQUESTS
from .prefix_tree import Floats, Ints, PrefixTree

# Answers after which a family's lengths count as known.
KNOWN_ANSWERS = 4
# Until then, each of it may grow to so many times the longest so far, of so many tokens at least.
UNCERTAIN_GROWTH = 4
UNCERTAIN_TOKENS = 1_024
# The longest length that a guess may have, over the shortest.
GUESSED_RANGE = 64.0
# A request of unknown length is a long decode from here on.
LONG_TOKENS = 256


def families(tree: PrefixTree) -> Ints:
    """(n,) by request: the node right below the root that it stands under; 0 for small ones."""
    top = np.zeros(tree.num_nodes, dtype=np.int64)
    for nodes in tree.levels[1:]:
        above = tree.parent[nodes]
        top[nodes] = np.where(above == 0, nodes, top[above])
    top[(tree.end - tree.first)[top] < COVERED_REQUESTS] = 0
    family = np.empty(tree.num_leaves, dtype=np.int64)
    family[tree.requests] = top[tree.leaf_parent]
    return family


def guessed(family: Ints, answered: Collection[int], limit: Ints) -> NDArray[np.bool_]:
    """(n,) whether a request's length is a guess, and may be a long one.

    family: of `families`. answered: requests. limit: (n,) output tokens at most.
    """
    answers = np.bincount(family[list(answered)], minlength=int(family.max(initial=0)) + 1)
    found: NDArray[np.bool_] = (answers[family] < KNOWN_ANSWERS) & (limit > LONG_TOKENS)
    return found


def longest_guesses(family: Ints, running: Mapping[int, int], limit: Ints) -> Floats:
    """(n,) how long each may get, if its length is a guess.

    To plan with, guesses are taken to be so long, and stand at the memory end: short requests lose
    little there, long ones would lose much at the other.

    family: of `families`. running: output tokens so far. limit: (n,) output tokens at most.
    """
    longest = np.zeros(int(family.max(initial=0)) + 1)
    for request, tokens in running.items():
        at = family[request]
        longest[at] = max(longest[at], tokens)
    grown = UNCERTAIN_GROWTH * np.maximum(longest[family], UNCERTAIN_TOKENS)
    return np.asarray(np.minimum(grown, limit), dtype=np.float64)


def likely_guesses(longest: Floats, count: int) -> Floats:
    """(n, count) lengths that a guess may have, ascending and equally likely: of any magnitude up
    to the longest."""
    levels = (np.arange(count) + 0.5) / count
    return np.asarray(np.maximum(longest[:, None] * GUESSED_RANGE ** (levels - 1.0), 1.0))
