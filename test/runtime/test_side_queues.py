"""The scheduler's two queues: who is next, who runs, and whose memory it is."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from blendserve.planner import Side
from blendserve.runtime.plan_tag import PlanTag
from blendserve.runtime.side_queues import PlannedRequest, SideQueues

LEFT, RIGHT = Side.LEFT, Side.RIGHT


@dataclass(eq=False)
class FakeReq:
    """What SGLang's request object has of the things that the queues look at."""

    rid: str
    prompt_tokens: int = 10
    max_new_tokens: int = 100
    output_ids: list[int] = field(default_factory=list)
    ended: bool = False

    @property
    def origin_input_ids(self):
        return range(self.prompt_tokens)

    @property
    def sampling_params(self):
        return SimpleNamespace(max_new_tokens=self.max_new_tokens)

    def finished(self):
        return self.ended


def planned(rid, side=LEFT, estimate=8.0, **req):
    tag = PlanTag(side, rank=0, density=1.0, target_density=1.0, output_tokens=estimate)
    return PlannedRequest(FakeReq(rid, **req), tag)


def queues_of(*requests):
    queues = SideQueues()
    for request in requests:
        queues.add(request)
    return queues


def start(queues, side, private_tokens=0):
    return queues.start(side, private_tokens)


def waiting(queues, side):
    return [request.req.rid for request in queues.waiting[side]]


# -- order


def test_each_side_starts_in_order_of_arrival():
    queues = queues_of(planned("a"), planned("x", RIGHT), planned("b"), planned("y", RIGHT))
    assert len(queues) == 4
    assert [start(queues, LEFT).req.rid for _ in range(2)] == ["a", "b"]
    assert [start(queues, RIGHT).req.rid for _ in range(2)] == ["x", "y"]
    assert len(queues) == 0


def test_the_head_is_what_starts_next_and_looking_takes_nothing():
    queues = queues_of(planned("a"), planned("b"))
    assert queues.head(LEFT) is queues.head(LEFT)
    assert start(queues, LEFT).req.rid == "a"
    assert queues.head(LEFT).req.rid == "b"
    assert queues.head(RIGHT) is None


def test_an_empty_side_has_nothing_to_start():
    with pytest.raises(IndexError):
        start(queues_of(planned("x", RIGHT)), LEFT)


def test_a_started_request_runs_and_is_counted_once():
    queues = queues_of(planned("a"))
    request = start(queues, LEFT)
    assert queues.running == {"a": request}
    assert queues.taken == {LEFT: 1, RIGHT: 0}
    queues.finish("a")
    assert queues.running == {}
    assert queues.taken == {LEFT: 1, RIGHT: 0}


def test_requests_put_back_in_reverse_stand_as_before():
    queues = queues_of(*(planned(rid) for rid in "abcd"))
    started = [start(queues, LEFT) for _ in range(3)]
    for request in reversed(started):
        queues.put_back(request)
    assert waiting(queues, LEFT) == ["a", "b", "c", "d"]
    assert queues.running == {}
    assert queues.taken == {LEFT: 0, RIGHT: 0}


def test_a_retracted_request_is_next_and_no_longer_counts_as_taken():
    queues = queues_of(planned("a"), planned("b"), planned("x", RIGHT))
    request = start(queues, LEFT)
    start(queues, LEFT)
    # SGLang hands over its request object alone; the tag is read from it anew.
    queues.retract(PlannedRequest(request.req, request.tag))
    assert waiting(queues, LEFT) == ["a"]
    assert list(queues.running) == ["b"]
    assert queues.taken == {LEFT: 1, RIGHT: 0}
    assert queues.retractions == 1
    start(queues, LEFT)
    assert queues.taken == {LEFT: 2, RIGHT: 0}
    assert queues.retractions == 1


