"""Output lengths as distributions that learn while the job runs.

The paper gives a subtree the mean of its sampled requests. A mean of two answers is a poor one, so
here each subtree is drawn towards its parent as far as its few answers warrant (empirical Bayes),
prompt length counts where it tells, and what is still running counts as "longer than that".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from .length_estimator import DEFAULT_OUTPUT_TOKENS
from .length_factors import ALIKE_ANSWERS, FAMILY_ANSWERS, Bools, bin_factors, length_bins
from .prefix_tree import Floats, Ints, PrefixTree

# A node with fewer answers (unless the whole job has no more) cannot tell its children apart.
TELLING_ANSWERS = 8
# Before its answers tell, a child of a node is taken to be as spread within as its siblings are.
SPREAD_ANSWERS = 2.0
# Ratios to the mean that a family's distribution starts from: an exponential one, as four answers.
PRIOR_RATIOS = -np.log1p(-(np.arange(4) + 0.5) / 4)
# Equally likely lengths that stand for a request's distribution.
LIKELY_LENGTHS = 8
# Where requests are running, the longest lengths are known least. The last endings, this part of
# all and four at least, are pooled: beyond the one before them, lengths are taken as exponential.
TAIL_PART = 0.02
TAIL_ANSWERS = 4


# Of ratios (k,) ascending, those above the second (j,), limited to the third (j,): (j,).
_Statistic = Callable[[Floats, Floats, Floats], Floats]


@dataclass(frozen=True, eq=False)
class _Fit:
    """location: (n,) in leaf order, expected output tokens + 1 without a limit. family: (n,)
    number of each leaf's family; ratios: of each family, ascending, answers / location, mean 1."""

    location: Floats
    family: Ints
    ratios: list[Floats]


class LengthModel:
    """Lengths of the n requests of a tree. All arrays are (n,) by request index.

    max_output: limit of each. exact: true where the output is as long as its limit (ignore_eos, or
    a length known beforehand); such a request is no evidence for others, its length was imposed.
    Raises ValueError for requests that are not in the tree and negative lengths.
    """

    def __init__(self, tree: PrefixTree, max_output: Ints, exact: Bools) -> None:
        self._tree = tree
        self._limit = np.asarray(max_output, dtype=np.float64)
        self._exact = np.asarray(exact, dtype=bool)
        self._finished = np.full(tree.num_leaves, np.nan)
        self._running = np.full(tree.num_leaves, np.nan)
        self._fitted: _Fit | None = None

    def fit(
        self, finished: Mapping[int, int], running: Mapping[int, int] | None = None
    ) -> LengthModel:
        """Forgets what it knew and learns from these: output tokens of finished requests, and
        tokens so far of those still running. Returns itself."""
        self._finished[:] = np.nan
        self._running[:] = np.nan
        self._fitted = None
        for request, tokens in (running or {}).items():
            self.observe(request, tokens, finished=False)
        for request, tokens in finished.items():
            self.observe(request, tokens)
        return self

    def observe(self, request: int, tokens: int, finished: bool = True) -> None:
        """One more result, or, unless finished, "still running after this many tokens"."""
        if not 0 <= request < len(self._finished):
            n = len(self._finished)
            raise ValueError(f"observed request {request} is not in this job of {n} requests")
        if tokens < 0:
            raise ValueError(f"observed output of request {request} is negative: {tokens}")
        self._finished[request] = tokens if finished else np.nan
        self._running[request] = np.nan if finished else tokens
        self._fitted = None

    def mean(self) -> Floats:
        """Expected output tokens: E[min(Y, limit)], and given Y > k where k tokens are out."""
        return self._by_request(_mean_ratio)

    def quantile(self, q: float) -> Floats:
        """The length that a request stays within with probability q.

        Raises ValueError unless 0 <= q <= 1."""
        if not 0.0 <= q <= 1.0:
            raise ValueError(f"q must be between 0 and 1, not {q}")
        return self._by_request(
            lambda ratios, above, limit: np.minimum(_quantile_ratio(ratios, above, q), limit)
        )

    def likely(self, count: int = LIKELY_LENGTHS) -> Floats:
        """(n, count): lengths of each request, ascending, each as likely as the others."""
        levels = (np.arange(count) + 0.5) / count
        return np.stack([self.quantile(float(q)) for q in levels], axis=1)

    def deviation(self) -> Floats:
        """Standard deviation of each length, in tokens; 0 where it is known."""
        out = np.empty(self._tree.num_leaves)
        out[self._tree.requests] = self._by_leaf(_deviation_ratio)
        return np.where(self._exact | ~np.isnan(self._finished), 0.0, out)

    def _by_leaf(self, statistic: _Statistic) -> Floats:
        if self._fitted is None:
            self._fitted = self._fit()
        return self._unfinished(self._fitted, statistic, self._limit[self._tree.requests])

    def _by_request(self, statistic: _Statistic) -> Floats:
        out = np.empty(self._tree.num_leaves)
        out[self._tree.requests] = np.maximum(self._by_leaf(statistic) - 1, 0.0)
        out = np.where(self._exact, self._limit, out)
        out = np.where(np.isnan(self._running), out, np.maximum(out, self._running))
        out = np.where(np.isnan(self._finished), out, self._finished)
        return np.minimum(out, self._limit)

    def _unfinished(self, fit: _Fit, statistic: _Statistic, limit: Floats) -> Floats:
        """(n,) in leaf order: a statistic of output tokens + 1."""
        so_far = self._running[self._tree.requests]
        above = np.where(so_far > 0, so_far + 1, 0.0) / fit.location  # nan > 0 is false.
        ceiling = (limit + 1) / fit.location
        out = np.empty(len(limit))
        by_family = np.argsort(fit.family, kind="stable")
        ends = np.cumsum(np.bincount(fit.family, minlength=len(fit.ratios)))
        for members, ratios in zip(np.split(by_family, ends[:-1]), fit.ratios, strict=True):
            out[members] = statistic(ratios, above[members], ceiling[members])
        return out * fit.location

    def _fit(self) -> _Fit:
        requests = self._tree.requests
        usable = ~self._exact[requests]
        answers = np.where(usable, self._finished[requests], np.nan)
        so_far = np.where(usable & (self._running[requests] > 0), self._running[requests], np.nan)
        return _learn(self._tree, answers, so_far)


