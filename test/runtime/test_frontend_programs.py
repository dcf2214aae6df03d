"""Frontend programs as jobs: SGLang's own interpreter against our routes, over loopback."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import httpx
import pytest
import sglang as sgl
from program_server import ProgramServer, serving

from blendserve.frontend import Endpoint, program_run
from blendserve.frontend import endpoint as endpoint_module
from blendserve.frontend.link import ServerRefused
from blendserve.planner import Side
from blendserve.runtime import program_job

pytestmark = pytest.mark.timeout(60)
GREEDY = {"temperature": 0}


@pytest.fixture
def server() -> Iterator[ProgramServer]:
    with serving() as server:
        yield server


@pytest.fixture
def endpoint(server: ProgramServer) -> Endpoint:
    return Endpoint(server.url)


@sgl.function
def two_steps(s: Any, document: str, question: str) -> None:
    s += document + " " + question
    s += sgl.gen("first", max_tokens=4, ignore_eos=True)
    s += " so" + sgl.gen("second", max_tokens=2, ignore_eos=True)


def inputs(documents: int, questions: int) -> list[dict[str, str]]:
    return [
        {"document": " ".join(f"d{d}w{w}" for w in range(20)), "question": f"q{q}"}
        for d in range(documents)
        for q in range(questions)
    ]


def shuffled(given: list[dict[str, str]]) -> list[dict[str, str]]:
    return random.Random(3).sample(given, len(given))


def test_all_inputs_are_one_job_and_run_in_the_order_of_its_plan(
    server: ProgramServer, endpoint: Endpoint
) -> None:
    given = shuffled(inputs(8, 6))
    states = two_steps.run_batch(given, **GREEDY, backend=endpoint, num_threads=4)
    assert [state.error() for state in states] == [None] * 48
    # Answers are where their inputs are.
    assert all(
        state.text().startswith(f"{one['document']} {one['question']} said-21 so said-23")
        for state, one in zip(states, given, strict=True)
    )
    assert server.seen_jobs == 1
    # Each request carried a plan; those of programs that run go before those that do not.
    assert len(server.asked) == 96
    assert all(asked.tag is not None for asked in server.asked)
    assert [asked.tag.goes_on for asked in server.asked] == [
        " so" in asked.text for asked in server.asked
    ]
    # On each side documents come one after the other, however the input is shuffled.
    for side in Side:
        firsts = [
            asked.text.split()[0]
            for asked in server.asked
            if asked.tag.side is side and not asked.tag.goes_on
        ]
        assert sum(a != b for a, b in pairwise(firsts)) <= 12, firsts
    assert server.wait_until_clean()
    assert [server.credits.queued(side) for side in Side] == [0, 0]


def test_no_more_run_at_once_than_there_are_threads(
    server: ProgramServer, endpoint: Endpoint
) -> None:
    two_steps.run_batch(inputs(5, 8), **GREEDY, backend=endpoint, num_threads=3)
    assert 1 < server.most_at_once <= 3


def test_a_program_runs_once_and_one_that_fails_before_it_asks_fails_alone(
    server: ProgramServer, endpoint: Endpoint
) -> None:
    began: Counter[int] = Counter()

    @sgl.function
    def careful(s: Any, number: int) -> None:
        began[number] += 1
        if number == 3:
            raise KeyError("three")
        s += f"number {number}" + sgl.gen("x", max_tokens=2)

    given = [{"number": number} for number in range(20)]
    with pytest.raises(KeyError, match="three"):
        careful.run_batch(given, **GREEDY, backend=endpoint, num_threads=4)
    assert began == dict.fromkeys(range(20), 1)
    assert len(server.asked) == 19
    assert server.wait_until_clean()


def test_programs_that_wait_for_others_do_not_wait_for_ever(
    server: ProgramServer, endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(program_job, "_STUCK_SECONDS", 0.2)
    answered = [threading.Event() for _ in range(24)]

    @sgl.function
    def chained(s: Any, number: int) -> None:
        s += f"number {number}" + sgl.gen("x", max_tokens=2)
        assert s["x"]
        answered[number].set()
        # The last ones wait for nobody; all others for one that may be held.
        if number < 16:
            assert answered[23 - number].wait(30)

    states = chained.run_batch(
        [{"number": number} for number in range(24)], **GREEDY, backend=endpoint, num_threads=2
    )
    assert all(state.error() is None for state in states)
    assert server.wait_until_clean()


def test_waves_bound_what_is_started_at_a_time(
    server: ProgramServer, endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(program_run, "WAVE", 20)
    monkeypatch.setattr(program_run, "_FEW_HELD", 5)
    given = inputs(10, 10)
    most = 0

    @sgl.function
    def counted(s: Any, document: str, question: str) -> None:
        nonlocal most
        most = max(most, threading.active_count())
        s += document + " " + question + sgl.gen("x", max_tokens=2)

    before = threading.active_count()
    states = counted.run_batch(given, **GREEDY, backend=endpoint, num_threads=4)
    assert [state["x"] for state in states] == [" said-21"] * 100
    # Two threads for each that is held or runs; those of the links.
    assert most - before <= 2 * (20 + 5 + 4) + 2 * program_run._MOST_LINKS
    assert server.seen_jobs >= 5
    assert server.wait_until_clean()


def test_a_generator_yields_in_order_and_starts_no_more_than_it_must(
    server: ProgramServer, endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(program_run, "WAVE", 10)
    monkeypatch.setattr(program_run, "_FEW_HELD", 2)
    given = inputs(10, 10)
    stream = two_steps.run_batch(
        given, **GREEDY, backend=endpoint, num_threads=4, generator_style=True
    )
    taken = [next(stream) for _ in range(10)]
    assert [state.text().split()[20] for state in taken] == [
        f"{one['question']}" for one in given[:10]
    ]
    time.sleep(0.3)
    assert len(server.asked) < 2 * 50
    stream.close()
    assert server.wait_until_clean()


def test_forks_and_choices_carry_the_plan_of_their_program(
    server: ProgramServer, endpoint: Endpoint
) -> None:
    @sgl.function
    def forked(s: Any, number: int) -> None:
        s += f"a b c number-{number}"
        parts = s.fork(3)
        for k, part in enumerate(parts):
            part += f" part-{k}" + sgl.gen("x", max_tokens=2)
        parts.join()
        s += " ".join(s["x"])
        s += sgl.gen("y", max_tokens=2)

    given = [{"number": number} for number in range(6)]
    states = forked.run_batch(given, **GREEDY, backend=endpoint, num_threads=3)
    assert all(state.error() is None for state in states)
    # SGLang sends the common part first, if it has come to it when the program forks.
    assert 6 * 4 <= len(server.asked) <= 6 * 5
    assert all(asked.tag is not None for asked in server.asked)
    assert sum(not asked.tag.goes_on for asked in server.asked) == 6


def test_a_nested_program_carries_the_plan_of_the_one_that_calls_it(
    server: ProgramServer, endpoint: Endpoint
) -> None:
    @sgl.function
    def inner(s: Any, word: str) -> None:
        s += f"inner {word}" + sgl.gen("x", max_tokens=2)

    @sgl.function
    def outer(s: Any, word: str) -> None:
        s += f"outer {word}" + sgl.gen("x", max_tokens=2)
        s += inner.run(word=s["x"], backend=endpoint, **GREEDY)["x"]

    states = outer.run_batch(
        [{"word": f"w{k}"} for k in range(5)], **GREEDY, backend=endpoint, num_threads=2
    )
    assert all(state.error() is None for state in states)
    assert Counter(asked.tag.goes_on for asked in server.asked) == {False: 5, True: 5}


def test_what_is_no_batch_of_ours_goes_sglangs_way(
    server: ProgramServer, endpoint: Endpoint
) -> None:
    theirs = sgl.RuntimeEndpoint(server.url)
    two_steps.run_batch(inputs(2, 2), **GREEDY, backend=theirs, num_threads=2)
    two_steps.run_batch(inputs(2, 2), **GREEDY, backend=endpoint, num_threads=1)
    two_steps.run(**inputs(1, 1)[0], **GREEDY, backend=endpoint)
    assert server.seen_jobs == 0
    assert {asked.tag for asked in server.asked} == {None}


def test_a_cancelled_job_ends_its_held_programs_with_an_error(
    server: ProgramServer, endpoint: Endpoint
) -> None:
    server.frozen = True

    def cancel() -> None:
        deadline = time.monotonic() + 20
        while server.at_once < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        job = next(iter(server.jobs))
        httpx.post(f"{server.url}/blendserve/programs/{job}", json={"cancel": True}, timeout=20)
        server.frozen = False

    canceller = threading.Thread(target=cancel)
    canceller.start()
    with pytest.warns(UserWarning, match="Error in stream_executor"):
        states = two_steps.run_batch(inputs(4, 3), **GREEDY, backend=endpoint, num_threads=2)
    canceller.join(20)
    errors = [str(state.error()) for state in states]
    assert all("was cancelled" in error for error in errors), errors
    # Half an answer is an error, too.
    assert sum("aborted this request" in error for error in errors) == 2
    assert server.wait_until_clean()


def test_a_window_is_that_of_the_whole_run(
    server: ProgramServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(program_run, "WAVE", 4)
    monkeypatch.setattr(program_run, "_FEW_HELD", 1)
    endpoint = Endpoint(server.url, window_seconds=1000)
    two_steps.run_batch(inputs(4, 3), **GREEDY, backend=endpoint, num_threads=2)
    windows = [window for window in server.windows if window is not None]
    assert len(windows) == server.seen_jobs > 1
    assert 1000 >= windows[0] > windows[-1] > 900
    with pytest.raises(ValueError, match="window_seconds is 0"):
        Endpoint(server.url, window_seconds=0)


def test_programs_wait_for_an_engine_that_restarts(
    server: ProgramServer, endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(program_run, "RETRY_SECONDS", 0.02)
    monkeypatch.setattr(endpoint_module, "RETRY_SECONDS", 0.02)
    server.unavailable = {"/blendserve/programs": 3, "/generate": 5}
    states = two_steps.run_batch(inputs(3, 3), **GREEDY, backend=endpoint, num_threads=3)
    assert [state.error() for state in states] == [None] * 9
    assert server.unavailable == {"/blendserve/programs": 0, "/generate": 0}
    # The first place that the server answered at had all of them.
    assert len(server.asked) == 18
    assert all(asked.tag is not None for asked in server.asked)


def test_programs_go_on_without_a_plan_where_the_job_fails(
    server: ProgramServer, endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(self: Any) -> None:
        raise OSError("no planner")

    monkeypatch.setattr(program_job.ProgramJob, "run_all", fail)
    with pytest.warns(UserWarning, match="12 programs run without a plan: OSError"):
        states = two_steps.run_batch(inputs(4, 3), **GREEDY, backend=endpoint, num_threads=2)
    assert all(state.error() is None for state in states)
    assert {asked.tag for asked in server.asked} == {None}
    assert server.most_at_once <= 2


def test_a_prompt_that_is_not_planned_is_answered_all_the_same(
    server: ProgramServer, endpoint: Endpoint
) -> None:
    @sgl.function
    def maybe_empty(s: Any, text: str) -> None:
        s += text + sgl.gen("x", max_tokens=2, ignore_eos=True)

    texts = ["", "a b", "half of \ud83d", "a c"]
    states = maybe_empty.run_batch(
        [{"text": text} for text in texts], **GREEDY, backend=endpoint, num_threads=4
    )
    assert [state.error() for state in states] == [None] * 4
    assert sorted(asked.text for asked in server.asked if asked.tag) == ["a b", "a c"]
    assert server.wait_until_clean()


def test_a_server_that_takes_no_programs_is_named(
    server: ProgramServer, endpoint: Endpoint
) -> None:
    endpoint.base_url = f"{server.url}/elsewhere"
    with (
        pytest.warns(UserWarning, match="Error in stream_executor"),
        pytest.raises(ServerRefused, match=r"sgl\.RuntimeEndpoint works"),
    ):
        two_steps.run_batch(inputs(2, 2), **GREEDY, backend=endpoint, num_threads=2)
