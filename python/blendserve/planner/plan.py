"""From a job to a plan: the order in which its requests are to run."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .annotation import amortised_compute, prompt_tokens_read
from .cost_model import CostModel, density
from .families import families, guessed, likely_guesses, longest_guesses
from .flat_tokens import FlatTokens
from .length_model import LengthModel
from .length_sample import choose_sample, choose_second_sample, first_part, sample_size
from .media import EncoderWork, MediaRuns
from .prefix_tree import Floats, Ints, PrefixTree
from .spread import spread_known
from .transform import transform

# Up to this limit an output is taken as known for the choice of the sample: next to any prompt, it
# does not change which side a request belongs to.
PINNED_OUTPUT_TOKENS = 16


@dataclass(frozen=True)
class PlannerConfig:
    """sample_fraction, min_sample: how many requests to run first for their output lengths (see
    `sample_size`). sharing_preserved: part of the best prefix sharing that the order keeps at
    least. seed: for the choice of the sample. shared_decode_tokens: size of the KV pool of an
    engine whose decodes read a common prefix once for all (see `prompt_tokens_read`); None: each
    reads its own. kv_tokens: of all replicas, in which requests of known length are mixed (see
    `spread_known`); None: they stay sorted."""

    sample_fraction: float = 0.01
    min_sample: int = 8
    sharing_preserved: float = 0.99
    seed: int = 0
    shared_decode_tokens: int | None = None
    kv_tokens: int | None = None

    def __post_init__(self) -> None:
        for name in ("sample_fraction", "sharing_preserved"):
            value = getattr(self, name)
            if not 0.0 <= value <= 1.0:
                raise ValueError(f"{name} must be between 0 and 1, not {value!r}")
        if self.min_sample < 0:
            raise ValueError(f"min_sample must not be negative, not {self.min_sample}")
        for name in ("shared_decode_tokens", "kv_tokens"):
            tokens = getattr(self, name)
            if tokens is not None and tokens < 1:
                raise ValueError(f"{name} must be at least 1, not {tokens}")

    def memory_seconds(self, cost_model: CostModel, tree: PrefixTree, output: Floats) -> Floats:
        """(n,) KV reads of each leaf's decodes; output: (n,) tokens in leaf order."""
        if self.shared_decode_tokens is None:
            return cost_model.memory_seconds(tree.length, output)
        read = prompt_tokens_read(tree, output, self.shared_decode_tokens)
        return cost_model.memory_seconds(read, output)


@dataclass
class Job:
    """n requests.

    token_ids: n prompts, 1-d integer arrays.
    max_output_tokens: (n,) limit on each output; anything that converts to int64.
    known_output_tokens: (n,) lengths known beforehand, -1 where unknown; None when none is.
    media: the pictures in the prompts.
    Raises ValueError for shapes that do not match or negative limits.
    """

    token_ids: Sequence[NDArray[np.int32]]
    max_output_tokens: NDArray[Any]
    known_output_tokens: NDArray[Any] | None = None
    media: MediaRuns = field(default_factory=MediaRuns.none)

    def __post_init__(self) -> None:
        n = len(self.token_ids)
        self.max_output_tokens = np.asarray(self.max_output_tokens, dtype=np.int64)
        if self.known_output_tokens is None:
            self.known_output_tokens = np.full(n, -1, dtype=np.int64)
        self.known_output_tokens = np.asarray(self.known_output_tokens, dtype=np.int64)
        for name in ("max_output_tokens", "known_output_tokens"):
            shape = getattr(self, name).shape
            if shape != (n,):
                raise ValueError(f"{name} has shape {shape}, the job has {n} requests")
        if n and int(self.max_output_tokens.min()) < 0:
            raise ValueError("max_output_tokens must not be negative")

    @classmethod
    def from_flat(
        cls,
        tokens: NDArray[Any],
        offsets: NDArray[Any],
        max_output_tokens: NDArray[Any],
        known_output_tokens: NDArray[Any] | None = None,
        media: MediaRuns | None = None,
    ) -> Job:
        """A job whose prompts stand end to end in one array, tokens[offsets[r] : offsets[r + 1]]:
        the leanest form, as int32 tokens are never copied. Raises ValueError for ids outside
        0 .. 2^31 - 1 and offsets that do not cover the tokens in order."""
        prompts = FlatTokens.checked(tokens, offsets)
        media = MediaRuns.none() if media is None else media
        return cls(prompts, max_output_tokens, known_output_tokens, media)

    def __len__(self) -> int:
        return len(self.token_ids)

    def build_tree(self) -> PrefixTree:
        """The prefix tree of all requests; identical prompts are ordered by their limits."""
        assert self.known_output_tokens is not None
        return PrefixTree.build(
            self.token_ids, tie_keys=(self.max_output_tokens, self.known_output_tokens)
        )


