"""The planning process: the same plans as in process, and an end with its parent or by itself."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from blendserve.planner import MODEL_SPECS, CostModel, Job, PlannerConfig, Side, hardware, make_plan
from blendserve.runtime.plan_worker import JobPlan, News, PlanWorker, PromptBatch
from blendserve.runtime.planner_process import PlannerDied, PlannerProcess

MEASURED = replace(hardware("cpu"), guess=False)
COST_MODEL = CostModel(MODEL_SPECS["smollm2-135m"], MEASURED)
CONFIG = PlannerConfig()


def prompts(count: int) -> list[np.ndarray]:
    rng = np.random.default_rng(count)
    groups = [rng.integers(0, 1000, 50).astype(np.int32) for _ in range(4)]
    return [np.append(groups[k % 4], np.int32(2000 + k)) for k in range(count)]


def batch(
    tokens: list[np.ndarray], limit: int | np.ndarray = 300, ignore_eos: bool = False
) -> PromptBatch:
    return PromptBatch(
        tokens=np.concatenate(tokens) if tokens else np.empty(0, dtype=np.int32),
        lengths=np.array([len(ids) for ids in tokens]),
        max_output_tokens=np.full(len(tokens), limit),
        ignore_eos=np.full(len(tokens), ignore_eos),
    )


def walked(plan: JobPlan) -> list[int]:
    return [plan.scanner.take(Side.LEFT) for _ in range(plan.scanner.remaining)]


def positions(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


@pytest.fixture(scope="module")
def process() -> Iterator[PlannerProcess]:
    process = PlannerProcess(COST_MODEL, CONFIG)
    process.start()
    yield process
    process.close()


def test_it_plans_as_the_planner_does(process):
    tokens = prompts(300)
    job = Job(tokens, np.full(300, 300))
    for planner in (process, PlanWorker(COST_MODEL, CONFIG)):
        for start in range(0, 300, 100):
            planner.append("a", batch(tokens[start : start + 100]))
        expected = make_plan(job, COST_MODEL, CONFIG)
        plan = planner.plan("a", News())
        assert walked(plan) == expected.order.tolist()
        sample = np.concatenate([plan.sample[side] for side in Side])
        assert set(sample.tolist()) == set(expected.sample.tolist())
        assert plan.output_tokens.tolist() == expected.estimated_output_tokens.tolist()
        assert plan.likely_output_tokens.tolist() == expected.likely_output_tokens.tolist()
        assert plan.prefill_tokens.sum() == pytest.approx(
            expected.prompt_tokens * (1 - expected.sharing_planned)
        )
        seconds = expected.compute_seconds.sum() + expected.memory_seconds.sum()
        assert (plan.compute_seconds + plan.memory_seconds).sum() == pytest.approx(seconds)
        # The plan shares as well as a depth-first order here, so it takes no more compute.
        assert expected.sharing_planned == expected.sharing_best
        bound = max(expected.compute_seconds.sum(), expected.memory_seconds.sum())
        assert plan.bound_seconds == pytest.approx(bound)

        # News add up from plan to plan, and the prompts are not needed again.
        planner.plan(
            "a", News(started=positions(3), running=positions(3), running_tokens=positions(9))
        )
        news = News(
            started=positions(5, 7), finished=positions(3, 5), finished_tokens=positions(20, 30)
        )
        again = planner.plan("a", news)
        expected = make_plan(
            job,
            COST_MODEL,
            CONFIG,
            observed={3: 20, 5: 30},
            exclude=[3, 5, 7],
            sampled=expected.sample.tolist(),
        )
        assert walked(again) == expected.order.tolist()
        assert again.output_tokens.tolist() == expected.estimated_output_tokens.tolist()
        # What is not planned any more keeps the figures of the last plan that had it.
        assert again.compute_seconds[3] == plan.compute_seconds[3] > 0
        planner.forget("a")


def test_no_bound_is_told_of_a_device_whose_figures_are_a_guess():
    found = []
    for device in (MEASURED, hardware("cpu")):
        worker = PlanWorker(CostModel(MODEL_SPECS["smollm2-135m"], device), CONFIG)
        worker.append("job", batch(prompts(30)))
        found.append(worker.plan("job", News()).bound_seconds)
    assert found[0] > 0
    assert found[1] == 0


def test_a_large_sample_comes_in_two_parts_the_second_with_the_answers_of_the_first():
    config = PlannerConfig(sample_fraction=0.2)
    worker = PlanWorker(COST_MODEL, config)
    worker.append("job", batch(prompts(800)))
    news, named = News(), []
    for _ in range(3):
        plan = worker.plan("job", news)
        sample = np.concatenate(list(plan.sample.values()))
        named.append(set(sample.tolist()))
        news = News(started=sample, finished=sample, finished_tokens=sample % 100 + 1)
    first, second, third = named
    assert first
    assert second
    assert not first & second
    assert len(first | second) == 160
    assert not third


def test_numbers_in_the_timetable_go_on_behind_what_was_sent():
    worker = PlanWorker(COST_MODEL, CONFIG)
    worker.append("job", batch(prompts(50)))
    first = worker.plan("job", News()).timetable
    started = first.order[:20]
    second = worker.plan("job", News(started=started)).timetable
    assert sorted(map(first.due, range(50))) == list(range(50))
    assert second.first_due >= 20
    assert sorted(second.order.tolist()) == sorted(set(range(50)) - set(started.tolist()))


@pytest.mark.parametrize("ahead", list(Side))
def test_a_front_beyond_its_own_part_says_what_it_takes_next(ahead):
    """All of the job from one end: every prefix is needed by the very next request of that side."""
    worker = PlanWorker(COST_MODEL, CONFIG)
    tokens = prompts(40)
    worker.append(
        "job", batch(tokens, limit=np.array([30, 30, 9_000, 9_000] * 10), ignore_eos=True)
    )
    plan = worker.plan("job", News())
    assert len({plan.timetable.side(k) for k in range(40)}) == 2
    taken = [plan.scanner.take(ahead) for _ in range(plan.scanner.remaining)]
    plan = worker.plan("job", News())
    beyond = [plan.timetable.side(k) is not ahead for k in taken]
    assert any(beyond)
    tags = []
    for _ in taken:
        k = plan.scanner.take(ahead)
        tags.append(plan.use_tag("job", ahead, k))
    for place in np.flatnonzero(beyond):
        tag, k = tags[place], taken[place]
        same_group = int(place + 1 < 40 and taken[place + 1] % 4 == k % 4)
        assert [tuple(use) for use in tag.next_uses] == [
            (50, tag.due + 1, ahead) for _ in range(same_group)
        ]
    numbers = [tag.due for tag in tags]
    assert numbers == sorted(set(numbers))
    again = worker.plan("job", News(started=positions(*taken[:30])))
    assert again.timetable.first_due > numbers[29]


@pytest.mark.parametrize("ahead", list(Side))
def test_the_last_of_a_front_says_that_the_other_one_may_need_its_prefix_yet(ahead):
    """The two meet within a group: its first half was sent by the other front, and may wait."""
    worker = PlanWorker(COST_MODEL, CONFIG)
    worker.append("job", batch(prompts(40), ignore_eos=True))
    plan = worker.plan("job", News())
    for _ in range(5):
        plan.use_tag("job", ahead.other, plan.scanner.take(ahead.other))
    sent = plan.latest_due[ahead.other]
    tags = [plan.use_tag("job", ahead, plan.scanner.take(ahead)) for _ in range(35)]
    assert plan.scanner.exhausted
    assert [tuple(use) for use in tags[-1].next_uses] == [(50, sent, ahead.other)]


def test_jobs_are_kept_apart_and_forgotten(process):
    process.append("a", batch(prompts(10), limit=5, ignore_eos=True))
    process.append("b", batch([]))
    assert process.plan("a", News()).scanner.remaining == 10
    assert process.plan("b", News()).scanner.exhausted
    process.forget("a")
    process.forget("a")
    process.forget("b")
    with pytest.raises(KeyError, match="a") as caught:
        process.plan("a", News())
    assert "In the planning process" in caught.value.__notes__[0]


def test_a_process_that_was_killed_is_replaced_without_its_jobs():
    process = PlannerProcess(COST_MODEL, CONFIG)
    try:
        process.append("a", batch(prompts(10)))
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        with pytest.raises(PlannerDied, match="code -9"):
            process.plan("a", News())
        with pytest.raises(KeyError):
            process.plan("a", News())
        process.append("a", batch(prompts(10)))
        assert process.plan("a", News()).scanner.remaining == 10
    finally:
        process.close()


def test_closing_it_ends_a_call_that_waits():
    process = PlannerProcess(COST_MODEL, CONFIG)
    process.append("a", batch(prompts(10)))
    pid = process.pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    failures: list[BaseException] = []

    def call() -> None:
        try:
            process.plan("a", News())
        except PlannerDied as error:
            failures.append(error)

    waiting = threading.Thread(target=call)
    waiting.start()
    process.close()
    waiting.join(timeout=20)
    assert not waiting.is_alive()
    assert not Path(f"/proc/{pid}").exists()
    process.forget("a")
    with pytest.raises(PlannerDied, match="closed"):
        process.append("a", batch(prompts(10)))
    assert process.pid == pid


def test_it_ends_with_its_parent():
    script = (
        "import os, signal\n"
        "from blendserve.planner import *\n"
        "from blendserve.runtime.planner_process import PlannerProcess\n"
        "cost = CostModel(MODEL_SPECS['smollm2-135m'], hardware('cpu'))\n"
        "process = PlannerProcess(cost, PlannerConfig())\n"
        "process.start()\n"
        "print(process.pid, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    parent = subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, check=False)
    child = int(parent.stdout)
    deadline = time.monotonic() + 20
    while alive(child):
        assert time.monotonic() < deadline, "the planning process outlived its parent"
        time.sleep(0.01)


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0]
    except FileNotFoundError:
        return False
    return state != "Z"  # nobody may be there to collect it


def test_it_needs_neither_torch_nor_sglang():
    script = (
        "import sys, blendserve.runtime.planner_process\n"
        "print({'torch', 'sglang', 'transformers', 'fastapi'} & set(sys.modules))"
    )
    loaded = subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, check=True)
    assert loaded.stdout.strip() == b"set()"
