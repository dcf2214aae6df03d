"""What prompts say about output lengths apart from their place in the tree: their own length, and
that of a longer prompt of the same job that goes on from them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .prefix_tree import Floats, Ints, PrefixTree

Bools = NDArray[np.bool_]

# A family, the smallest subtree with this many answers, has factors and a distribution of its own.
FAMILY_ANSWERS = 16
# Before their answers tell, parts of a whole are taken to be alike, with the weight of one answer.
ALIKE_ANSWERS = 1.0
# Lengths within a factor of sqrt(2) stand in one bin.
BINS_PER_OCTAVE = 2.0


def length_bins(tree: PrefixTree) -> tuple[Ints, Ints]:
    """Two bins of each leaf, (n,) each: by prompt length, and by how much longer its continuation
    is (0 for none)."""
    return (_bin(tree.length), _bin(continuation_tokens(tree)))


def continuation_tokens(tree: PrefixTree) -> Ints:
    """(n,) by how many tokens the next longer prompt that starts with the whole of this one exceeds
    it; 0 where there is none.

    In a job of conversations, one request per turn, the next turn holds the answer to this one and
    what the user said to it.
    """
    n = tree.num_leaves
    more = np.zeros(n, dtype=np.int64)
    follows = np.flatnonzero(tree.shared[1:] == tree.length[:-1])
    more[follows] = tree.length[follows + 1] - tree.length[follows]
    # Identical prompts stand side by side, only the last of them next to the longer one.
    last = np.arange(n)
    last[follows[more[follows] == 0]] = n
    nearest: Ints = more[np.minimum.accumulate(last[::-1])[::-1]]
    return nearest


def _bin(tokens: Ints) -> Ints:
    bins: Ints = np.floor(BINS_PER_OCTAVE * np.log2(tokens + 1.0)).astype(np.int64)
    return bins


def bin_factors(bins: Ints, family: Ints, families: int, ratio: Floats, seen: Bools) -> Floats:
    """(n,) by how much answers in this bin exceed their family's. All (n,): bin, number of the
    family, answer / expectation, whether there is an answer.

    The mean of a bin is drawn towards the family's by B = t / (t + v / n); t counts only as far
    as it exceeds what chance gives. 1 on average over the family's answers: what they add up to is
    the tree's to say.
    """
    width = int(bins.max()) + 1 if len(bins) else 1
    cell = family * width + bins
    used, index = np.unique(cell, return_inverse=True)
    owner = used // width

    def per(labels: Ints, weights: Floats, size: int) -> Floats:
        return np.bincount(labels[seen], weights=weights[seen], minlength=size).astype(np.float64)

    one = np.ones(len(ratio))
    n, total = per(family, one, families), per(family, ratio, families)
    mean = total / np.maximum(n, 1)
    deviation = (ratio - mean[family]) ** 2
    cell_n = per(index, one, len(used))
    cell_mean = per(index, ratio, len(used)) / np.maximum(cell_n, 1)
    scatter = per(family, deviation, families)
    within = per(family, (ratio - cell_mean[index]) ** 2, families)
    filled = np.bincount(owner[cell_n > 0], minlength=families)
    squares = np.bincount(owner, weights=cell_n**2, minlength=families)
    # One-way analysis of variance; the prior within-variance weighs as one answer.
    variance = scatter / np.maximum(n - 1, 1)
    v = (within + ALIKE_ANSWERS * variance) / (np.maximum(n - filled, 0) + ALIKE_ANSWERS)
    spread = n - squares / np.maximum(n, 1)
    chance = filled - 1 + np.sqrt(2 * np.maximum(filled - 1, 0))  # Chi square: mean + deviation.
    t = np.maximum(scatter - within - chance * v, 0.0) / np.maximum(spread, 1e-9)
    t = np.where((n >= FAMILY_ANSWERS) & (spread > 0), t, 0.0)
    denominator = cell_n * t[owner] + v[owner]
    weight = np.divide(
        cell_n * t[owner], denominator, out=np.zeros(len(used)), where=denominator > 0
    )
    base = np.where(mean > 0, mean, 1.0)[owner]
    factor = 1 + weight * (cell_mean / base - 1)
    fitted = per(family, factor[index], families)
    scale = np.divide(n, fitted, out=np.ones(families), where=fitted > 0)
    return np.asarray(factor[index] * scale[family])
