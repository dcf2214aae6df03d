"""What holds for every policy: bounds, conservation, order of the input, sharing."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulator_jobs import LLAMA_ON_A100, mixed_workload, random_workload, workload, workloads

from blendserve.planner import CostModel, FlatTokens, hardware, model_spec
from blendserve.simulator.blend import BlendOptions
from blendserve.simulator.engine import EngineStuck
from blendserve.simulator.simulate import Policy, Setting, Simulation
from blendserve.simulator.step_time import Overlap
from blendserve.simulator.workloads import Workload

ATTAINED = CostModel.attained(model_spec("llama-3.1-8b"), hardware("a100"))
ORDER_FREE = [policy for policy in Policy if policy is not Policy.FCFS]
# The longest prompt and output of `workloads` need 3,600 tokens together.
capacities = st.sampled_from([4_000, 12_000, 400_000])


def setting(policy=Policy.BLEND, **changes):
    return Setting(LLAMA_ON_A100, policy, tuple(Overlap), **{"sampling": 0.25, **changes})


@settings(max_examples=25)
@given(workloads(), capacities, st.sampled_from(list(Policy)), st.booleans(), st.booleans())
def test_no_policy_beats_a_bound_and_tokens_are_conserved(job, capacity, policy, known, shared):
    simulation = Simulation(job)
    given_setting = setting(
        policy, capacity=capacity, sampling=1.0 if known else 0.25, shared_decode=shared
    )
    for result in simulation.run(given_setting):
        assert result.share_of_bound <= 1 + 1e-9
        assert result.seconds >= result.bound_seconds * (1 - 1e-9)
        assert 0 <= result.sharing <= result.sharing_best + 1e-9
    if policy is Policy.DISAGGREGATED:
        return
    for totals in simulation.run_totals(given_setting):
        prompt = sum(len(ids) for ids in job.prompts)
        # Every prompt token is found or computed; what retraction costs is counted apart.
        assert totals.cached_tokens + totals.prefill_tokens == prompt
        # Every output token comes from a decode step, or with the prefill of a start.
        assert totals.decode_tokens + totals.starts == job.output_tokens.sum()
        assert totals.starts == len(job) + totals.retractions
        assert (totals.recomputed_tokens > 0) == (totals.retractions > 0)
        # No token is computed twice but for want of memory, or to start beside a short prefix.
        extra = totals.prefill_tokens - simulation.tree.unique_tokens
        waived = totals.evicted_shared_tokens + 16 * len(job)
        assert -1 <= extra <= waived or totals.retractions


@pytest.mark.parametrize("known", [False, True])
def test_a_small_job_ends_in_memory_that_each_of_its_requests_just_fits(known):
    """What is left of a job is often one retracted request that needs nearly all memory, alone."""
    for seed in range(40):
        job = random_workload(50, seed)
        changes = {"capacity": 4_000, "sampling": 1.0 if known else 0.25}
        for totals in Simulation(job).run_totals(setting(**changes)):
            assert totals.decode_tokens + totals.starts == job.output_tokens.sum()


@settings(max_examples=15)
@given(workloads(), st.sampled_from(ORDER_FREE), st.randoms(use_true_random=False))
def test_the_order_of_the_input_changes_nothing(job, policy, random):
    permutation = list(range(len(job)))
    random.shuffle(permutation)
    shuffled = permuted(job, permutation)
    # Identical prompts with different outputs are told apart by their place only.
    given_setting = setting(policy, capacity=12_000, sampling=1.0)
    first, second = (Simulation(one).run(given_setting) for one in (job, shuffled))
    for one, other in zip(first, second, strict=True):
        assert other.seconds == pytest.approx(one.seconds)
        assert other.sharing == pytest.approx(one.sharing)


def permuted(job: Workload, permutation: list[int]) -> Workload:
    return replace(
        job,
        prompts=FlatTokens.of([job.prompts[i] for i in permutation]),
        output_tokens=job.output_tokens[permutation],
    )


@settings(max_examples=40)
@given(workloads(), st.sampled_from([8_000, 100_000]))
def test_blending_keeps_the_sharing_of_a_depth_first_order(job, capacity):
    simulation = Simulation(job)
    dfs, blend = (
        simulation.run(setting(policy, capacity=capacity, sampling=1.0))[0]
        for policy in (Policy.DFS, Policy.BLEND)
    )
    # In a job of tens of requests and a small cache, one prefix that is computed twice is more than
    # a hundredth of all.
    one_prefix = int(simulation.tree.depth.max()) / simulation.tree.prompt_tokens
    assert blend.sharing >= min(0.99 * dfs.sharing, dfs.sharing - one_prefix)


def test_a_common_prefix_is_read_once_a_step_where_decode_shares_it():
    rng = np.random.default_rng(0)
    prefix, requests, steps = rng.integers(0, 5_000, 100), 4, 19
    prompts = [
        np.concatenate([prefix, rng.integers(0, 5_000, 10)]).astype(np.int32)
        for _ in range(requests)
    ]
    simulation = Simulation(workload(prompts, [steps + 1] * requests))
    apart, shared = (
        simulation.run(setting(Policy.DFS, sampling=1.0, shared_decode=shared))[0]
        for shared in (False, True)
    )
    # The others wait a step for the prefix, so the first is alone at first, and they at last.
    read_again = ((requests - 1) * (steps - 1) + requests - 2) * len(prefix)
    saved = apart.memory_seconds - shared.memory_seconds
    assert saved == pytest.approx(read_again * setting().step_costs.rates.context)


@pytest.mark.parametrize("shared_memory", [False, True])
def test_a_job_that_shares_its_decoding_is_faster_for_it(shared_memory):
    rng = np.random.default_rng(1)
    prefix = rng.integers(0, 5_000, 3_000)
    prompts = [np.concatenate([prefix, rng.integers(0, 5_000, 50)]) for _ in range(200)]
    prompts += [rng.integers(0, 5_000, 1_000) for _ in range(200)]
    job = workload([p.astype(np.int32) for p in prompts], [400] * 200 + [4] * 200)
    options = BlendOptions(shared_memory=shared_memory)
    simulation = Simulation(job)
    apart, shared = (
        simulation.run(setting(capacity=100_000, shared_decode=shared, options=options))[-1]
        for shared in (False, True)
    )
    assert shared.seconds < 0.8 * apart.seconds
    assert shared.sharing == pytest.approx(apart.sharing, abs=0.01)


def test_ours_is_faster_than_the_orders_it_improves_on():
    simulation = Simulation(mixed_workload(6_000))
    times = {
        policy: simulation.run(setting(policy, capacity=60_000, sampling=0.05))[0].seconds
        for policy in (Policy.DFS, Policy.RANDOM, Policy.BLEND_PAPER, Policy.BLEND)
    }
    assert times[Policy.BLEND] == min(times.values())


@pytest.mark.parametrize("seed", [0, 1])
def test_long_outputs_of_known_lengths_are_no_slower_than_sampled_ones(seed):
    rng = np.random.default_rng(seed)
    output = np.clip(rng.lognormal(6.3, 1.0, 1_200), 20, 4_096).astype(int).tolist()
    prompts = [rng.integers(0, 5_000, rng.integers(20, 60)).astype(np.int32) for _ in output]
    simulation = Simulation(workload(prompts, output))
    known, sampled = (
        simulation.run(Setting(ATTAINED, Policy.BLEND, tuple(Overlap), part, capacity=40_000))
        for part in (1.0, 0.02)
    )
    for one, other in zip(known, sampled, strict=True):
        assert one.seconds < 1.01 * other.seconds


@pytest.mark.parametrize("off", [None, *BlendOptions.__dataclass_fields__])
def test_every_addition_can_be_switched_off(off):
    options = replace(BlendOptions(), **({off: False} if off else {}))
    simulation = Simulation(mixed_workload(300))
    result = simulation.run(setting(capacity=30_000, options=options))[0]
    assert result.share_of_bound > 0.3
    assert result.sharing > 0.85 * result.sharing_best


def test_replicas_share_the_work():
    simulation = Simulation(mixed_workload(4_000, longest=600))
    one, three = (
        simulation.run(Setting(LLAMA_ON_A100, capacity=30_000, sampling=0.05, replicas=replicas))[0]
        for replicas in (1, 3)
    )
    assert 2.3 < one.seconds / three.seconds <= 3.001
    assert three.sharing > 0.9 * one.sharing


def test_the_same_arguments_give_the_same_run():
    first, second = (
        Simulation(mixed_workload(200)).run(setting(capacity=20_000))[0] for _ in range(2)
    )
    assert first == second


def test_what_does_not_fit_is_an_error_that_says_so():
    rng = np.random.default_rng(0)
    large = workload([rng.integers(0, 9, 500)], [2])
    with pytest.raises(EngineStuck, match="more memory"):
        Simulation(large).run(setting(Policy.DFS, capacity=400))
    with pytest.raises(EngineStuck, match="more memory"):
        Simulation(large).run(setting(Policy.BLEND, capacity=400))
    long = workload([rng.integers(0, 9, 50)], [500])
    for policy in (Policy.DFS, Policy.BLEND):
        with pytest.raises(EngineStuck, match="outgrows"):
            Simulation(long).run(setting(policy, capacity=400))


def test_settings_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="sampling"):
        setting(sampling=0.0)
    with pytest.raises(ValueError, match="blend only"):
        Setting(LLAMA_ON_A100, Policy.DFS, replicas=2)
    with pytest.raises(ValueError, match="one overlap"):
        setting(replicas=2)