@dataclass(frozen=True, eq=False)
class Plan:
    """The order of k planned requests out of a job of n.

    By position in the order, shape (k,):
      order: request indices, compute end first, memory end last.
      density: compute density of each request, after sharing: what the scanners see.
      shared_with_previous: prompt tokens in common with the request before it.
      compute_seconds, memory_seconds: cost of each request; the compute of a shared prefix is
          divided equally among those that share it, so that the sums are those of the job.
    By request index, shape (n,):
      estimated_output_tokens; likely_output_tokens: (n, k) lengths that it may have, ascending,
          each as likely as the others, all the same where the length is known;
          guessed: whether nothing tells yet how long it gets (`families`), so that the order takes
          it for a long one;
          request_density: nan where the request is not planned.
    sample: (s,) request indices to run first, so that the rest can be planned again with what
        they show (see `make_plan`); empty when the sample is complete, or the lengths are known.
    target_density: of the planned requests together, after sharing; inf without decoding.
    prompt_tokens, unique_tokens: of the planned requests; unique with ideal sharing.
    sharing_best, sharing_planned: part of the prompt tokens that a depth-first order, and this
        order, find already computed.
    split_nodes: prefix tree nodes that the transformation split. moved_requests: requests that
        stand apart from those with which they share most, and so compute some prefix again.
    tree: of the whole job; hand it back to `make_plan` to plan again without building it anew.
    encoder: work of the vision encoder for the job's pictures.
    """

    order: Ints
    density: Floats
    shared_with_previous: Ints
    compute_seconds: Floats
    memory_seconds: Floats
    estimated_output_tokens: Floats
    likely_output_tokens: Floats
    guessed: NDArray[np.bool_]
    request_density: Floats
    sample: Ints
    target_density: float
    prompt_tokens: int
    unique_tokens: int
    sharing_best: float
    sharing_planned: float
    split_nodes: int
    moved_requests: int
    tree: PrefixTree = field(repr=False)
    encoder: EncoderWork = field(repr=False)