def _mean_ratio(ratios: Floats, above: Floats, limit: Floats) -> Floats:
    """E[min(Z, limit) | Z > above]. Beyond all that was seen, the rest is exponential with mean 1:
    as long again as the mean of all."""
    total = np.concatenate(([0.0], np.cumsum(ratios)))
    skipped = np.where(above > 0, np.searchsorted(ratios, above, side="right"), 0)
    cut = np.maximum(np.searchsorted(ratios, limit), skipped)
    count = len(ratios) - skipped
    over = (len(ratios) - cut) * np.minimum(limit, ratios[-1])
    inside = (total[cut] - total[skipped] + over) / np.maximum(count, 1)
    return np.asarray(np.where(count > 0, inside, np.minimum(above + 1.0, limit)))


def _deviation_ratio(ratios: Floats, above: Floats, limit: Floats) -> Floats:
    """Standard deviation of min(Z, limit) given Z > above; beyond all that was seen, that of the
    exponential rest or of what the limit leaves of it."""
    skipped = np.where(above > 0, np.searchsorted(ratios, above, side="right"), 0)
    count = len(ratios) - skipped
    cut = np.maximum(np.searchsorted(ratios, limit), skipped)
    capped = np.minimum(limit, ratios[-1])
    moments = []
    for power in (1, 2):
        total = np.concatenate(([0.0], np.cumsum(ratios**power)))
        inside = total[cut] - total[skipped] + (len(ratios) - cut) * capped**power
        moments.append(inside / np.maximum(count, 1))
    variance = np.maximum(moments[1] - moments[0] ** 2, 0.0)
    rest = np.clip(limit - above, 0.0, 1.0)
    return np.asarray(np.where(count > 0, np.sqrt(variance), rest))


