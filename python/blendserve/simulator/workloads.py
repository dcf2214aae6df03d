"""Jobs to simulate: traces mixed to a target density and sharing (BlendServe, section 6.1)."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from blendserve.planner import HARDWARE, MODEL_SPECS, CostModel, FlatTokens, Job

from .exam import OUTPUT_TOKENS, Exam, exam
from .traces import TRACES, Lengths, trace_lengths

Ints = NDArray[np.int64]
Tokens = NDArray[np.int32]

VOCABULARY = 49_152
# Gives chat traces the 1 to 3 % of sharing that the paper reports for them.
SYSTEM_PROMPT_TOKENS = 8
# No limit tells a short request from a long one: lengths must be found by sampling.
MAX_OUTPUT_TOKENS = 98_304
SHARING_TOLERANCE = 0.01
_LEAST_REQUESTS = 100
# WildChat's twin: this part of its prompts begins with one of so many templates.
WILDCHAT_TEMPLATE_TOKENS = 400
WILDCHAT_TEMPLATE_PART = 0.16
WILDCHAT_TEMPLATES = 40

# Densities that name a workload are those of this model on this device, whatever it is run on.
REFERENCE = CostModel(MODEL_SPECS["llama-3.1-8b"], HARDWARE["a100-80g-sxm"])


@dataclass(frozen=True, eq=False)
class Workload:
    """n requests with their true output lengths.

    prompts: all prompts end to end. output_tokens: (n,) true lengths, at least 1 each.
    max_output_tokens: (n,) what the planner may know. source: (n,) index into `sources`.
    notes: per source, where its lengths are from.
    """

    name: str
    prompts: FlatTokens
    output_tokens: Ints
    max_output_tokens: Ints
    source: Ints
    sources: tuple[str, ...]
    notes: tuple[str, ...] = field(default=())

    def __len__(self) -> int:
        return len(self.output_tokens)

    def job(self, lengths_known: bool = False) -> Job:
        """What the planner sees of it."""
        return Job(
            self.prompts, self.max_output_tokens, self.output_tokens if lengths_known else None
        )


@dataclass(frozen=True)
class Mix:
    """compute: trace of the compute side. memory: of the memory side. density, sharing: of the
    whole, with MMLU added to reach the sharing."""

    compute: str
    memory: str
    density: float
    sharing: float


# The paper's Table 2; it does not say which trace is mixed into which, so all have BurstGPT.
WORKLOADS: dict[str, Mix] = {
    "trace1": Mix("burstgpt", "openvid", 1.4, 0.35),
    "trace2": Mix("burstgpt", "openvid", 0.9, 0.35),
    "trace3": Mix("burstgpt", "openvid", 1.4, 0.05),
    "trace4": Mix("burstgpt", "openvid", 0.9, 0.05),
    "reasoning": Mix("azure-conv", "reasoning", 1.1, 0.25),
}
GRID_DENSITIES = tuple(round(0.80 + 0.05 * k, 2) for k in range(13))
GRID_SHARINGS = (0.05, 0.15, 0.25, 0.35, 0.45)


class UnknownWorkloadError(ValueError):
    """A name that is neither a workload nor a mix."""


def mix_named(name: str) -> Mix:
    """A workload by name, or `COMPUTE[+MEMORY]:DENSITY:SHARING`, such as `sharegpt:1.2:0.25`."""
    if name in WORKLOADS:
        return WORKLOADS[name]
    match = re.fullmatch(r"([a-z-]+)(?:\+([a-z-]+))?:([0-9.]+):([0-9.]+)", name)
    if match and match[1] in TRACES and (match[2] or "openvid") in TRACES:
        try:
            return Mix(match[1], match[2] or "openvid", float(match[3]), float(match[4]))
        except ValueError as error:
            raise UnknownWorkloadError(f"{name!r}: {error}") from error
    near = difflib.get_close_matches(name, WORKLOADS, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise UnknownWorkloadError(
        f"unknown workload {name!r}: give one of {', '.join(WORKLOADS)}, or "
        f"COMPUTE[+MEMORY]:DENSITY:SHARING with traces of {', '.join(TRACES)}{hint}"
    )


def build(
    name: str, requests: int, seed: int = 0, synthetic: bool = False, mix: Mix | None = None
) -> Workload:
    """The workload of this name with this many requests; same arguments, same workload.

    synthetic: no public data even where it is there. Raises UnknownWorkloadError for a name, and
    ValueError where no mixture of the traces has the density and sharing.
    """
    mix = mix_named(name) if mix is None else mix
    if requests < 1:
        raise ValueError(f"a workload needs at least one request, not {requests}")
    questions = exam(synthetic)
    pools = (
        trace_lengths(mix.compute, requests, seed, synthetic),
        trace_lengths(mix.memory, requests, seed + 1, synthetic),
        _exam_lengths(questions, requests, seed + 2),
    )
    counts = _counts(mix, requests, pools, questions.prefix_lengths)
    return _assemble(name, mix, pools, counts, questions, seed)


@dataclass(frozen=True, eq=False)
class _ExamLengths(Lengths):
    """Of exam requests, also their subjects and numbers (-1: not a real question)."""

    subject: Ints
    question: Ints


def _exam_lengths(questions: Exam, n: int, seed: int) -> _ExamLengths:
    """Every question once, in random order; then more of them, with lengths of the real ones."""
    rng = np.random.default_rng(seed)
    total = len(questions.subject)
    rounds = -(-n // total)
    picks = np.concatenate([rng.permutation(total) for _ in range(rounds)])[:n]
    again = np.arange(n) >= total
    own = questions.question_lengths[np.where(again, rng.permutation(picks), picks)]
    subject = questions.subject[picks]
    return _ExamLengths(
        prompt=questions.prefix_lengths[subject] + own,
        output=np.full(n, OUTPUT_TOKENS),
        source=questions.source + ("; beyond them, random tokens" if n > total else ""),
        subject=subject,
        question=np.where(again, -1, picks),
    )


def _counts(
    mix: Mix, n: int, pools: tuple[Lengths, Lengths, _ExamLengths], prefix_lengths: Ints
) -> tuple[int, int, int]:
    """How many requests of each pool, taken from its front, give the density and the sharing.

    With three counts there are three linear equations; the means that stand in them are those of
    the requests taken, so the solution is repeated until it stays.
    """
    system = float(SYSTEM_PROMPT_TOKENS)
    sums = []
    for pool in pools:
        prompt = pool.prompt + SYSTEM_PROMPT_TOKENS
        columns = (
            prompt,
            REFERENCE.compute_seconds(prompt, pool.output),
            REFERENCE.memory_seconds(prompt, pool.output),
        )
        sums.append([np.cumsum(column) for column in columns])
    exam_pool = pools[2]
    prefix = prefix_lengths[exam_pool.subject] + SYSTEM_PROMPT_TOKENS
    shared = [np.cumsum(np.full(n, system))] * 2 + [np.cumsum(prefix)]
    if "wildchat" in (mix.compute, mix.memory):
        template = WILDCHAT_TEMPLATE_PART * WILDCHAT_TEMPLATE_TOKENS
        at = (mix.compute, mix.memory).index("wildchat")
        shared[at] = shared[at] + np.arange(1, n + 1) * template
    saved_exam = np.cumsum(REFERENCE.prefill_seconds_saved(prefix))
    saved_token = float(REFERENCE.prefill_seconds_saved(1.0))
    scale = float(REFERENCE.compute_seconds(500, 0))
    once = float((prefix_lengths + SYSTEM_PROMPT_TOKENS).sum())
    once_seconds = float(REFERENCE.prefill_seconds_saved(prefix_lengths).sum())

    def equations(counts: Ints) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Rows: requests, shared tokens, compute seconds; columns: the three pools."""
        at = np.clip(counts, 1, n) - 1
        mean = np.array(
            [[column[k] / (k + 1) for column in pool] for pool, k in zip(sums, at, strict=True)]
        )
        share = np.array([row[k] / (k + 1) for row, k in zip(shared, at, strict=True)])
        saved = share * saved_token
        saved[2] = saved_exam[at[2]] / (at[2] + 1)
        matrix = np.array(
            [
                np.ones(3),
                share - mix.sharing * mean[:, 0],
                (mean[:, 1] - saved - mix.density * mean[:, 2]) / scale,
            ]
        )
        # The few-shot prefixes are computed once, if there is an exam at all.
        some = min(counts[2] / len(prefix_lengths), 1.0)
        return matrix, np.array([n, some * once, -some * once_seconds / scale])

    def seconds(counts: Ints) -> float:
        return sum(
            float(pool[1][max(k, 1) - 1]) for pool, k in zip(sums, counts.tolist(), strict=True)
        )

    counts = np.array([n * 0.7, n * 0.01, n * 0.29])
    for _ in range(40):
        matrix, right = equations(np.rint(counts).astype(np.int64))
        solved = np.linalg.solve(matrix, right)
        counts = 0.5 * counts + 0.5 * np.clip(solved, 0, n)
    # The few requests of the memory side weigh most: take the number that is nearest.
    of_exam = max(round(counts[2]), 0)
    best: tuple[float, int] | None = None
    for of_memory in range(max(round(counts[1] * 0.8) - 5, 1), min(round(counts[1] * 1.2) + 6, n)):
        taken = np.array([n - of_memory - of_exam, of_memory, of_exam])
        matrix, right = equations(taken)
        off = abs(float(matrix[2] @ taken - right[2]))
        best = min(best, (off, of_memory)) if best else (off, of_memory)
    if best is None:
        raise ValueError(
            f"{n} requests are too few for a mix of three traces: take {_LEAST_REQUESTS} or more"
        )
    taken = np.array([n - best[1] - of_exam, best[1], of_exam])
    matrix, right = equations(taken)
    prompt_tokens = sum(float(pool[0][max(k, 1) - 1]) for pool, k in zip(sums, taken, strict=True))
    off_sharing = abs(float(matrix[1] @ taken - right[1])) / prompt_tokens
    # Memory-side requests are large: the density comes no nearer than one or two of them.
    slack = 0.1 * seconds(taken) + 2 * mix.density * float(sums[1][2][-1]) / n
    if taken.min() < 0 or off_sharing > SHARING_TOLERANCE or best[0] * scale > slack:
        raise ValueError(
            f"no mixture of {mix.compute}, {mix.memory} and MMLU has density {mix.density:g} and "
            f"sharing {mix.sharing:g}: raise the sharing above that of their system prompts, or "
            "take a density between those of the traces"
        )
    return n - best[1] - of_exam, best[1], of_exam


