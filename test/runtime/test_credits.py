"""How many requests the engine process may send: enough to fill the scheduler, and no more."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blendserve.planner import Side
from blendserve.runtime.credits import Credits
from blendserve.runtime.feedback import SchedulerReport

LEFT, RIGHT = Side.LEFT, Side.RIGHT
FIRST_DEPTH = 16
LARGEST_DEPTH = 1024
DEPTH_PER_STEP = 4


def report(left=0, right=0, dp_rank=0):
    return SchedulerReport(dp_rank=dp_rank, taken={"left": left, "right": right})


def test_at_first_each_side_may_send_a_few():
    credits = Credits()
    assert [credits.available(side) for side in Side] == [FIRST_DEPTH, FIRST_DEPTH]


def test_what_is_sent_takes_credit_from_its_own_side_only():
    credits = Credits()
    credits.sent(LEFT, 5)
    credits.sent(LEFT, 1)
    assert (credits.queued(LEFT), credits.available(LEFT)) == (6, FIRST_DEPTH - 6)
    assert (credits.queued(RIGHT), credits.available(RIGHT)) == (0, FIRST_DEPTH)


def test_what_the_scheduler_took_gives_its_credit_back():
    credits = Credits()
    credits.sent(LEFT, 16)
    credits.sent(RIGHT, 16)
    credits.on_report(report(left=3))
    assert (credits.available(LEFT), credits.available(RIGHT)) == (3, 0)


def test_a_retracted_request_is_queued_again():
    credits = Credits()
    credits.sent(LEFT, 4)
    credits.on_report(report(left=4))
    credits.on_report(report(left=3))
    assert credits.queued(LEFT) == 1


def test_a_report_that_comes_twice_counts_once():
    credits = Credits()
    credits.sent(RIGHT, 10)
    credits.on_report(report(right=4))
    credits.on_report(report(right=4))
    assert credits.queued(RIGHT) == 6


def test_the_next_report_makes_up_for_a_lost_one():
    credits = Credits()
    credits.sent(RIGHT, 10)
    credits.on_report(report(right=2))
    credits.on_report(report(right=9))  # the one that said 5 never came
    assert credits.queued(RIGHT) == 1


def test_towards_the_end_the_rest_stays_with_the_front_that_reaches_it_first():
    credits = Credits(replicas=2)
    credits.sent(LEFT, 2 * 16)
    credits.on_report(report(left=16))
    assert [credits.available(LEFT, left) + credits.queued(LEFT) for left in (1000, 400, 0)] == [
        2 * DEPTH_PER_STEP * 16,
        400 // 4,
        2 * FIRST_DEPTH,
    ]


def test_the_queue_grows_with_what_one_report_admits_and_stays_deep():
    credits = Credits()
    credits.sent(LEFT, 16)
    credits.on_report(report(left=16))
    assert credits.available(LEFT) == DEPTH_PER_STEP * 16
    assert credits.available(RIGHT) == FIRST_DEPTH
    credits.sent(LEFT, 1)
    credits.on_report(report(left=17))
    assert credits.available(LEFT) == DEPTH_PER_STEP * 16


def test_the_queue_grows_up_to_a_limit():
    credits = Credits()
    credits.sent(LEFT, 5000)
    credits.on_report(report(left=5000))
    assert credits.available(LEFT) == LARGEST_DEPTH


def test_the_reports_of_several_ranks_add_up():
    credits = Credits()
    credits.sent(LEFT, 12)
    credits.on_report(report(left=3, dp_rank=0))
    credits.on_report(report(left=4, dp_rank=1))
    assert credits.queued(LEFT) == 5
    credits.on_report(report(left=5, dp_rank=0))
    assert credits.queued(LEFT) == 3
    credits.on_report(report(left=7, dp_rank=1))
    assert credits.queued(LEFT) == 0


@pytest.mark.parametrize("counted", [0, 7, 16])
def test_settling_forgets_what_was_sent_and_never_counted(counted):
    credits = Credits()
    credits.sent(LEFT, 16)
    credits.on_report(report(left=counted))
    depth = max(FIRST_DEPTH, DEPTH_PER_STEP * counted)
    credits.settle()
    assert (credits.queued(LEFT), credits.available(LEFT)) == (0, depth)
    credits.sent(LEFT, 2)
    credits.on_report(report(left=counted + 1))
    assert credits.queued(LEFT) == 1


def test_what_the_server_refused_gives_its_credit_back_to_its_side():
    credits = Credits()
    credits.sent(LEFT, 16)
    credits.sent(RIGHT, 16)
    credits.refused(LEFT, 6)
    assert (credits.available(LEFT), credits.available(RIGHT)) == (6, 0)
    credits.on_report(report(left=10))
    assert credits.queued(LEFT) == 0


def test_what_was_lost_on_its_way_is_written_off_after_a_while():
    credits = Credits()
    credits.sent(LEFT, 10)
    credits.sent(RIGHT, 10)
    for _ in range(63):
        credits.on_report(report(left=7))
    assert credits.queued(LEFT) == 3
    credits.sent(RIGHT, 1)
    credits.on_report(report(left=7))
    # Nothing more came to the left for many reports; on the right something was just sent.
    assert (credits.queued(LEFT), credits.queued(RIGHT)) == (0, 11)


def test_what_waits_in_a_queue_is_not_written_off():
    credits = Credits()
    credits.sent(LEFT, 10)
    for rank in range(2):
        credits.on_report(report(left=3, dp_rank=rank))
    waiting = report(left=3, dp_rank=1)
    waiting.queued["left"] = 4
    for _ in range(200):
        credits.on_report(waiting)
        credits.on_report(report(left=3))
    assert credits.queued(LEFT) == 4


def test_a_report_that_comes_after_settling_makes_no_credit_out_of_nothing():
    credits = Credits()
    credits.sent(LEFT, 16)
    credits.settle()
    credits.on_report(report(left=16))  # of what was sent and aborted before
    depth = DEPTH_PER_STEP * 16
    assert (credits.queued(LEFT), credits.available(LEFT)) == (0, depth)
    credits.sent(LEFT, 5)
    credits.on_report(report(left=18))
    assert (credits.queued(LEFT), credits.available(LEFT)) == (3, depth - 3)


steps = st.lists(
    st.tuples(
        st.sampled_from(Side),
        st.integers(0, 60),  # wanted
        st.integers(0, 60),  # refused of these at most
        st.integers(0, 2),  # rank that takes
        st.integers(0, 60),  # taken at most
        st.booleans(),  # whether the report arrives
    ),
    min_size=10,
    max_size=40,
)


@settings(deadline=None, database=None)
@given(steps)
def test_a_sender_that_heeds_its_credits_never_fills_a_queue_beyond_its_depth(steps):
    credits = Credits()
    queue: Counter[Side] = Counter()
    taken = {rank: Counter(dict.fromkeys(Side, 0)) for rank in range(3)}
    reported = {rank: Counter(counts) for rank, counts in taken.items()}
    depth = dict.fromkeys(Side, FIRST_DEPTH)
    for side, wanted, refused, rank, most, arrives in steps:
        sent = min(wanted, max(credits.available(side), 0))
        credits.sent(side, sent)
        assert credits.queued(side) <= depth[side]
        refused = min(refused, sent)
        credits.refused(side, refused)
        queue[side] += sent - refused
        # What the scheduler holds is never more than the sender believes.
        assert queue[side] <= credits.queued(side) <= depth[side]
        admitted = min(most, queue[side])
        queue[side] -= admitted
        taken[rank][side] += admitted
        if not arrives:
            continue
        credits.on_report(report(taken[rank][LEFT], taken[rank][RIGHT], dp_rank=rank))
        for each in Side:
            news = taken[rank][each] - reported[rank][each]
            depth[each] = min(max(depth[each], DEPTH_PER_STEP * news), LARGEST_DEPTH)
        reported[rank] = Counter(taken[rank])
    for rank, counts in taken.items():
        credits.on_report(report(counts[LEFT], counts[RIGHT], dp_rank=rank))
    assert {side: credits.queued(side) for side in Side} == {side: queue[side] for side in Side}


# -- data-parallel replicas


def send(credits, side, shares=True):
    replica = credits.replica(side, 1, shares)
    credits.sent(side, 1)
    return replica


def test_one_scheduler_needs_no_choice():
    assert Credits().replica(LEFT, 1, shares=False) is None


def test_each_replica_has_a_queue():
    credits = Credits(3)
    assert credits.available(LEFT) == 3 * FIRST_DEPTH


def test_requests_that_share_a_prefix_stay_together_while_there_is_room():
    credits = Credits(2)
    first = send(credits, LEFT, shares=False)
    assert [send(credits, LEFT) for _ in range(FIRST_DEPTH - 1)] == [first] * (FIRST_DEPTH - 1)
    # Its queue is full: the other one computes the prefix once more, and then has it.
    assert [send(credits, LEFT) for _ in range(3)] == [1 - first] * 3
    credits.on_report(report(left=10, dp_rank=first))
    assert send(credits, LEFT) == 1 - first


def test_what_shares_nothing_goes_to_the_shortest_queue():
    credits = Credits(3)
    assert sorted(send(credits, RIGHT, shares=False) for _ in range(3)) == [0, 1, 2]
    credits.on_report(report(right=1, dp_rank=2))
    assert send(credits, RIGHT, shares=False) == 2


def test_a_replica_that_starts_all_at_once_does_not_get_all():
    """What starts leaves no queue; the other replica would be idle."""
    credits = Credits(2)
    sent = [send(credits, LEFT, shares=False)]
    for _ in range(63):
        sent.append(send(credits, LEFT))
        credits.on_report(report(left=sent.count(0), dp_rank=0))
        credits.on_report(report(left=sent.count(1), dp_rank=1))
    counts = Counter(sent)
    assert min(counts[0], counts[1]) >= 24
    # They keep what they share where it is: each run of requests is as long as it can be.
    changes = sum(a != b for a, b in pairwise(sent))
    assert changes <= 3


def test_a_replica_that_answers_sooner_gets_more():
    credits = Credits(2)
    sent: list[int] = []
    for _ in range(100):
        sent.append(send(credits, LEFT, shares=bool(sent)))
        credits.on_report(report(left=sent.count(0), dp_rank=0))
        credits.on_report(report(left=sent.count(1), dp_rank=1))
        if sent[-1] == 0:
            credits.answered(0, 1)
    assert sent.count(0) > sent.count(1)


def test_sides_choose_for_themselves():
    credits = Credits(2)
    left = send(credits, LEFT, shares=False)
    for _ in range(4):
        send(credits, RIGHT, shares=False)
    assert send(credits, LEFT) == left


def test_what_never_arrived_is_forgotten_with_the_rest():
    credits = Credits(2)
    first = send(credits, LEFT, shares=False)
    for _ in range(FIRST_DEPTH - 1):
        send(credits, LEFT)
    credits.on_report(report(left=4, dp_rank=first))
    credits.on_report(report(left=0, dp_rank=1 - first))
    credits.settle()
    assert credits.available(LEFT) == 2 * FIRST_DEPTH
    assert send(credits, LEFT) == first
    assert send(credits, LEFT, shares=False) == 1 - first


# -- replicas that come and go


def test_nobody_is_sent_anything_before_one_joins():
    credits = Credits(0)
    assert (credits.replicas, credits.available(LEFT)) == (0, 0)
    first = credits.join()
    assert credits.available(LEFT) == FIRST_DEPTH
    assert send(credits, LEFT) == first


def test_numbers_are_not_given_twice():
    credits = Credits(0)
    first = credits.join()
    credits.leave(first)
    assert credits.join() != first


def test_what_one_that_leaves_had_in_its_queues_is_forgotten():
    credits = Credits(0)
    one, two = credits.join(), credits.join()
    sent = [send(credits, LEFT, shares=False) for _ in range(20)]
    assert Counter(sent) == {one: 10, two: 10}
    credits.on_report(report(left=4, dp_rank=one))
    credits.on_report(report(left=7, dp_rank=two))
    assert credits.queued(LEFT) == 9
    credits.leave(one)
    assert credits.queued(LEFT) == 3
    assert credits.available(LEFT) == 4 * 7 - 3
    credits.on_report(report(left=10, dp_rank=two))
    assert credits.queued(LEFT) == 0


def test_one_that_leaves_before_it_has_reported_takes_all_of_its_own_with_it():
    credits = Credits(0)
    one, two = credits.join(), credits.join()
    for _ in range(8):
        send(credits, RIGHT, shares=False)
    credits.leave(two)
    assert credits.queued(RIGHT) == 4
    credits.leave(one)
    assert (credits.queued(RIGHT), credits.available(RIGHT), credits.replicas) == (0, 0, 0)


def test_one_that_joins_late_is_given_most_until_it_has_as_much_to_do():
    credits = Credits(0)
    one = credits.join()
    for _ in range(FIRST_DEPTH):
        send(credits, LEFT)
    credits.on_report(report(left=FIRST_DEPTH, dp_rank=one))
    two = credits.join()
    sent = [send(credits, LEFT) for _ in range(FIRST_DEPTH)]
    assert sent.count(two) >= FIRST_DEPTH - 1


def test_answers_and_refusals_of_one_that_has_left_change_nothing():
    credits = Credits(0)
    one, two = credits.join(), credits.join()
    for _ in range(8):
        send(credits, LEFT, shares=False)
    credits.leave(one)
    before = credits.queued(LEFT)
    credits.answered(one, 1)
    credits.refused(LEFT, 1, one)
    assert credits.queued(LEFT) == before
    credits.refused(LEFT, 1, two)
    assert credits.queued(LEFT) == before - 1


def test_what_was_written_off_is_not_taken_back_a_second_time():
    credits = Credits(0)
    one, two = credits.join(), credits.join()
    for _ in range(8):
        send(credits, LEFT, shares=False)
    for _ in range(64):
        credits.on_report(report(left=1, dp_rank=one))
    assert credits.queued(LEFT) == 0
    credits.leave(one)
    assert credits.queued(LEFT) == 0
    assert send(credits, LEFT) == two
    assert credits.queued(LEFT) == 1


@settings(deadline=None, database=None)
@given(
    st.lists(
        st.one_of(
            st.just(("join", 0)),
            st.tuples(st.just("leave"), st.integers(0, 3)),
            st.tuples(st.just("send"), st.sampled_from(Side)),
            st.tuples(st.just("take"), st.integers(0, 3)),
        ),
        max_size=120,
    )
)
def test_however_they_come_and_go_the_queues_are_known(steps):
    """A model of what is in which queue, beside the credits."""
    credits = Credits(0)
    queues: dict[int, Counter[Side]] = {}
    taken: dict[int, Counter[Side]] = {}
    for what, which in steps:
        if what == "join":
            replica = credits.join()
            assert replica not in taken
            queues[replica], taken[replica] = Counter(), Counter()
        elif what == "send" and credits.available(which) > 0:
            chosen = send(credits, which, shares=True)
            queues[chosen][which] += 1
        elif what in ("leave", "take") and queues:
            replica = sorted(queues)[which % len(queues)]
            if what == "leave":
                credits.leave(replica)
                del queues[replica]
                continue
            for side in Side:
                taken[replica][side] += queues[replica].pop(side, 0)
            counts = taken[replica]
            credits.on_report(report(counts[LEFT], counts[RIGHT], dp_rank=replica))
        for side in Side:
            assert credits.queued(side) == sum(queue[side] for queue in queues.values())
        assert credits.replicas == len(queues)
