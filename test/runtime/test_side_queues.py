"""The scheduler's two queues: who is next, who runs, and whose memory it is."""

from __future__ import annotations

from array import array
from collections import Counter
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from queue_policy import separate_steps

from blendserve.planner import Side
from blendserve.runtime.plan_tag import PLAN_ATTRIBUTE, LengthUpdate, PlanTag
from blendserve.runtime.side_queues import PlannedRequest, SideQueues

LEFT, RIGHT = Side.LEFT, Side.RIGHT


@dataclass(eq=False)
class FakeReq:
    """What SGLang's request object has of the things that the queues look at."""

    rid: str
    prompt_tokens: int = 10
    max_new_tokens: int = 100
    output_ids: list[int] = field(default_factory=list)
    ids: list[int] | None = None

    @property
    def origin_input_ids(self):
        # Prompts without ids of their own have nothing in common.
        first = hash(self.rid) % 10**9
        return array("q", self.ids or range(first, first + self.prompt_tokens))

    @property
    def sampling_params(self):
        return SimpleNamespace(max_new_tokens=self.max_new_tokens)


def planned(rid, side=LEFT, estimate=8.0, likely=(), **req):
    tag = PlanTag(side, 0, 1.0, output_tokens=estimate, likely_output_tokens=likely)
    return PlannedRequest(FakeReq(rid, **req), tag)


def queues_of(*requests, total_tokens=10_000):
    queues = SideQueues(separate_steps(total_tokens))
    for request in requests:
        queues.add(request)
    return queues


def start(queues, side):
    return queues.start(queues.candidate(side))


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
    queues = queues_of(planned("a", prompt_tokens=7), planned("b", prompt_tokens=8))
    assert queues.candidate(LEFT) == queues.candidate(LEFT)
    assert queues.candidate(LEFT).prompt_tokens == 7
    assert start(queues, LEFT).req.rid == "a"
    assert queues.candidate(LEFT).prompt_tokens == 8
    assert queues.candidate(RIGHT) is None


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
    assert queues.policy.retractions == 1
    start(queues, LEFT)
    assert queues.taken == {LEFT: 2, RIGHT: 0}
    assert queues.policy.retractions == 1


def test_a_retracted_request_waits_on_the_side_of_its_plan_whatever_it_has_produced():
    queues = queues_of(planned("a", LEFT, estimate=2.0))
    request = start(queues, LEFT)
    request.req.output_ids += [0] * 50
    for _ in range(50):
        queues.policy.decoded()
    assert queues.account.running == {LEFT: 0, RIGHT: 1}
    queues.retract(request)
    assert waiting(queues, LEFT) == ["a"]
    assert waiting(queues, RIGHT) == []


# -- shared prefixes

PREFIX = list(range(100))


def sharing(rid, *suffix, side=LEFT, **req):
    return planned(rid, side, ids=PREFIX + list(suffix), **req)


def test_siblings_wait_until_the_prefix_that_they_share_is_there():
    queues = queues_of(sharing("a", 1), sharing("b", 2), sharing("x", 3, side=RIGHT))
    first = queues.candidate(LEFT)
    assert (first.uncached_tokens, first.blocked) == (101, False)
    start(queues, LEFT)
    assert queues.candidate(LEFT).blocked
    assert queues.candidate(RIGHT).blocked, "the other side shares it too"
    assert queues.prefilled("a")
    assert not queues.prefilled("a"), "that is no news"
    for side in Side:
        head = queues.candidate(side)
        assert (head.blocked, head.uncached_tokens, head.locked_prefix_tokens) == (False, 1, 100)


def test_what_was_cached_before_blocks_nobody():
    queues = queues_of(sharing("a", 1), sharing("b", 2), sharing("c", 3))
    start(queues, LEFT)
    queues.prefilled("a")
    start(queues, LEFT)
    # b computes only its own token; the prefix is there already.
    assert not queues.candidate(LEFT).blocked
    assert queues.candidate(LEFT).uncached_tokens == 1


