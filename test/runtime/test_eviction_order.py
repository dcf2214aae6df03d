"""Which leaf goes next, against a search through all leaves."""

from __future__ import annotations

import math

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from blendserve.planner import Side
from blendserve.runtime.eviction_order import NEVER, EvictionOrder, NodeFuture

LEFT, RIGHT = Side.LEFT, Side.RIGHT


class Leaf:
    """A node: its future, and when it was last used, which is SGLang's LRU."""

    def __init__(self):
        self.blend_future = NodeFuture()
        self.used = 0


class Order(EvictionOrder):
    """With the leaves that it orders."""

    def __init__(self):
        self.leaves = set()
        super().__init__(self.leaves, lambda leaf: leaf.used)

    def planned(self, due, side=LEFT, job="job", as_of=0, leaf=None):
        """A leaf that a planned request has used, and what it said about it."""
        leaf = leaf or Leaf()
        leaf.blend_future.used_at = self.ticks
        self.learn(leaf.blend_future, due, self.scan_end(job, side), as_of)
        self.leaves.add(leaf)
        self.add(leaf)
        return leaf

    def online(self, used, leaf=None):
        """A leaf that a request without a plan has used."""
        leaf = leaf or Leaf()
        leaf.blend_future.used_at, leaf.blend_future.online = self.ticks, True
        leaf.used = used
        self.leaves.add(leaf)
        self.add(leaf)
        return leaf

    def pop(self):
        leaf = self.first()
        if leaf is not None:
            self.leaves.discard(leaf)
            self.forget(leaf)
        return leaf


@pytest.fixture
def order():
    return Order()


def test_what_nobody_needs_goes_first_and_what_is_needed_soonest_last(order):
    soon, never, late = order.planned(3), order.planned(NEVER), order.planned(90)
    assert [order.pop() for _ in range(4)] == [never, late, soon, None]


def test_each_side_measures_from_where_it_is(order):
    """A left end that is ahead of the timetable needs its next prefix soon, not late."""
    left, right = order.planned(710, LEFT), order.planned(600, RIGHT)
    assert order.first() is left
    order.advance("job", LEFT, 700, since=0)
    order.advance("job", RIGHT, 300, since=0)
    assert order.first() is right


def test_a_new_plan_moves_both_sides_to_its_start(order):
    left, right = order.planned(1010, LEFT), order.planned(1005, RIGHT)
    order.advance("job", LEFT, 1001, since=1000)
    assert order.distance(right) == 5
    assert order.first() is left


def test_each_job_has_numbers_of_its_own(order):
    order.planned(90_010, job="old")
    new = order.planned(400, job="new")
    order.advance("old", LEFT, 90_000, since=0)
    order.advance("new", LEFT, 0, since=0)
    assert order.first() is new


def test_of_two_jobs_that_need_a_prefix_the_sooner_counts(order):
    shared = order.planned(50, job="a", as_of=700)
    order.planned(20, job="b", as_of=1, leaf=shared)
    assert order.distance(shared) == 20
    order.planned(NEVER, job="a", as_of=710, leaf=shared)
    assert order.distance(shared) == 20
    order.advance("b", LEFT, 21, since=0)
    order.planned(30, job="a", as_of=711, leaf=shared)
    assert order.distance(shared) == 30


def test_what_a_later_request_has_said_stands(order):
    """One that ends late knows less than one that came after it."""
    leaf = order.planned(12, as_of=11)
    order.planned(11, as_of=10, leaf=leaf)
    assert leaf.blend_future.due == 12


def test_the_prefixes_of_a_job_that_was_cancelled_do_not_stay(order):
    """Its scan ends stand still, so what they need is never overdue."""
    cancelled, going_on = order.planned(3, job="cancelled"), order.planned(40, job="other")
    assert order.first() is going_on
    order.ticks = 41
    order.advance("other", LEFT, 5, since=0)
    assert order.first() is cancelled


