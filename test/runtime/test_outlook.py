"""How a job will go on, predicted while somebody looks: nothing else changes by it."""

from __future__ import annotations

import numpy as np
import pytest

from blendserve.planner import MODEL_SPECS, CostModel, PlannerConfig, hardware
from blendserve.runtime.plan_worker import News, PlanWorker, PromptBatch, UntoldNews


def worker(output: list[int]) -> PlanWorker:
    made = PlanWorker(
        CostModel(MODEL_SPECS["smollm2-135m"], hardware("cpu")), PlannerConfig(kv_tokens=4_000)
    )
    count = len(output)
    made.append(
        "a",
        PromptBatch(
            tokens=np.arange(50 * count, dtype=np.int32),
            lengths=np.full(count, 50),
            max_output_tokens=np.array(output),
            ignore_eos=np.ones(count, dtype=np.bool_),
        ),
    )
    return made


def test_news_that_somebody_looks_at_can_still_grow() -> None:
    news = UntoldNews()
    news.started.append(1)
    news.ended(1, 5)
    seen = news.peek([(2, 7)])
    news.started.append(2)
    news.ended(2, 9)
    assert (seen.started.tolist(), seen.finished_tokens.tolist()) == ([1], [5])
    assert news.take([]).started.tolist() == [1, 2]


def test_a_forecast_is_of_what_is_left_and_leaves_the_plan_as_it_is() -> None:
    planner = worker([100] * 20 + [400])
    plan = planner.plan("a", News())
    assert plan.curve is not None
    assert plan.curve.work[0] == plan.curve.seconds[0] == 0
    assert (np.diff(plan.curve.seconds) >= 0).all()
    news = UntoldNews()
    for position in range(21):
        news.started.append(position)
    for position in range(20):
        news.ended(position, 100)
    left = planner.forecast("a", news.peek([(20, 300)]))
    assert left is not None
    # A hundred steps of one request, which alone are not a quarter of the last one's.
    assert 0 < left.seconds[-1] < plan.curve.seconds[-1] / 3
    assert planner.forecast("a", news.peek([(20, 300)])) == left
    assert planner.plan("a", news.take([(20, 300)])).curve == left


def test_nothing_is_forecast_without_a_plan_or_a_known_memory() -> None:
    planner = worker([10])
    assert planner.forecast("a", News()) is None
    with pytest.raises(KeyError):
        planner.forecast("b", News())
