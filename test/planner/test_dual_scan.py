"""The two scanners, the memory partition between them, and admission."""

import math
import pickle
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from planner_workloads import LLAMA_ON_A100, jobs, mixed_job

from blendserve.planner import DualScanner, Job, Side, make_plan, partition_memory
from blendserve.planner.dual_scanner import PREFILL_ONLY_SHARE
from blendserve.policy import Admission, Candidate, KVAccount

LEFT, RIGHT = Side.LEFT, Side.RIGHT
densities = st.one_of(st.floats(0, 1e6), st.just(math.inf))


def test_the_papers_example_of_a_partition():
    left, right = partition_memory(60, 1.27, 3.73, 0.096)
    assert (round(left, 1), round(right, 1)) == (19.4, 40.6)


@given(st.floats(0, 1e12), densities, st.none() | densities, st.none() | densities)
def test_a_partition_is_a_division_of_the_memory(total, target, left, right):
    left_memory, right_memory = partition_memory(total, target, left, right)
    assert 0 <= left_memory <= total
    assert 0 <= right_memory <= total
    assert left_memory + right_memory == pytest.approx(total)


@given(st.floats(1e-3, 1e3), st.floats(1e-3, 1e3), st.floats(0.01, 0.99))
def test_a_partition_hits_the_target(left, right, part):
    target = part * left + (1 - part) * right
    left_memory, right_memory = partition_memory(1.0, target, left, right)
    assert left_memory * left + right_memory * right == pytest.approx(target)


def test_partition_at_its_edges():
    assert partition_memory(60, 9, 3, 1) == (60, 0)
    assert partition_memory(60, 0.5, 3, 1) == (0, 60)
    assert partition_memory(60, 2, 2, 2) == (30, 30)
    assert partition_memory(60, 2, math.inf, math.inf) == (30, 30)
    assert partition_memory(60, 2, math.inf, 1) == pytest.approx(
        (60 * PREFILL_ONLY_SHARE, 60 - 60 * PREFILL_ONLY_SHARE)
    )
    assert partition_memory(60, math.inf, math.inf, 1) == (60, 0)
    assert partition_memory(60, math.inf, 3, 1) == (60, 0)
    assert partition_memory(60, 2, 3, None) == (60, 0)
    assert partition_memory(60, 2, None, 1) == (0, 60)
    assert partition_memory(60, 2, None, None) == (30, 30)
    with pytest.raises(ValueError, match="nan"):
        partition_memory(60, math.nan, 3, 1)


@given(jobs(), st.lists(st.booleans(), min_size=24, max_size=24), st.data())
def test_scanners_meet_and_name_every_request_once(job, turns, data):
    plan = make_plan(job, LLAMA_ON_A100)
    scanner = DualScanner(plan)
    removed = set()
    if len(job):
        removed = data.draw(st.sets(st.integers(0, len(job) - 1)))
    for request in sorted(removed):
        assert request in scanner
        assert scanner.remove(request)
        assert request not in scanner
        assert not scanner.remove(request)
    seen = []
    position = {int(r): k for k, r in enumerate(plan.order)}
    for turn in turns:
        if scanner.exhausted:
            break
        left = [position[r] for r in range(len(job)) if r not in removed and r not in seen]
        mem = plan.memory_seconds[left].sum()
        comp = plan.compute_seconds[left].sum()
        if mem > 1e-6 * plan.memory_seconds.sum():
            assert scanner.target_density == pytest.approx(comp / mem, rel=1e-6)
        side = LEFT if turn else RIGHT
        head = scanner.head(side)
        assert position[head] == (min(left) if turn else max(left))
        assert scanner.density(side) == plan.request_density[head]
        assert scanner.take(side) == head
        seen.append(head)
        assert scanner.remaining == len(job) - len(removed) - len(seen)
    assert sorted([*seen, *removed]) == list(range(len(job)))
    assert scanner.head(LEFT) is scanner.head(RIGHT) is scanner.density(LEFT) is None
    assert scanner.target_density == math.inf
    with pytest.raises(IndexError):
        scanner.take(LEFT)


def test_a_scanner_is_the_same_in_another_process_and_leaves_the_tree_behind():
    job = mixed_job(200)
    scanner = DualScanner(make_plan(job, LLAMA_ON_A100))
    copy = pickle.loads(pickle.dumps(scanner))
    assert len(pickle.dumps(scanner)) < 200 * 100
    while not scanner.exhausted:
        side = LEFT if scanner.remaining % 3 else RIGHT
        assert copy.take(side) == scanner.take(side)
    assert copy.exhausted


def candidate(side, prompt=100, output=10.0, density=1.0, blocked=False):
    return Candidate(side, prompt, prompt, output, density, blocked)


def pool(total, free, left=0, right=0):
    """A pool in which one request of each side has booked so much, and is about to end."""
    kv = KVAccount(total)
    for side, booked in ((LEFT, left), (RIGHT, right)):
        if booked:
            kv.start(side, Candidate(side, booked, booked, 0.0, 1.0))
    kv.free_tokens = free
    return kv