def test_a_retracted_request_waits_on_the_side_of_its_plan_whatever_it_has_produced():
    queues = queues_of(planned("a", LEFT, estimate=2.0))
    request = start(queues, LEFT)
    request.req.output_ids += [0] * 50
    assert queues.running_count(RIGHT) == 1
    queues.retract(request)
    assert waiting(queues, LEFT) == ["a"]
    assert waiting(queues, RIGHT) == []


def test_the_latest_that_started_and_still_run_may_hold_a_prefix():
    queues = queues_of(planned("a"), planned("b"), planned("x", RIGHT))
    assert list(queues.latest_running()) == []
    for side in (LEFT, LEFT, RIGHT):
        start(queues, side)
    assert {request.req.rid for request in queues.latest_running()} == {"a", "b", "x"}
    queues.finish("b")
    assert {request.req.rid for request in queues.latest_running()} == {"a", "x"}


def test_requests_put_back_do_not_hide_a_running_one_that_may_hold_a_prefix():
    queues = queues_of(planned("a"), planned("b"))
    start(queues, LEFT)
    for _ in range(100):
        queues.put_back(start(queues, LEFT))
    assert [request.req.rid for request in queues.latest_running()] == ["a"]


def test_requests_that_ended_do_not_hide_a_running_one_that_may_hold_a_prefix():
    queues = queues_of(planned("a"), *(planned(f"b{n}") for n in range(100)))
    start(queues, LEFT)
    for n in range(100):
        start(queues, LEFT)
        queues.finish(f"b{n}")
    assert [request.req.rid for request in queues.latest_running()] == ["a"]


def test_a_request_that_started_again_may_hold_a_prefix_once_and_as_it_is_now():
    queues = queues_of(planned("a"))
    request = start(queues, LEFT, private_tokens=5)
    queues.retract(PlannedRequest(request.req, request.tag))
    assert list(queues.latest_running()) == []
    start(queues, LEFT, private_tokens=7)
    assert [each.private_tokens for each in queues.latest_running()] == [7]
    assert list(queues.latest_running()) == list(queues.running.values())


# -- endings


def test_finishing_a_request_that_does_not_run_changes_nothing():
    queues = queues_of(planned("a"))
    queues.finish("a")
    queues.finish("unheard-of")
    assert waiting(queues, LEFT) == ["a"]


def test_all_that_ended_is_dropped_and_all_else_kept():
    queues = queues_of(*(planned(rid) for rid in "abc"), planned("x", RIGHT))
    for side in (LEFT, LEFT, LEFT, RIGHT):
        start(queues, side)
    queues.running["a"].req.ended = queues.running["x"].req.ended = True
    queues.drop_finished()
    assert list(queues.running) == ["b", "c"]
    assert queues.taken == {LEFT: 3, RIGHT: 1}


def test_removed_requests_leave_both_queues_and_count_as_taken():
    queues = queues_of(
        planned("job-1"), planned("keep-1"), planned("job-2", RIGHT), planned("job-3")
    )
    removed = queues.remove_waiting(lambda rid: rid.startswith("job-"))
    assert sorted(request.req.rid for request in removed) == ["job-1", "job-2", "job-3"]
    assert waiting(queues, LEFT) == ["keep-1"]
    assert waiting(queues, RIGHT) == []
    assert queues.taken == {LEFT: 2, RIGHT: 1}
    assert queues.running == {}


def test_removing_leaves_running_requests_alone():
    queues = queues_of(planned("job-1"), planned("job-2"))
    start(queues, LEFT)
    assert [r.req.rid for r in queues.remove_waiting(lambda rid: True)] == ["job-2"]
    assert list(queues.running) == ["job-1"]


# -- memory


def test_memory_is_kept_for_the_estimate_and_not_much_more():
    assert 20 <= planned("a", estimate=20.0, max_new_tokens=1000).output_tokens <= 30


@pytest.mark.parametrize("produced", [60, 61, 98])
def test_an_output_that_outgrew_its_estimate_is_expected_to_go_on(produced):
    request = planned("a", estimate=20.0, max_new_tokens=100, output_ids=[0] * produced)
    assert request.output_tokens == produced + 1
    assert request.remaining_tokens == 1