def _quantile_ratio(ratios: Floats, above: Floats, q: float) -> Floats:
    """The q-quantile of Z given Z > above; beyond all that was seen, of an exponential tail."""
    skipped = np.where(above > 0, np.searchsorted(ratios, above, side="right"), 0)
    count = len(ratios) - skipped
    at = skipped + np.clip(np.ceil(q * count).astype(np.int64) - 1, 0, None)
    tail = above - np.log1p(-min(q, 1 - 1e-6))
    return np.asarray(np.where(count > 0, ratios[np.minimum(at, len(ratios) - 1)], tail))


def _learn(tree: PrefixTree, answers: Floats, so_far: Floats) -> _Fit:
    """All (n,) in leaf order. answers: lengths of finished requests, so_far: tokens of running
    ones, else nan."""
    ended, runs = ~np.isnan(answers), ~np.isnan(so_far)
    value = np.where(ended, answers, 0.0) + 1.0
    location, count = _shrunk_means(tree, value, ended)
    leaf_location = location[tree.leaf_parent]
    # The smallest subtree around a leaf with enough answers; the root, if there is none.
    enough = np.zeros(tree.num_nodes, dtype=np.int64)
    for nodes in tree.levels[1:]:
        enough[nodes] = np.where(count[nodes] >= FAMILY_ANSWERS, nodes, enough[tree.parent[nodes]])
    _, family = np.unique(enough[tree.leaf_parent], return_inverse=True)
    family = family.astype(np.int64)
    families = int(family.max()) + 1 if len(family) else 1
    for bins in length_bins(tree):
        factor = bin_factors(bins, family, families, value / leaf_location, ended)
        leaf_location = np.maximum(leaf_location * factor, 1.0)
    known = np.where(ended, value, so_far + 1) / leaf_location
    ratios = []
    scale = np.ones(families)
    for number, members in enumerate(_split(np.flatnonzero(ended | runs), family, families)):
        over = runs[members]
        lengths = np.concatenate((known[members[~over]], PRIOR_RATIOS))
        spread = _survivors(lengths, known[members[over]])
        # What has finished so far is short rather than long, and the locations rest on it.
        scale[number] = spread.mean() / lengths.mean()
        ratios.append(spread / spread.mean())
    return _Fit(leaf_location * scale[family], family, ratios)


def _split(leaves: Ints, family: Ints, families: int) -> list[Ints]:
    """The leaves of each family."""
    order = leaves[np.argsort(family[leaves], kind="stable")]
    return np.split(order, np.cumsum(np.bincount(family[leaves], minlength=families))[:-1])


def _survivors(lengths: Floats, exceeded: Floats) -> Floats:
    """Equally likely values, ascending, that stand for `lengths` together with others of which only
    the values that they exceed are known: the Kaplan-Meier estimate with an exponential tail."""
    if not len(exceeded):
        return np.sort(lengths)
    value = np.concatenate((lengths, exceeded))
    over = np.arange(len(value)) >= len(lengths)
    order = np.lexsort((over, value))
    value, over = value[order], over[order]
    pooled = max(TAIL_ANSWERS, int(TAIL_PART * len(lengths)))
    # The tail starts after the last ending before those that are pooled.
    start = int(np.flatnonzero(~over)[-pooled - 1]) if len(lengths) > pooled else 0
    mean_rest = float((value[start + 1 :] - value[start]).sum()) / pooled
    left = np.arange(len(value), 0, -1)
    survival = np.cumprod(np.where(over, 1.0, 1.0 - 1.0 / left))[: start + 1]
    chance = (np.arange(2 * len(value)) + 0.5) / (2 * len(value))
    at = np.searchsorted(1.0 - survival, chance)
    beyond = np.log(survival[-1] / (1.0 - chance)) * mean_rest
    return np.where(at <= start, value[np.minimum(at, start)], value[start] + np.maximum(beyond, 0))