def test_online_leaves_go_by_sglangs_policy(order):
    leaves = [order.online(used) for used in (5, 1, 3)]
    leaves[1].used = 9  # A match since; SGLang has only changed the key.
    assert [order.pop().used for _ in leaves] == [3, 5, 9]


def test_an_online_leaf_counts_as_due_again_after_as_long_as_it_has_not_been_used(order):
    planned, idle = order.planned(100), order.online(used=0)
    order.ticks = 99
    order.advance("job", LEFT, 0, since=0)
    assert order.first() is planned
    order.ticks = 101
    order.advance("job", LEFT, 0, since=0)
    assert order.first() is idle


def test_what_online_requests_use_is_not_dropped_because_no_planned_one_needs_it(order):
    """A system prompt that a job shares with online traffic, near the job's end."""
    system, far = order.planned(NEVER), order.planned(500)
    assert order.first() is system
    order.ticks = 400
    order.online(used=1, leaf=system)
    assert order.first() is far


def test_a_leaf_whose_request_did_not_come_goes_by_its_last_use(order):
    """It would stand last in the order for ever otherwise."""
    missed, far = order.planned(5), order.planned(40)
    order.ticks = 31
    order.advance("job", LEFT, 4, since=0)
    assert order.first() is far
    order.advance("job", LEFT, 10, since=0)
    assert order.first() is missed


def test_many_jobs_one_after_the_other_leave_no_fronts_behind(order):
    for job in range(1000):
        order.advance(str(job), LEFT, 5, since=0)
        order.planned(9, job=str(job))
        order.ticks += 1
    assert len(order._scan_ends) <= 256
    assert sum(order.pop() is not None for _ in range(1001)) == 1000


def test_evicted_leaves_are_let_go_of(order):
    for due in range(10_000):
        order.planned(due)
        assert order.pop() is not None
    assert len(order.scan_end("job", LEFT).soonest_first.entries) < 3000


class AgainstSearch(RuleBasedStateMachine):
    """Leaves that are either planned or online come and go; time passes on all counters."""

    def __init__(self):
        super().__init__()
        self.order = Order()
        self.away = []
        self.uses = 0

    @rule(
        due=st.one_of(st.integers(0, 60), st.just(NEVER)),
        side=st.sampled_from(Side),
        job=st.sampled_from("ab"),
    )
    def add_planned(self, due, side, job):
        self.uses += 1
        self.order.planned(due, side, job).used = self.uses

    @rule()
    def add_online(self):
        self.uses += 1
        self.order.online(self.uses)

    @rule(ticks=st.integers(1, 9))
    def end_requests(self, ticks):
        self.order.ticks += ticks

    @rule(
        job=st.sampled_from("ab"),
        side=st.sampled_from(Side),
        steps=st.integers(1, 9),
        since=st.integers(0, 40),
    )
    def advance(self, job, side, steps, since):
        self.order.advance(job, side, self.order.scan_end(job, side).reached + steps, since)

    @precondition(lambda self: self.order.leaves)
    @rule(data=st.data())
    def lock(self, data):
        leaf = data.draw(st.sampled_from(sorted(self.order.leaves, key=lambda leaf: leaf.used)))
        self.order.leaves.discard(leaf)
        self.away.append(leaf)

    @precondition(lambda self: self.away)
    @rule()
    def unlock(self):
        leaf = self.away.pop(0)
        self.order.leaves.add(leaf)
        self.order.add(leaf)

    @precondition(lambda self: self.order.leaves)
    @rule()
    def evict(self):
        assert self.order.pop() is not None

    @invariant()
    def the_first_is_as_far_as_any(self):
        first, leaves = self.order.first(), self.order.leaves
        assert (first is None) == (not leaves)
        if first is None:
            return
        assert first in leaves
        farthest = max(map(self.order.distance, leaves))
        assert self.order.distance(first) == farthest
        assert math.isinf(farthest) == any(leaf.blend_future.due == NEVER for leaf in leaves)


AgainstSearch.TestCase.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, database=None
)
TestAgainstSearch = AgainstSearch.TestCase