def test_no_output_is_expected_beyond_its_limit():
    request = planned("a", estimate=500.0, max_new_tokens=50)
    assert (request.output_tokens, request.remaining_tokens) == (50, 50)
    request.req.output_ids += [0] * 50
    assert (request.output_tokens, request.remaining_tokens) == (50, 0)


def test_a_running_request_books_what_it_holds_alone_and_half_its_expected_output():
    queues = queues_of(
        planned("a", prompt_tokens=100, estimate=30.0),
        planned("x", RIGHT, prompt_tokens=7, estimate=60.0),
    )
    assert (queues.account(LEFT), queues.account(RIGHT)) == (0, 0)
    left = start(queues, LEFT, private_tokens=40)
    right = start(queues, RIGHT, private_tokens=7)
    assert queues.account(LEFT) == 40 + left.output_tokens / 2
    assert queues.account(RIGHT) == 7 + right.output_tokens / 2


def test_a_request_that_outlives_its_estimate_counts_on_the_right():
    queues = queues_of(planned("a", LEFT, estimate=3.0))
    request = start(queues, LEFT, private_tokens=20)
    request.req.output_ids += [0, 0, 0]
    assert (queues.running_count(LEFT), queues.running_count(RIGHT)) == (1, 0)
    assert (queues.account(LEFT), queues.account(RIGHT)) == (request.account_tokens, 0)
    request.req.output_ids.append(0)
    assert (queues.running_count(LEFT), queues.running_count(RIGHT)) == (0, 1)
    assert (queues.account(LEFT), queues.account(RIGHT)) == (0, request.account_tokens)


def test_a_request_of_the_right_stays_there():
    queues = queues_of(planned("x", RIGHT, estimate=3.0))
    request = start(queues, RIGHT)
    for _ in range(10):
        assert (queues.running_count(LEFT), queues.running_count(RIGHT)) == (0, 1)
        request.req.output_ids.append(0)


def test_growth_is_what_each_running_request_will_take_and_give_back():
    queues = queues_of(
        planned("a", estimate=30.0, output_ids=[0] * 12),
        planned("x", RIGHT, estimate=60.0),
        planned("b", estimate=5.0),
    )
    assert queues.growth().peak_tokens() == 0
    left = start(queues, LEFT, private_tokens=40)
    right = start(queues, RIGHT, private_tokens=7)
    remaining = [left.output_tokens - 12, right.output_tokens]
    assert queues.growth().remaining_tokens.tolist() == remaining
    assert queues.growth().private_tokens.tolist() == [52, 7]
    queues.finish("a")
    assert queues.growth().remaining_tokens.tolist() == remaining[1:]


# -- any sequence of events


