"""The plan of a running job: what is not known yet, and how replicas share it."""

import itertools

import numpy as np
from simulator_jobs import LLAMA_ON_A100, workload

from blendserve.planner import PlannerConfig, Side
from blendserve.simulator.central_plan import LEASE_REQUESTS, CentralPlan
from blendserve.simulator.lengths import LengthBook

CHATS, VIDEOS = 600, 30


def central(online, replicas=1):
    rng = np.random.default_rng(5)
    prompts = [np.append(np.full(8, 1), rng.integers(2, 10**6, 200)) for _ in range(CHATS)]
    prompts += [np.append(np.full(8, 0), rng.integers(2, 10**6, 60)) for _ in range(VIDEOS)]
    output = [1 + k % 40 for k in range(CHATS)] + [6_000 + k for k in range(VIDEOS)]
    job = workload([ids.astype(np.int32) for ids in prompts], output, limit=50_000)
    tree = job.job().build_tree()
    book = LengthBook(tree, job.output_tokens, job.max_output_tokens, known=not online)
    config = PlannerConfig(sample_fraction=0.02)
    known = None if online else book
    return CentralPlan(job.job(), tree, LLAMA_ON_A100, config, job.output_tokens, known, replicas)


def run_sample(plan):
    """Starts the whole sample, to its end where that is near."""
    running = {}
    sample = plan.plan.sample.tolist()
    assert set(sample) == {*_heads(plan, Side.LEFT, sample), *_heads(plan, Side.RIGHT, sample)}
    for side in Side:
        for request in _heads(plan, side, sample):
            plan.take(request, side, 0)
            if request < CHATS:
                plan.finished(request)
            else:
                running[request] = 50
    return running


def _heads(plan, side, sample):
    """What comes first on a side, as far as it is of the sample."""
    return list(itertools.takewhile(sample.__contains__, plan.upcoming(side, 0)))


def test_requests_of_which_nothing_is_known_wait_at_the_memory_end():
    plan = central(online=True)
    running = run_sample(plan)
    assert running, "a video is in the sample"
    plan.replan(running)
    waiting = VIDEOS - len(running)
    assert (plan.plan.order[-waiting:] >= CHATS).all()
    assert all(plan.guessed(request) for request in range(CHATS, CHATS + VIDEOS))
    assert not plan.guessed(0)


def test_the_job_is_planned_again_once_its_sample_has_been_answered():
    plan = central(online=True)
    assert not plan.replan_due
    running = run_sample(plan)
    assert not plan.replan_due, "videos of the sample run yet"
    for request in running:
        plan.finished(request)
    assert plan.replan_due
    plan.replan({})
    assert not plan.replan_due


def test_replicas_take_short_requests_in_runs_and_long_ones_singly():
    plan = central(online=False, replicas=2)
    last = plan.head(Side.RIGHT, 0)
    assert last >= CHATS
    left = plan.waiting
    assert plan.head(Side.RIGHT, 1) not in (None, last)
    assert plan.waiting == left - 1
    left = plan.waiting
    assert plan.head(Side.LEFT, 0) < CHATS
    assert 1 < left - plan.waiting <= LEASE_REQUESTS


def rest(plan, replica, compute, memory):
    plan.runs(replica, compute, memory)
    return plan.rest(replica)


def test_what_is_left_is_shared_out_so_that_replicas_end_together():
    plan = central(online=False, replicas=2)
    compute, memory = plan.scanner.remaining_seconds
    assert np.allclose(rest(plan, 0, 0.0, 0.0), (compute / 2, memory / 2))
    # Replica 1 still has a quarter of the memory work running: it gets so much less of the rest.
    running = memory / 4
    mine = rest(plan, 1, 0.0, running)
    other = rest(plan, 0, 0.0, 0.0)
    assert np.isclose(mine[1] + running, other[1])
    assert np.isclose(mine[1] + other[1], memory)
    assert np.isclose(mine[0] + other[0], compute)
    # More than its part of everything: it takes none, and less compute.
    mine = rest(plan, 1, 0.0, 2 * memory)
    other = rest(plan, 0, 0.0, 0.0)
    assert mine[1] == 0.0
    assert np.isclose(other[1], memory)
    assert mine[0] < other[0]


def test_a_replica_with_long_decodes_enough_takes_no_more_and_leaves_its_own_to_others():
    plan = central(online=False, replicas=2)
    videos = sum(plan.plan.memory_seconds[plan.plan.order >= CHATS])
    rest(plan, 0, 0.0, 0.5 * videos)
    assert plan.right_part(0) > 0  # The other one can still come level.
    rest(plan, 0, 0.0, 1.5 * videos)
    assert plan.right_part(0) == 0 < plan.right_part(1)
    last = plan.head(Side.RIGHT, 0)
    waiting = plan.waiting
    plan.give_back(0)
    assert plan.waiting == waiting + 1
    plan.head(Side.RIGHT, 1)
    plan.give_back(1)
    assert plan.head(Side.RIGHT, 1) == last
    plan.take(last, Side.RIGHT, 1)
    assert plan.head(Side.RIGHT, 1) != last