def test_the_side_with_more_of_its_partition_unused_goes_first():
    left, right = candidate(LEFT, density=3.0), candidate(RIGHT, density=1.0)
    choose = Admission().choose
    # Target 2 divides 1000 tokens in halves.
    assert choose(left, right, pool(1000, 500, 400, 100), 2.0) is RIGHT
    assert choose(left, right, pool(1000, 500, 100, 400), 2.0) is LEFT
    # Target 1.2: the left has 100 tokens, the right 900.
    assert choose(left, right, pool(1000, 500, 50, 400), 1.2) is RIGHT


def test_a_side_keeps_to_its_partition_while_the_other_has_requests():
    kv = pool(1000, 200, 700, 100)
    left = candidate(LEFT, density=3.0)
    choose = Admission().choose
    # Target 2 gives the left 500 tokens, of which it has booked 700.
    assert choose(left, candidate(RIGHT, prompt=300), kv, 2.0) is None
    assert choose(left, candidate(RIGHT, blocked=True), kv, 2.0) is None
    assert choose(left, None, kv, 2.0) is LEFT


def test_where_no_division_hits_the_target_the_warm_prefix_goes_first():
    kv = pool(1000, 500, 300, 200)
    cold = Candidate(LEFT, 100, 90, 10.0, 4.0)
    warm = Candidate(RIGHT, 100, 20, 10.0, 3.0)
    for target in (2.0, 5.0):
        assert Admission().choose(cold, warm, kv, target) is RIGHT
        assert Admission().choose(replace(cold, uncached_tokens=5), warm, kv, target) is LEFT


def test_what_does_not_fit_or_is_blocked_waits():
    choose = Admission().choose
    busy = pool(1000, 100, 450, 450)
    assert choose(candidate(LEFT), candidate(RIGHT), busy, 1.0) is None
    assert choose(None, None, busy, 1.0) is None
    blocked = candidate(LEFT, prompt=1, output=1, blocked=True)
    assert choose(blocked, None, busy, 1.0) is None


heads = st.none() | st.builds(
    candidate,
    st.just(LEFT),
    prompt=st.integers(0, 2_000),
    output=st.floats(0, 2_000),
    density=densities,
    blocked=st.booleans(),
)


@given(heads, heads, st.integers(0, 2_000), st.integers(0, 2_000), densities)
def test_no_head_starts_while_its_prefix_is_being_computed_or_beyond_the_memory(
    left, right, free, used, target
):
    """So of two siblings with the same prefix the second waits until the first has filled it."""
    right = replace(right, side=RIGHT) if right else None
    kv = pool(2_000, free, used, used)
    side = Admission().choose(left, right, kv, target)
    startable = [head for head in (left, right) if head and not head.blocked]
    if side is not None:
        (chosen,) = [head for head in startable if head.side is side]
        assert kv.fits(chosen) or kv.idle
    elif startable:
        assert not kv.idle


def test_a_prefix_that_running_requests_hold_takes_no_new_memory():
    held = Candidate(LEFT, 700, 20, 2.0, 50.0, locked_prefix_tokens=680)
    assert Admission().choose(held, None, pool(1000, 50, 900), 2.0) is LEFT


def test_memory_that_short_requests_give_back_is_lent_to_long_ones():
    # 10 requests of 50 tokens end after 5 more; the candidate takes 200 in the long run.
    kv = KVAccount(1000)
    for key in range(10):
        kv.start(key, Candidate(LEFT, 50, 50, 5.0, 1.0))
    long = Candidate(RIGHT, 50, 50, 200.0, 0.1)
    # 10 x 5 tokens and its own 55 at first; 250 in the end, when 500 will have come back.
    kv.free_tokens = 105
    assert Admission().choose(None, long, kv, 1.0) is RIGHT
    kv.free_tokens = 104
    assert Admission().choose(None, long, kv, 1.0) is None


def test_an_idle_engine_starts_even_what_does_not_fit():
    idle = pool(1000, 1000)
    large, larger = candidate(LEFT, output=5_000.0), candidate(RIGHT, output=9_000.0)
    assert Admission().choose(large, None, idle, 1.0) is LEFT
    assert Admission().choose(None, larger, idle, 1.0) is RIGHT
    assert Admission().choose(large, larger, idle, 1.0) is LEFT


@given(jobs(), st.integers(1, 500), st.integers(0, 3))
def test_admission_never_deadlocks(job, total, order_of_end):
    """Run to the end on a toy engine: requests hold p + d tokens, and end in some order."""
    scanner = DualScanner(make_plan(job, LLAMA_ON_A100))
    outputs = job.known_output_tokens
    kv = KVAccount(total)
    running: list[int] = []
    done = 0

    def head(side):
        request = scanner.head(side)
        if request is None:
            return None
        p = len(job.token_ids[request])
        return Candidate(side, p, p, float(outputs[request]), scanner.density(side))

    for _ in range(4 * len(job) + 1):
        kv.free_tokens = total - sum(len(job.token_ids[r]) + int(outputs[r]) for r in running)
        heads = {side: head(side) for side in Side}
        side = Admission().choose(heads[LEFT], heads[RIGHT], kv, scanner.target_density)
        if side is not None:
            running.append(scanner.take(side))
            kv.start(running[-1], heads[side])
        elif running:
            assert kv.end(running.pop(order_of_end % len(running)))
            done += 1
        else:
            break
    assert scanner.exhausted
    assert done == len(job)