class QueuesMachine(RuleBasedStateMachine):
    """Requests arrive, start, come back, grow, end and are aborted, in any order."""

    def __init__(self):
        super().__init__()
        self.queues = SideQueues()
        self.every: dict[str, PlannedRequest] = {}
        self.waiting: dict[Side, list[str]] = {side: [] for side in Side}
        self.running: set[str] = set()
        self.gone: set[str] = set()
        self.retractions = 0

    def pick(self, data):
        return self.every[data.draw(st.sampled_from(sorted(self.running)), label="request")]

    @rule(
        side=st.sampled_from(Side),
        prompt_tokens=st.integers(1, 50),
        max_new_tokens=st.integers(1, 30),
        estimate=st.floats(0, 40),
    )
    def arrive(self, side, prompt_tokens, max_new_tokens, estimate):
        rid = f"{len(self.every) % 3}-{len(self.every)}"
        request = planned(
            rid, side, estimate, prompt_tokens=prompt_tokens, max_new_tokens=max_new_tokens
        )
        self.every[rid] = request
        self.waiting[side].append(rid)
        self.queues.add(request)

    @rule(side=st.sampled_from(Side), count=st.integers(1, 4), admitted=st.integers(0, 4))
    def offer(self, side, count, admitted):
        """SGLang is offered the heads of a side and takes the first few of them."""
        offered = [
            self.queues.start(side, private_tokens=len(self.every))
            for _ in range(min(count, len(self.waiting[side])))
        ]
        assert [request.req.rid for request in offered] == self.waiting[side][: len(offered)]
        for request in reversed(offered[admitted:]):
            self.queues.put_back(request)
        for request in offered[:admitted]:
            self.waiting[side].remove(request.req.rid)
            self.running.add(request.req.rid)

    @precondition(lambda self: self.running)
    @rule(data=st.data(), tokens=st.integers(1, 10))
    def decode(self, data, tokens):
        req = self.pick(data).req
        req.output_ids += [0] * min(tokens, req.max_new_tokens - len(req.output_ids))

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def retract(self, data):
        request = self.pick(data)
        again = self.every[request.req.rid] = PlannedRequest(request.req, request.tag)
        self.queues.retract(again)
        self.running.remove(request.req.rid)
        self.waiting[request.tag.side].insert(0, request.req.rid)
        self.retractions += 1

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def finish(self, data):
        rid = self.pick(data).req.rid
        self.queues.finish(rid)
        self.running.remove(rid)
        self.gone.add(rid)

    @rule(data=st.data())
    def drop_finished(self, data):
        ended = data.draw(st.sets(st.sampled_from(sorted(self.running)))) if self.running else set()
        for rid in ended:
            self.every[rid].req.ended = True
        self.queues.drop_finished()
        self.running -= ended
        self.gone |= ended

    @rule(prefix=st.sampled_from(["0-", "1-", ""]))
    def abort_waiting(self, prefix):
        removed = [
            request.req.rid
            for request in self.queues.remove_waiting(lambda rid: rid.startswith(prefix))
        ]
        expected = [r for side in Side for r in self.waiting[side] if r.startswith(prefix)]
        assert removed == expected
        for side in Side:
            self.waiting[side] = [r for r in self.waiting[side] if not r.startswith(prefix)]
        self.gone.update(removed)

    @invariant()
    def every_request_is_in_one_place(self):
        held = [waiting(self.queues, side) for side in Side] + [list(self.queues.running)]
        places = Counter(rid for place in held for rid in place)
        assert places == Counter(self.every.keys() - self.gone)

    @invariant()
    def the_queues_keep_their_order(self):
        assert {side: waiting(self.queues, side) for side in Side} == self.waiting
        assert len(self.queues) == sum(len(queue) for queue in self.waiting.values())

    @invariant()
    def taken_is_what_arrived_and_does_not_wait(self):
        arrived = Counter(request.tag.side for request in self.every.values())
        for side in Side:
            assert self.queues.taken[side] == arrived[side] - len(self.waiting[side])
        assert self.queues.retractions == self.retractions

    @invariant()
    def the_accounts_divide_the_running_requests(self):
        running = [self.every[rid] for rid in self.running]
        booked = sum(request.account_tokens for request in running)
        assert sum(map(self.queues.account, Side)) == pytest.approx(booked)
        assert sum(map(self.queues.running_count, Side)) == len(running)
        outlived = {r.req.rid for r in running if len(r.req.output_ids) > r.tag.output_tokens}
        right = {r.req.rid for r in running if r.tag.side is RIGHT}
        assert self.queues.running_count(RIGHT) == len(outlived | right)

    @invariant()
    def nothing_is_expected_beyond_the_limit(self):
        limits = sum(
            self.every[rid].req.max_new_tokens - len(self.every[rid].req.output_ids)
            for rid in self.running
        )
        remaining = self.queues.growth().remaining_tokens
        assert len(remaining) == len(self.running)
        assert (remaining >= 0).all()
        assert remaining.sum() <= limits


TestAnySequenceOfEvents = QueuesMachine.TestCase
TestAnySequenceOfEvents.settings = settings(
    deadline=None, database=None, max_examples=40, stateful_step_count=30
)
