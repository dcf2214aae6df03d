"""Which leaf goes next, against a search through all leaves."""

from __future__ import annotations

import math

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from blendserve.planner import Side
from blendserve.runtime.eviction_order import NEVER, EvictionOrder, NodeFuture


class Leaf:
    """A node: its future, and when it was last used, which is SGLang's LRU."""

    def __init__(self, due=None, side=Side.LEFT, used=0):
        self.blend_future = NodeFuture(due=due, side=side)
        self.used = used


def order_of(*leaves):
    order = EvictionOrder(set(leaves), lambda leaf: leaf.used)
    for leaf in leaves:
        order.add(leaf)
    return order


def eviction(order):
    """All leaves in the order in which they go."""
    while (leaf := order.first()) is not None:
        order._leaves.discard(leaf)
        order.forget(leaf)
        yield leaf


def online(order, leaf, ticks):
    leaf.blend_future.used_at = leaf.used = ticks
    leaf.blend_future.online = True
    order.add(leaf)


def test_what_nobody_needs_goes_first_and_what_is_needed_soonest_last():
    soon, late, never = Leaf(3), Leaf(90), Leaf(NEVER)
    assert list(eviction(order_of(soon, never, late))) == [never, late, soon]


def test_each_side_measures_from_where_it_is():
    """A left front that is ahead of the timetable needs its next prefix soon, not late."""
    left, right = Leaf(710, Side.LEFT), Leaf(600, Side.RIGHT)
    order = order_of(left, right)
    assert order.first() is left
    order.advance(Side.LEFT, 700, since=0)
    order.advance(Side.RIGHT, 300, since=0)
    assert order.first() is right


def test_a_new_plan_moves_both_sides_to_its_start():
    left, right = Leaf(1010, Side.LEFT), Leaf(1005, Side.RIGHT)
    order = order_of(left, right)
    order.advance(Side.LEFT, 1001, since=1000)
    assert order.distance(right) == 5
    assert order.first() is left


def test_online_leaves_go_by_sglangs_policy():
    order = order_of()
    leaves = [Leaf(used=used) for used in (5, 1, 3)]
    order._leaves.update(leaves)
    for leaf in leaves:
        online(order, leaf, leaf.used)
    leaves[1].used = 9  # A match since; SGLang has only changed the key.
    assert [leaf.used for leaf in eviction(order)] == [3, 5, 9]


def test_an_online_leaf_counts_as_due_again_after_as_long_as_it_has_not_been_used():
    planned, idle = Leaf(100), Leaf()
    order = order_of(planned)
    order._leaves.add(idle)
    online(order, idle, 0)
    order.ticks = 99
    assert order.first() is planned
    order.ticks = 101
    assert order.first() is idle


def test_what_online_requests_use_is_not_dropped_because_no_planned_one_needs_it():
    """A system prompt that a job shares with online traffic, near the job's end."""
    system, far = Leaf(NEVER), Leaf(500)
    order = order_of(system, far)
    assert order.first() is system
    order.ticks = 1000
    online(order, system, 998)
    assert order.first() is far


def test_a_leaf_whose_request_did_not_come_goes_by_its_last_use():
    """It would stand last in the order for ever otherwise."""
    missed, far = Leaf(5), Leaf(40)
    order = order_of(missed, far)
    order.ticks = 31
    assert order.first() is far
    order.advance(Side.LEFT, 10, since=0)
    assert order.first() is missed


def test_what_a_later_request_has_said_stands():
    future = NodeFuture()
    future.learn(12, Side.LEFT, as_of=11)
    future.learn(11, Side.LEFT, as_of=10)  # It took longer to finish.
    assert (future.due, future.as_of) == (12, 11)


class AgainstSearch(RuleBasedStateMachine):
    """Leaves that are either planned or online come and go; time passes on all counters."""

    def __init__(self):
        super().__init__()
        self.leaves = set()
        self.order = EvictionOrder(self.leaves, lambda leaf: leaf.used)
        self.away = []
        self.uses = 0

    @rule(due=st.one_of(st.integers(0, 60), st.just(NEVER)), side=st.sampled_from(Side))
    def add_planned(self, due, side):
        self.add(Leaf(due, side))

    @rule()
    def add_online(self):
        self.add(Leaf())

    def add(self, leaf):
        self.uses += 1
        leaf.blend_future.used_at = self.order.ticks
        leaf.used = self.uses
        self.leaves.add(leaf)
        self.order.add(leaf)

    @rule(ticks=st.integers(1, 9))
    def end_requests(self, ticks):
        self.order.ticks += ticks

    @rule(side=st.sampled_from(Side), steps=st.integers(1, 9), since=st.integers(0, 40))
    def advance(self, side, steps, since):
        self.order.advance(side, self.order.reached[side] + steps, since)

    @precondition(lambda self: self.leaves)
    @rule(data=st.data())
    def lock(self, data):
        leaf = data.draw(st.sampled_from(sorted(self.leaves, key=id)))
        self.leaves.discard(leaf)
        self.away.append(leaf)

    @precondition(lambda self: self.away)
    @rule()
    def unlock(self):
        leaf = self.away.pop(0)
        self.leaves.add(leaf)
        self.order.add(leaf)

    @precondition(lambda self: self.leaves)
    @rule()
    def evict(self):
        leaf = self.order.first()
        assert leaf is not None
        self.leaves.discard(leaf)
        self.order.forget(leaf)

    @invariant()
    def the_first_is_as_far_as_any(self):
        first = self.order.first()
        assert (first is None) == (not self.leaves)
        if first is None:
            return
        assert first in self.leaves
        farthest = max(map(self.order.distance, self.leaves))
        assert self.order.distance(first) == farthest
        assert math.isinf(farthest) == any(leaf.blend_future.due == NEVER for leaf in self.leaves)


AgainstSearch.TestCase.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, database=None
)
TestAgainstSearch = AgainstSearch.TestCase