@pytest.mark.parametrize(
    "lose", [SideQueues.flushed, lambda queues: queues.evicted(sharing("a", 1).prompt.tokens[:50])]
)
def test_a_prefix_that_is_gone_from_the_cache_is_waited_for_again(lose):
    queues = queues_of(sharing("a", 1), sharing("b", 2), sharing("c", 3))
    start(queues, LEFT)
    queues.prefilled("a")
    lose(queues)
    assert queues.candidate(LEFT).uncached_tokens == 1, "it runs, and holds its prompt"
    queues.finish("a")
    assert queues.candidate(LEFT).uncached_tokens == 1
    queues.evicted(list(range(5000, 5100)))
    assert queues.candidate(LEFT).uncached_tokens == 1, "another prompt's prefix"
    lose(queues)
    assert queues.candidate(LEFT).uncached_tokens == 101
    start(queues, LEFT)
    assert queues.candidate(LEFT).blocked


def test_a_few_common_tokens_are_not_worth_waiting_for():
    queues = queues_of(planned("a", ids=[1] * 15 + [2] * 10), planned("b", ids=[1] * 15 + [3] * 10))
    start(queues, LEFT)
    assert not queues.candidate(LEFT).blocked


def test_the_last_token_of_a_prompt_is_always_computed():
    queues = queues_of(sharing("a"), sharing("b"))
    start(queues, LEFT)
    queues.prefilled("a")
    assert queues.candidate(LEFT).uncached_tokens == 1


def test_a_prefix_is_locked_as_long_as_somebody_runs_who_holds_it():
    queues = queues_of(sharing("a", 1), sharing("b", 2))
    start(queues, LEFT)
    queues.prefilled("a")
    assert queues.finish("a")
    head = queues.candidate(LEFT)
    # Still cached, but it now takes memory that could have been evicted.
    assert (head.uncached_tokens, head.locked_prefix_tokens) == (1, 0)


def test_who_goes_before_its_prompt_was_computed_holds_up_nobody():
    queues = queues_of(sharing("a", 1), sharing("b", 2))
    queues.put_back(start(queues, LEFT))
    assert waiting(queues, LEFT) == ["a", "b"]
    head = queues.candidate(LEFT)
    assert (head.blocked, head.uncached_tokens) == (False, 101)


def test_a_prefix_that_two_hold_does_not_come_free_with_the_first():
    queues = queues_of(
        sharing("a", 1, estimate=1.0), sharing("b", 2, estimate=150.0, max_new_tokens=150)
    )
    start(queues, LEFT)
    assert queues.account.growth_tokens() == 1.0
    queues.prefilled("a")
    start(queues, LEFT)
    # a gives back one token of its own, not the 100 that b needs too.
    assert queues.account.growth_tokens() == 149.0


# -- endings


def test_finishing_a_request_that_does_not_run_changes_nothing():
    queues = queues_of(planned("a"))
    assert not queues.finish("a")
    assert not queues.finish("unheard-of")
    assert not queues.prefilled("a")
    assert waiting(queues, LEFT) == ["a"]


def test_an_idle_engine_holds_nothing():
    queues = queues_of(planned("a"), planned("b"), planned("x", RIGHT))
    for side in (LEFT, RIGHT):
        start(queues, side)
    queues.forget_running()
    assert queues.running == {}
    assert queues.account.idle
    assert waiting(queues, LEFT) == ["b"]


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


def test_memory_is_kept_for_a_known_length_and_for_an_estimate_a_little_more():
    known, estimate = planned("a", estimate=20.0), planned("b", estimate=20.0, likely=(10, 30))
    queues = queues_of(known, estimate)
    start(queues, LEFT)
    assert queues.account.growth_tokens() == 20.0
    queues.finish("a")
    start(queues, LEFT)
    assert 20.0 < queues.account.growth_tokens() < 60.0


def test_no_output_is_expected_beyond_its_limit():
    queues = queues_of(planned("a", estimate=500.0, likely=(400, 600), max_new_tokens=50))
    start(queues, LEFT)
    assert queues.account.growth_tokens() == 50


def test_a_retracted_request_brings_its_output_back_as_prompt():
    queues = queues_of(planned("a", prompt_tokens=10, estimate=30.0, likely=(26, 34)))
    request = start(queues, LEFT)
    for produced, still_to_come in ((12, 18.0), (40, 20.0)):
        request.req.output_ids[:] = [0] * produced
        queues.retract(request)
        head = queues.candidate(LEFT)
        assert (head.prompt_tokens, head.uncached_tokens) == (10 + produced, 10 + produced)
        assert head.estimated_output_tokens == still_to_come
        assert head.max_output_tokens == 100 - produced
        start(queues, LEFT)