def test_both_sides_run_together_on_a_mixed_job():
    job = mixed_job(600)
    plan = make_plan(job, LLAMA_ON_A100)
    scanner = DualScanner(plan)
    kv = KVAccount(200_000)
    sides = []
    while True:
        heads = []
        for side in Side:
            request = scanner.head(side)
            p, d = len(job.token_ids[request]), float(plan.estimated_output_tokens[request])
            heads.append(Candidate(side, p, p, d, scanner.density(side)))
        side = Admission().choose(*heads, kv, scanner.target_density)
        if side is None:
            break
        chosen = heads[0] if side is LEFT else heads[1]
        scanner.take(side)
        sides.append(side)
        kv.start(len(sides), chosen)
    assert set(sides) == {LEFT, RIGHT}


def test_a_request_that_outlives_its_estimate_counts_on_the_right():
    kv = KVAccount(100_000)  # Its forecast has bins of 97 steps.
    head = candidate(LEFT, output=4.0)
    kv.start("a", replace(head, likely_output_tokens=(2.0, 6.0), max_output_tokens=8.0))
    assert (kv.left_tokens, kv.right_tokens) == (102.0, 0.0)
    assert kv.growth_tokens() == 4.0
    assert [kv.decode_step() for _ in range(5)] == [False] * 4 + [True]
    # Expected to go on for half of what it has produced, but never beyond its limit of 8.
    assert (kv.left_tokens, kv.right_tokens) == (0.0, 104.0)
    assert kv.end("a")
    assert not kv.end("a")
    assert kv.idle
    assert (kv.left_tokens, kv.right_tokens, kv.growth_tokens()) == (0.0, 0.0, 0.0)


def test_room_for_wrong_estimates_grows_when_requests_lose_their_memory():
    kv = KVAccount(10_000)
    kv.start("known", candidate(LEFT, output=100.0))
    kv.retracted()
    assert kv.growth_tokens() == 100.0, "nothing is uncertain here"
    kv.end("known")
    for _ in range(5_000):
        kv.decode_step()
    uncertain = replace(candidate(LEFT, output=100.0), likely_output_tokens=(50.0, 100.0, 150.0))
    for key in range(20):
        kv.start(key, uncertain)
    before = kv.growth_tokens()
    kv.retracted()
    after = kv.growth_tokens()
    assert before < after < 20 * 150
    kv.retracted()
    assert kv.growth_tokens() == after, "several in a step are one event"
    for key in range(20):
        kv.end(key)
    for _ in range(5_000):
        kv.decode_step()
    for key in range(20):
        kv.start(key, uncertain)
    assert kv.growth_tokens() == pytest.approx(before, rel=1e-3), "it is forgotten again"


def test_a_prefix_that_a_later_request_shares_does_not_come_free_with_the_first():
    kv = KVAccount(1000)
    kv.start("first", candidate(LEFT, prompt=400, output=1.0))
    kv.start("second", Candidate(LEFT, 400, 10, 200.0, 1.0, locked_prefix_tokens=390))
    # The first gives back its 400 tokens before the second has grown to 200.
    assert kv.growth_tokens() == 2.0
    kv.share("first", 10)
    assert kv.growth_tokens() == 200.0 - 10.0
    assert LEFT.other is RIGHT
    assert RIGHT.other is LEFT


def test_a_head_knows_what_it_shares_with_what_its_side_has_passed():
    prefix, other = list(range(50)), list(range(100, 130))
    prompts = [[*prefix, 1000 + k] for k in range(3)] + [[*other, 2000 + k] for k in range(3)]
    job = Job([np.array(p, dtype=np.int32) for p in prompts], np.array([2, 2, 2, 900, 900, 900]))
    plan = make_plan(job, LLAMA_ON_A100)
    scanner = DualScanner(plan)
    found = {side: [] for side in Side}
    for side in (LEFT, RIGHT, LEFT, RIGHT, LEFT, RIGHT):
        found[side].append(scanner.shared_tokens(side))
        scanner.take(side)
    assert found == {LEFT: [0, 50, 50], RIGHT: [0, 30, 30]}
    assert scanner.shared_tokens(RIGHT) == 0, "the last of its group, with nobody behind it"
    # Two sides that meet within a group: what is common to those between which they met.
    scanner = DualScanner(plan)
    for side in (RIGHT, LEFT, RIGHT, LEFT, RIGHT, RIGHT):
        scanner.take(side)
    assert scanner.exhausted
    assert scanner.shared_tokens(RIGHT) == 50


def test_a_finished_plan_of_nothing():
    empty = Job([], np.array([]))
    assert DualScanner(make_plan(empty, LLAMA_ON_A100)).exhausted
