"""How a job's work goes on with time, as predicted: what the time left is told by.

Work is done fast while many requests run together, and slowly in the end, when a few decode on. So
half of the work left is not half of the time left; a curve says what it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from .cost_model import CostModel
from .plan import Plan
from .prediction import dual_scan_sequence
from .prefix_tree import Floats, Ints
from .timeline import Work, run_course

# Requests that are looked at; the time left of more is told by their work alone.
_MOST_REQUESTS = 100_000
_POINTS = 48


@dataclass(frozen=True)
class ProgressCurve:
    """token_work: of a prompt's and of an answer's token, which work is weighed with. work,
    seconds: (k,) so much work is done after so many seconds from the plan on; both ascend from 0.
    """

    token_work: tuple[float, float]
    work: list[float]
    seconds: list[float]


def progress_curve(
    plan: Plan,
    cost_model: CostModel,
    kv_tokens: int | None,
    in_flight: Mapping[int, int],
    prefill_tokens: Ints,
) -> ProgressCurve | None:
    """Of the requests of a plan, and of those that are on their way already.

    Args:
        kv_tokens: KV memory of the engine, or of all together. None: not known, and no curve.
        in_flight: output tokens so far by request.
        prefill_tokens: (n,) of all requests, what of their prompts is to be computed.
    """
    count = len(plan.order) + len(in_flight)
    if kv_tokens is None or not 0 < count <= _MOST_REQUESTS:
        return None
    length = np.zeros(plan.tree.num_leaves)
    length[plan.tree.requests] = plan.tree.length
    flying = np.array(list(in_flight), dtype=np.int64)
    so_far = np.array([in_flight[request] for request in flying.tolist()], dtype=np.float64)
    order, left = dual_scan_sequence(plan)
    requests = np.concatenate((flying, order))
    done = np.concatenate((so_far, np.zeros(len(order))))
    prompt = length[requests] + done
    # Who has answered a token has no prompt left to compute.
    own = np.where(done > 0, 0.0, prefill_tokens[requests])
    output = np.maximum(plan.estimated_output_tokens[requests] - done, 1.0)
    sides = np.concatenate((np.zeros(len(flying), dtype=np.bool_), left))
    work = Work(prompt, prompt - own, output)
    course = run_course(work, cost_model.step_costs, float(kv_tokens), sides)
    token_work = _token_work(cost_model, prompt, output)
    steps = token_work[0] * course.prefill + token_work[1] * course.decoded
    points = np.unique(np.linspace(0, len(steps), _POINTS).astype(np.int64))
    return ProgressCurve(
        token_work, _at(np.cumsum(steps), points), _at(np.cumsum(course.seconds), points)
    )


def _token_work(cost_model: CostModel, prompt: Floats, output: Floats) -> tuple[float, float]:
    """Seconds of a token of a prompt, and of an answer with its share of memory traffic."""
    rates = cost_model.rates
    reads = float(cost_model.memory_seconds(prompt, output).sum()) / float(output.sum())
    return rates.token, rates.token + rates.sampled + reads


def _at(sums: Floats, points: Ints) -> list[float]:
    found: list[float] = np.concatenate(([0.0], sums))[points].tolist()
    return found
