"""One plan over several engines: they share the lines, and any of them may go at any time."""

from __future__ import annotations

import asyncio

import pytest
from cluster_fakes import KEY, MOST_SECONDS, FakeCluster, FakeEngine, text

from blendserve.batch import EngineAddress, EngineUnavailable
from blendserve.config import Settings
from blendserve.runtime.cluster_executor import ClusterExecutor


def job(count: int, tokens: int = 3, groups: int = 10):
    """Lines of some families, each with a long common prefix; the last token is the line's own."""
    return [
        {"prompt": [n % groups, *range(500, 560), 1_000 + n], "max_tokens": tokens}
        for n in range(count)
    ]


def assert_complete(bodies, results):
    assert sorted(result.index for result in results) == list(range(len(bodies)))
    assert {result.status_code for result in results} == {200}
    assert all(text(result) == str(bodies[result.index]["prompt"][-1]) for result in results)


def test_two_engines_share_a_job_and_each_line_is_answered_once():
    async def scenario() -> None:
        async with FakeCluster([FakeEngine(), FakeEngine()]) as cluster:
            bodies = job(300)
            assert_complete(bodies, await cluster.answers(bodies))
            shares = [engine.answered / 300 for engine in cluster.engines]
            assert sum(shares) == 1
            assert all(0.3 <= share <= 0.7 for share in shares)
            assert all(engine.prompts_read > 0 for engine in cluster.engines)
            assert set(cluster.started.values()) == {1}

    asyncio.run(scenario())


async def begin(cluster, bodies, count):
    """The job's answers, of which so many have come, and a task that takes the others."""
    results = []
    enough = asyncio.Event()

    async def take() -> None:
        async for result in cluster.run(bodies):
            results.append(result)
            if len(results) >= count:
                enough.set()

    task = asyncio.create_task(take())
    waiting = asyncio.create_task(enough.wait())
    await asyncio.wait([task, waiting], timeout=MOST_SECONDS, return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()
    assert not task.done()
    return results, task


async def end(task) -> None:
    async with asyncio.timeout(MOST_SECONDS):
        await task


def test_the_lines_of_a_killed_engine_run_on_the_other():
    async def scenario() -> None:
        async with FakeCluster([FakeEngine(), FakeEngine()]) as cluster:
            bodies = job(200)
            results, task = await begin(cluster, bodies, 40)
            cluster.wires[0].cut()
            answered_by_first = cluster.engines[0].answered
            await end(task)
            assert_complete(bodies, results)
            again = [index for index, count in cluster.started.items() if count > 1]
            assert again
            assert all(cluster.started[index] == 2 for index in again)
            assert cluster.engines[1].answered >= 200 - answered_by_first
            lost = cluster.view(cluster.wires[0])
            assert (lost["state"], lost["losses"]) == ("lost", 1)

    asyncio.run(scenario())


def test_an_engine_that_says_nothing_is_dropped_and_its_late_answers_are_not_heard():
    async def scenario() -> None:
        engines = [FakeEngine(), FakeEngine()]
        async with FakeCluster(engines, engine_silent_seconds=1.2) as cluster:
            bodies = job(150, tokens=10)
            results, task = await begin(cluster, bodies, 20)
            cluster.wires[0].hold()
            await cluster.until(lambda: cluster.view(cluster.wires[0])["state"] == "lost")
            assert "too long" in cluster.view(cluster.wires[0])["reason"]
            # All that it had sent meanwhile comes through now.
            cluster.wires[0].mend()
            await end(task)
            assert_complete(bodies, results)

    asyncio.run(scenario())


def test_an_engine_whose_scheduler_hangs_is_dropped_though_it_speaks():
    async def scenario() -> None:
        engines = [FakeEngine(), FakeEngine()]
        async with FakeCluster(engines, engine_hang_seconds=0.6) as cluster:
            bodies = job(200)
            results, task = await begin(cluster, bodies, 20)
            engines[0].healthy, engines[0].slots = False, 0
            await end(task)
            assert_complete(bodies, results)
            assert "not healthy" in cluster.view(cluster.wires[0])["reason"]

    asyncio.run(scenario())


def test_an_engine_that_comes_back_is_given_lines_again():
    async def scenario() -> None:
        async with FakeCluster([FakeEngine(), FakeEngine()]) as cluster:
            bodies = job(400, tokens=20)
            results, task = await begin(cluster, bodies, 20)
            cluster.wires[0].cut()
            await cluster.until(lambda: cluster.view(cluster.wires[0])["state"] == "lost")
            before = cluster.engines[0].answered
            cluster.wires[0].mend()
            await cluster.until(lambda: cluster.view(cluster.wires[0])["state"] == "up")
            await end(task)
            assert_complete(bodies, results)
            assert cluster.engines[0].answered > before + 20

    asyncio.run(scenario())


def test_a_job_waits_while_no_engine_is_there():
    async def scenario() -> None:
        async with FakeCluster([FakeEngine()]) as cluster:
            bodies = job(200)
            results, task = await begin(cluster, bodies, 20)
            cluster.wires[0].cut()
            await cluster.until(lambda: cluster.view(cluster.wires[0])["state"] == "lost")
            await asyncio.sleep(0.1)
            assert not task.done()
            assert cluster.executor.view()["jobs"][0]["in_flight"] == 0
            cluster.wires[0].mend()
            await end(task)
            assert_complete(bodies, results)

    asyncio.run(scenario())


def test_an_engine_that_joins_in_the_middle_is_given_lines():
    async def scenario() -> None:
        async with FakeCluster([FakeEngine()]) as cluster:
            bodies = job(250)
            results, task = await begin(cluster, bodies, 30)
            third = FakeEngine()
            wire = await cluster.join(third)
            assert cluster.view(wire)["state"] == "up"
            await end(task)
            assert_complete(bodies, results)
            assert third.answered > 40

    asyncio.run(scenario())


def test_an_engine_that_is_told_to_leave_gives_its_lines_back_and_is_not_blamed():
    async def scenario() -> None:
        async with FakeCluster([FakeEngine(), FakeEngine(), FakeEngine()]) as cluster:
            bodies = job(300)
            results, task = await begin(cluster, bodies, 30)
            for wire in cluster.wires[:2]:
                await cluster.executor.cluster.remove(EngineAddress(wire.url, KEY), "drained")
            await end(task)
            assert_complete(bodies, results)
            assert len(cluster.executor.view()["engines"]) == 1

    asyncio.run(scenario())


def test_another_model_is_refused_and_both_are_named():
    async def scenario() -> None:
        async with FakeCluster([FakeEngine()]) as cluster:
            wire = await cluster.join(FakeEngine(fingerprint="other@2"))
            view = cluster.view(wire)
            assert view["state"] == "refused"
            assert "other@2" in view["reason"]
            assert "fake@1" in view["reason"]
            bodies = job(50)
            assert_complete(bodies, await cluster.answers(bodies))
            assert cluster.engines[0].answered == 50

    asyncio.run(scenario())


def test_an_engine_with_new_weights_is_dropped():
    async def scenario() -> None:
        async with FakeCluster([FakeEngine(), FakeEngine()]) as cluster:
            bodies = job(300, tokens=30)
            results, task = await begin(cluster, bodies, 20)
            cluster.engines[0].fingerprint = "fake@2"
            await cluster.until(lambda: cluster.view(cluster.wires[0])["state"] == "refused")
            await end(task)
            assert_complete(bodies, results)

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("engine", "says"),
    [
        ({"link_version": 99}, "install the same release"),
        ({"key": "another-key-of-20-chars"}, "--cluster-key-file"),
    ],
)
def test_what_is_wrong_with_an_engine_is_said(engine, says):
    async def scenario() -> None:
        async with FakeCluster([FakeEngine(**engine)]) as cluster:
            view = cluster.view(cluster.wires[0])
            assert view["state"] == "lost"
            assert says in view["reason"]

    asyncio.run(scenario())