def make_plan(
    job: Job,
    cost_model: CostModel,
    config: PlannerConfig = PlannerConfig(),
    observed: Mapping[int, int] | None = None,
    exclude: Collection[int] = (),
    tree: PrefixTree | None = None,
    running: Mapping[int, int] | None = None,
    sampled: Collection[int] = (),
) -> Plan:
    """Plans a job, or what is left of it.

    A large sample is drawn in two parts: the first plan names one in `Plan.sample`; the plan that
    is then made with its answers in `observed` and its requests in `sampled` names the other, which
    goes where the first one showed that lengths vary; the next plan, with both in `sampled`, none.
    Without `sampled`, a plan with observations names none.

    observed: true output lengths by request index, as far as they are known. exclude: requests
    that have started; they inform the estimates but are not planned. tree: `Plan.tree` of an
    earlier plan of the same job. running: output tokens so far of requests that have not ended;
    their estimates exceed that. sampled: what the samples of earlier plans named. Deterministic,
    and the same plan whatever the order of the requests in the job. Raises ValueError for indices
    that are not in the job.
    """
    n = len(job)
    observed = {} if observed is None else observed
    assert job.known_output_tokens is not None
    if tree is None:
        tree = job.build_tree()
    if tree.num_leaves != n:
        raise ValueError(f"the tree has {tree.num_leaves} requests, the job has {n}")

    known = job.known_output_tokens >= 0
    limit = np.where(
        known, np.minimum(job.known_output_tokens, job.max_output_tokens), job.max_output_tokens
    )
    lengths = LengthModel(tree, limit, known).fit(observed, running)
    output, likely = lengths.mean(), lengths.likely()

    waiting = ~_marked(n, exclude, "excluded")
    taken = _marked(n, sampled, "sampled")
    # A short limit pins a length about as well as a sample would.
    unknown = ~known & (job.max_output_tokens > PINNED_OUTPUT_TOKENS)
    sample = np.empty(0, dtype=np.int64)
    if taken.any():
        size = sample_size(int(unknown.sum()), config.sample_fraction, config.min_sample)
        if size > int(taken.sum()):
            free = waiting & unknown & ~taken
            spread = lengths.deviation()
            sample = choose_second_sample(tree, size, config.seed, taken, spread, output, free)
    elif not observed:
        free = waiting & unknown
        size = sample_size(int(free.sum()), config.sample_fraction, config.min_sample)
        sample = choose_sample(tree, first_part(size), config.seed, free)

    guess = np.zeros(n, dtype=bool)
    planned_output = output
    if taken.any() or len(sample):  # Else nothing will be learnt.
        family = families(tree)
        guess = unknown & guessed(family, observed, limit)
        longest = longest_guesses(family, running or {}, limit)
        likely[guess] = likely_guesses(longest[guess], likely.shape[1])
        if taken.any():
            planned_output = np.where(guess, np.maximum(output, longest), output)

    rest = tree.subset(waiting[tree.requests])
    leaf_output = planned_output[rest.requests]
    encoder = EncoderWork.of(cost_model, job.media)
    compute = encoder.compute_seconds(cost_model, rest.requests, rest.length, leaf_output)
    memory = config.memory_seconds(cost_model, rest, leaf_output)
    saved = encoder.saved(cost_model)
    result = transform(rest, compute, memory, saved, config.sharing_preserved)

    order = rest.requests[result.order]
    planned = PrefixTree.from_lcp(order, rest.length[result.order], result.shared)
    compute_after = amortised_compute(planned, compute[result.order], saved)
    memory_after = config.memory_seconds(cost_model, planned, leaf_output[result.order])
    scan_density = density(compute_after, memory_after)
    target = float(density(compute_after.sum(), memory_after.sum()))
    if config.kv_tokens is not None:
        tokens = leaf_output[result.order]
        place = spread_known(
            scan_density,
            target,
            rest.leaf_parent[result.order],
            tokens,
            rest.length[result.order] + tokens / 2,
            known[order],
            cost_model.step_costs,
            config.kv_tokens,
        )
        order, scan_density = order[place], scan_density[place]
        compute_after, memory_after = compute_after[place], memory_after[place]
    in_common = np.maximum(result.shared, np.append(result.shared, 0)[1:])
    request_density = np.full(n, np.nan)
    request_density[order] = scan_density
    return Plan(
        order=order,
        density=scan_density,
        shared_with_previous=result.shared,
        compute_seconds=compute_after,
        memory_seconds=memory_after,
        estimated_output_tokens=output,
        likely_output_tokens=likely,
        guessed=guess,
        request_density=request_density,
        sample=sample,
        target_density=target,
        prompt_tokens=rest.prompt_tokens,
        unique_tokens=rest.unique_tokens,
        sharing_best=rest.sharing_ratio,
        sharing_planned=planned.sharing_ratio,
        split_nodes=int(result.split_nodes.sum()),
        moved_requests=int((in_common < rest.depth[rest.leaf_parent[result.order]]).sum()),
        tree=tree,
        encoder=encoder,
    )


def _marked(n: int, requests: Collection[int], what: str) -> NDArray[np.bool_]:
    """(n,) true for these requests."""
    marked = np.zeros(n, dtype=bool)
    for request in requests:
        if not 0 <= request < n:
            raise ValueError(f"{what} request {request} is not in this job of {n} requests")
        marked[request] = True
    return marked