def test_a_running_request_books_what_it_holds_alone_and_half_its_expected_output():
    queues = queues_of(
        planned("a", prompt_tokens=100, estimate=30.0),
        planned("x", RIGHT, prompt_tokens=7, estimate=60.0),
    )
    for side in Side:
        start(queues, side)
    assert queues.account.left_tokens == 100 + 15
    assert queues.account.right_tokens == 7 + 30
    queues.finish("a")
    assert queues.account.left_tokens == 0


# -- any sequence of events


class QueuesMachine(RuleBasedStateMachine):
    """Requests arrive, start, come back, grow, end and are aborted, in any order."""

    def __init__(self):
        super().__init__()
        self.queues = SideQueues(separate_steps(2_000))
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
        offered = [start(self.queues, side) for _ in range(min(count, len(self.waiting[side])))]
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
        self.queues.policy.decoded()

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
    def prefill(self, data):
        for rid in data.draw(st.sets(st.sampled_from(sorted(self.every)))) if self.every else ():
            assert not self.queues.prefilled(rid) or rid in self.running

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
        assert self.queues.policy.retractions == self.retractions

    @invariant()
    def the_accounts_divide_the_running_requests(self):
        account = self.queues.account
        assert sum(account.running.values()) == len(self.running) == len(account)
        right = sum(self.every[rid].tag.side is RIGHT for rid in self.running)
        assert account.running[RIGHT] >= right, "one that outlives its estimate goes to the right"
        for side, tokens in ((LEFT, account.left_tokens), (RIGHT, account.right_tokens)):
            assert (tokens > 1e-6) == (account.running[side] > 0)
        assert account.idle == (not self.running)


TestAnySequenceOfEvents = QueuesMachine.TestCase
TestAnySequenceOfEvents.settings = settings(
    deadline=None, database=None, max_examples=40, stateful_step_count=30
)


# -- what a new plan expects


def test_a_new_estimate_of_a_running_request_keeps_memory_for_what_is_left():
    queues = queues_of(planned("a", estimate=8.0, likely=(7, 9), max_new_tokens=900))
    started = start(queues, LEFT)
    started.req.output_ids = [5] * 6
    for _ in range(6):
        queues.policy.decoded()
    assert queues.account.growth_tokens() < 30
    queues.learn([LengthUpdate("a", 406.0, ())])
    assert queues.account.growth_tokens() == 400
    queues.learn([LengthUpdate("a", 5000.0, ())])
    assert queues.account.growth_tokens() <= 900 - 6, "its limit is 900"
    queues.finish("a")
    assert queues.account.growth_tokens() == 0
    assert queues.account.left_tokens == 0


def test_a_new_estimate_of_a_waiting_request_counts_when_it_is_its_turn():
    queues = queues_of(planned("a", estimate=8.0, max_new_tokens=900))
    assert queues.candidate(LEFT).estimated_output_tokens == 8.0
    queues.learn([LengthUpdate("a", 300.0, (280, 320)), LengthUpdate("long gone", 9.0, ())])
    assert queues.candidate(LEFT).estimated_output_tokens == 300.0
    assert queues.candidate(LEFT).likely_output_tokens == (280, 320)


def test_a_retracted_request_comes_back_with_the_new_estimate():
    queues = queues_of(planned("a", estimate=8.0, max_new_tokens=900))
    request = start(queues, LEFT)
    queues.learn([LengthUpdate("a", 300.0, (280, 320))])
    assert getattr(request.req, PLAN_ATTRIBUTE).output_tokens == 300.0


def test_a_waiting_request_that_turns_out_long_is_no_longer_dense():
    queues = queues_of(planned("a", estimate=2.0))
    dense = queues.candidate(LEFT).density
    queues.learn([LengthUpdate("a", 5_000.0, (4_000.0, 6_000.0), guessed=True)])
    candidate = queues.candidate(LEFT)
    assert candidate.density < dense
    assert candidate.guessed