def test_a_line_with_which_two_engines_die_is_told_as_a_suspect():
    async def scenario() -> None:
        async with FakeCluster([FakeEngine(), FakeEngine(), FakeEngine()]) as cluster:
            bodies = job(300)
            deadly = 1_000 + 77
            for engine in cluster.engines:
                engine.deadly = {deadly}
            results = []

            async def take() -> None:
                async for result in cluster.run(bodies):
                    results.append(result)

            task = asyncio.create_task(take())
            with pytest.raises(EngineUnavailable) as told:
                await end(task)
            assert 77 in told.value.in_flight
            answered = {result.index for result in results}
            assert not answered & told.value.in_flight
            assert sum(bool(engine.answered) for engine in cluster.engines) >= 2
            # The third engine has not seen it.
            assert sum(bodies[77]["prompt"] in engine.heard for engine in cluster.engines) == 2

    asyncio.run(scenario())


def test_lines_without_a_plan_and_bad_lines_are_answered_too():
    async def scenario() -> None:
        async with FakeCluster([FakeEngine(), FakeEngine()]) as cluster:
            bodies = job(100)
            for index in (3, 50):
                bodies[index]["unreadable"] = True
            bodies[60]["top_p"] = float("nan")
            results = await cluster.answers(bodies)
            status = {result.index: result.status_code for result in results}
            assert sorted(status) == list(range(100))
            assert {index for index, code in status.items() if code == 400} == {3, 50, 60}

    asyncio.run(scenario())


def test_a_cancelled_job_leaves_nothing_in_the_engines():
    async def scenario() -> None:
        async with FakeCluster([FakeEngine(), FakeEngine()]) as cluster:
            bodies = job(300, tokens=50)
            _, task = await begin(cluster, bodies, 1)
            task.cancel()
            await asyncio.wait([task], timeout=MOST_SECONDS)
            assert all(view["in_flight"] == 0 for view in cluster.executor.view()["engines"])
            assert all(engine.link.in_flight == 0 for engine in cluster.engines)
            bodies = job(50)
            assert_complete(bodies, await cluster.answers(bodies))

    asyncio.run(scenario())


def test_a_second_coordinator_takes_the_engine_and_the_first_says_so():
    async def scenario() -> None:
        engine = FakeEngine()
        async with FakeCluster([engine]) as first:
            second = ClusterExecutor(Settings(), 1)
            second.cluster.add(EngineAddress(first.wires[0].url, KEY))
            await first.until(lambda: first.view(first.wires[0])["state"] == "lost")
            assert "another coordinator" in first.view(first.wires[0])["reason"]
            assert [view.state for view in second.cluster.views()] == ["up"]
            await second.stop()

    asyncio.run(scenario())


def test_a_slow_engine_is_given_less_and_does_not_hold_the_job_up():
    async def scenario() -> None:
        slow = FakeEngine(tick_seconds=0.05, slots=4)
        quick = FakeEngine(tick_seconds=0.01, slots=4)
        async with FakeCluster([slow, quick]) as cluster:
            bodies = job(160, tokens=4)
            assert_complete(bodies, await cluster.answers(bodies))
            assert slow.answered < quick.answered / 2

    asyncio.run(scenario())
