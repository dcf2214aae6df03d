"""The plan of a running job: what is not known yet, and how replicas share it."""

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
    return CentralPlan(job.job(), tree, LLAMA_ON_A100, config, book, online, replicas)


def run_sample(plan):
    """Starts the whole sample, to its end where that is near."""
    running = {}
    while (request := plan.head(Side.LEFT, 0)) is not None and plan.sample:
        plan.take(request, Side.LEFT, 0)
        if request < CHATS:
            plan.finished(request)
        else:
            running[request] = 50
    return running


def test_requests_of_which_nothing_is_known_wait_at_the_memory_end():
    plan = central(online=True)
    running = run_sample(plan)
    assert running, "a video is in the sample"
    plan.replan(running)
    waiting = VIDEOS - len(running)
    assert (plan.plan.order[-waiting:] >= CHATS).all()
    assert all(plan.unknown(request) for request in range(CHATS, CHATS + VIDEOS))
    assert not plan.unknown(0)


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


def test_what_is_left_is_shared_out_so_that_replicas_end_together():
    plan = central(online=False, replicas=2)
    compute, memory = plan.scanner.remaining_seconds
    assert np.allclose(plan.rest(0, 0.0, 0.0), (compute / 2, memory / 2))
    # Replica 1 still has a quarter of the memory work running: it gets so much less of the rest.
    running = memory / 4
    mine = plan.rest(1, 0.0, running)
    other = plan.rest(0, 0.0, 0.0)
    assert np.isclose(mine[1] + running, other[1])
    assert np.isclose(mine[1] + other[1], memory)
    assert np.isclose(mine[0] + other[0], compute)
    # More than its part of everything: it takes none, and less compute.
    mine = plan.rest(1, 0.0, 2 * memory)
    other = plan.rest(0, 0.0, 0.0)
    assert mine[1] == 0.0
    assert np.isclose(other[1], memory)
    assert mine[0] < other[0]


def test_the_memory_work_that_is_left_counts_the_spread_of_lengths():
    plan = central(online=True)
    running = run_sample(plan)
    for request in running:
        plan.finished(request)
    plan.replan({})
    by_means = plan.scanner.remaining_seconds[1]
    counted = plan.rest(0, 0.0, 0.0)[1]
    assert counted > by_means
    request = plan.head(Side.RIGHT, 0)
    plan.take(request, Side.RIGHT, 0)
    spread = counted - by_means
    assert plan.rest(0, 0.0, 0.0)[1] - plan.scanner.remaining_seconds[1] < spread


def test_a_replica_with_long_decodes_enough_takes_no_more_and_leaves_its_own_to_others():
    plan = central(online=False, replicas=2)
    videos = sum(plan.plan.memory_seconds[plan.plan.order >= CHATS])
    plan.rest(0, 0.0, 0.5 * videos)
    assert plan.right_part(0) > 0  # The other one can still come level.
    plan.rest(0, 0.0, 1.5 * videos)
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