def _assemble(
    name: str,
    mix: Mix,
    pools: tuple[Lengths, Lengths, _ExamLengths],
    counts: tuple[int, int, int],
    questions: Exam,
    seed: int,
) -> Workload:
    """The file: one trace after the other, as batch files are put together; MMLU by subject."""
    rng = np.random.default_rng((seed, 7))
    exam_pool = pools[2]
    by_subject = np.argsort(exam_pool.subject[: counts[2]], kind="stable")
    picks = [np.arange(counts[0]), np.arange(counts[1]), by_subject]
    prompt = np.concatenate([pool.prompt[pick] for pool, pick in zip(pools, picks, strict=True)])
    output = np.concatenate([pool.output[pick] for pool, pick in zip(pools, picks, strict=True)])
    source = np.repeat(np.arange(3), counts)
    lengths = prompt + SYSTEM_PROMPT_TOKENS
    offsets = np.concatenate(([0], np.cumsum(lengths))).astype(np.int64)
    tokens = rng.integers(0, VOCABULARY, int(offsets[-1]), dtype=np.int32)
    begin = offsets[:-1]
    systems = rng.integers(0, VOCABULARY, (3, SYSTEM_PROMPT_TOKENS), dtype=np.int32)
    tokens[begin[:, None] + np.arange(SYSTEM_PROMPT_TOKENS)] = systems[source]
    begin = begin + SYSTEM_PROMPT_TOKENS
    for at, trace in enumerate((mix.compute, mix.memory)):
        if trace == "wildchat":
            _write_templates(tokens, begin[source == at], prompt[source == at], rng)
    first = counts[0] + counts[1]
    for at, pick in zip(range(first, len(prompt)), by_subject.tolist(), strict=True):
        prefix = questions.prefixes[exam_pool.subject[pick]]
        tokens[begin[at] : begin[at] + len(prefix)] = prefix
        number = int(exam_pool.question[pick])
        if number >= 0:
            text = questions.questions[questions.offsets[number] : questions.offsets[number + 1]]
            tokens[begin[at] + len(prefix) : begin[at] + len(prefix) + len(text)] = text
    return Workload(
        name=name,
        prompts=FlatTokens(tokens, offsets),
        output_tokens=np.maximum(output, 1),
        max_output_tokens=np.full(len(prompt), MAX_OUTPUT_TOKENS),
        source=source,
        sources=(mix.compute, mix.memory, "mmlu"),
        notes=tuple(pool.source for pool in pools),
    )


def _write_templates(tokens: Tokens, begin: Ints, prompt: Ints, rng: np.random.Generator) -> None:
    """Users who send one template again and again: where WildChat's 19 % of sharing is from."""
    templates = rng.integers(
        0, VOCABULARY, (WILDCHAT_TEMPLATES, WILDCHAT_TEMPLATE_TOKENS), dtype=np.int32
    )
    long_enough = np.flatnonzero(prompt > WILDCHAT_TEMPLATE_TOKENS)
    count = min(int(WILDCHAT_TEMPLATE_PART * len(prompt)), len(long_enough))
    chosen = rng.permutation(long_enough)[:count]
    which = rng.integers(0, WILDCHAT_TEMPLATES, count)
    tokens[begin[chosen, None] + np.arange(WILDCHAT_TEMPLATE_TOKENS)] = templates[which]