def _shrunk_means(tree: PrefixTree, value: Floats, seen: Bools) -> tuple[Floats, Floats]:
    """(m,) expected value of a request right below each node and (m,) number of answers below it.

    A child with n answers of mean y, under a parent whose children are expected at u, is expected
    at  c y^B u^(1 - B),  B = t / (t + v / n),  with t the variance between the parent's children
    and v the one within the child, both of log lengths, as lengths of 2 and of 20,000 tokens stand
    side by side. A geometric mean is below the arithmetic one: c, the same for all children of a
    parent with many, restores the total that B y + (1 - B) u gives. u is the mean of the children
    weighted by B, so that a child with many requests does not speak for those with few.
    """
    log = np.log(value)

    def below(leaf_values: Floats) -> Floats:
        total = np.concatenate(([0.0], np.cumsum(np.where(seen, leaf_values, 0.0))))
        return np.asarray(total[tree.end] - total[tree.first])

    count = below(np.ones(len(value)))
    divisor = np.maximum(count, 1)
    mean = below(value) / divisor
    log_mean = below(log) / divisor
    scatter = np.maximum(below(log * log) - count * log_mean**2, 0.0)  # Sum of squares.
    scatter[scatter < 1e-9 * divisor] = 0.0

    m = tree.num_nodes
    above = tree.parent[1:]
    answered = count[1:] > 0
    scatter_within = np.bincount(above, weights=scatter[1:], minlength=m)
    freedom = np.bincount(above, weights=np.where(answered, count[1:] - 1, 0.0), minlength=m)
    variance = scatter / np.maximum(count - 1, 1)
    within = (scatter_within + ALIKE_ANSWERS * variance) / (freedom + ALIKE_ANSWERS)
    tells = count >= min(TELLING_ANSWERS, count[0])
    between = np.where(tells, np.maximum(variance - within, 0.0), 0.0)

    # Of each child; a request that hangs from the parent by itself is a child of one answer.
    t = between[above]
    v = (scatter[1:] + SPREAD_ANSWERS * within[above]) / (
        np.maximum(count[1:] - 1, 0) + SPREAD_ANSWERS
    )
    noise = v / divisor[1:]
    weight = np.concatenate(([0.0], _part(t, t + noise) * answered))
    alone = tree.leaf_parent[seen]
    alone_weight = _part(between, between + within)[alone]
    weights: Floats = np.bincount(above, weights=weight[1:], minlength=m).astype(np.float64)
    weights += np.bincount(alone, weights=alone_weight, minlength=m)
    weighted: Floats = np.bincount(above, weights=weight[1:] * mean[1:], minlength=m).astype(
        np.float64
    )
    weighted += np.bincount(alone, weights=alone_weight * value[seen], minlength=m)
    centre = np.where(weights > 0, _part(weighted, weights), mean)
    children = np.bincount(above[answered], minlength=m)

    expected = np.full(m, DEFAULT_OUTPUT_TOKENS + 1)
    if count[0] > 0:
        expected[0] = mean[0]
    asked, given = np.zeros(m), np.zeros(m)
    for nodes in tree.levels[1:]:
        up = tree.parent[nodes]
        # What is expected of a child of `up` that has no answers.
        typical = expected[up] * np.where(count[up] > 0, _part(centre[up], mean[up]), 1.0)
        b = weight[nodes]
        own = np.maximum(mean[nodes], 1.0)
        shrunk = np.exp(b * np.log(own) + (1 - b) * np.log(typical))
        linear = b * own + (1 - b) * typical
        np.add.at(asked, up, count[nodes] * linear)
        np.add.at(given, up, count[nodes] * shrunk)
        scale = np.where(children[up] >= TELLING_ANSWERS, _part(asked[up], given[up]), 1.0)
        expected[nodes] = np.where(count[nodes] > 0, shrunk * scale, typical)
    # Likewise of a request that hangs from its parent by itself.
    location = expected * np.where(count > 0, _part(centre, mean), 1.0)
    return location, count


def _part(numerator: Floats, denominator: Floats) -> Floats:
    """numerator / denominator, 0 where the denominator is."""
    out = np.zeros(len(numerator))
    np.divide(numerator, denominator, out=out, where=denominator > 0)
    return out
