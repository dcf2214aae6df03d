"""Step times against closed forms, and the overlap models."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from simulator_jobs import LLAMA_ON_A100, workload

from blendserve.planner import INTERFERENCE
from blendserve.simulator.engine import Engine
from blendserve.simulator.kv_cache import KVCache
from blendserve.simulator.lengths import LengthBook
from blendserve.simulator.orders import OrderScheduler
from blendserve.simulator.step_time import Overlap, OverlapModel

COSTS = LLAMA_ON_A100.step_costs
RATES = COSTS.rates
FLOOR = COSTS.token_seconds(1)
seconds = st.floats(0, 10)


def run(prompts, output, capacity=400_000, overlap=Overlap.SEQUENTIAL):
    job = workload(prompts, output)
    tree = job.job().build_tree()
    book = LengthBook(tree, job.output_tokens, job.max_output_tokens, known=True)
    engine = Engine(
        tree,
        job.output_tokens,
        len(job),
        COSTS,
        [OverlapModel.of(overlap)],
        KVCache(tree, capacity),
    )
    return engine.run(OrderScheduler(range(len(job)), book))


def ids(*counts):
    """Prompts that share nothing."""
    rng = np.random.default_rng(1)
    return [rng.integers(k * 10_000, (k + 1) * 10_000, n) for k, n in enumerate(counts)]


def test_a_prompt_alone_takes_its_chunks():
    p = 5_000
    totals = run(ids(p), [1])
    assert totals.steps == 3  # Chunks of 2,048 tokens.
    chunks = (2_048, 2_048, p - 4_096)
    whole = sum(COSTS.token_seconds(chunk) for chunk in chunks) + p * p * RATES.pair
    assert totals.seconds == [pytest.approx(whole + COSTS.sampled_seconds(1))]
    assert totals.memory_seconds == 0


def test_a_decode_alone_reads_the_weights_and_its_context_every_step():
    p, d = 100, 700
    totals = run(ids(p), [d])
    assert totals.steps == d  # One prefill, which gives the first token, then d - 1 decodes.
    contexts = p + np.arange(1, d)
    memory = contexts.sum() * RATES.context
    assert totals.memory_seconds == pytest.approx(memory)
    compute = d * (FLOOR + COSTS.sampled_seconds(1)) + p * p * RATES.pair
    # The norms' weights come through the memory, too; no GEMM has them.
    assert totals.seconds == [pytest.approx(compute + memory, rel=1e-4)]
    waiting = d * FLOOR - (p + d - 1) * RATES.token
    assert totals.floor_seconds == pytest.approx(waiting)


def test_requests_that_start_together_share_their_steps():
    totals = run(ids(100, 300, 500), [10, 50, 200])
    assert totals.steps == 200
    contexts = sum((p + np.arange(1, d)).sum() for p, d in ((100, 10), (300, 50), (500, 200)))
    assert totals.memory_seconds == pytest.approx(contexts * RATES.context)
    assert totals.decode_tokens == 9 + 49 + 199
    prefill = COSTS.token_seconds(900) + (100**2 + 300**2 + 500**2) * RATES.pair
    # The weights of the logits are read for three as for one.
    logits = 200 * COSTS.sampled_seconds(1)
    decodes = 199 * COSTS.token_seconds(1)
    assert totals.compute_seconds == pytest.approx(prefill + decodes + logits, rel=1e-6)


def test_a_shared_prefix_is_computed_once():
    (shared,) = ids(1_000)
    own = ids(50, 50, 50)
    totals = run([np.concatenate((shared, tail)) for tail in own], [1, 1, 1])
    assert totals.prefill_tokens == 1_150
    assert totals.cached_tokens == 2_000


@given(seconds, seconds)
def test_sequential_adds_and_ideal_hides(compute, memory):
    assert OverlapModel.of(Overlap.SEQUENTIAL).seconds(compute, memory) == compute + memory
    assert OverlapModel.of(Overlap.IDEAL).seconds(compute, memory) == max(compute, memory)


@pytest.mark.parametrize(("share", "speed"), INTERFERENCE)
def test_interference_meets_the_measured_points(share, speed):
    # In one second, a GEMM gets 1 - R and attention P(R) of what they would alone.
    model = OverlapModel.of(Overlap.INTERFERENCE)
    assert model.seconds(1 - share, speed) == pytest.approx(1.0)


@given(seconds, seconds, seconds, seconds)
def test_overlap_is_between_ideal_and_sequential_and_splitting_work_gains_nothing(c1, m1, c2, m2):
    for overlap in Overlap:
        model = OverlapModel.of(overlap)
        assert max(c1, m1) <= model.seconds(c1, m1) <= (c1 + m1) * (1 + 1e-12)
        apart = model.seconds(c1, m1) + model.seconds(c2, m2)
        assert apart >= model.seconds(c1 + c2, m1 + m2) * (1 - 1e-12)
    each = model.seconds_each([c1, c2], [m1, m2])
    assert each == pytest.approx([model.seconds(c1, m1), model.seconds(c2, m2)])


def test_a_curve_outside_0_to_1_is_refused():
    with pytest.raises(ValueError, match="between 0 and 1"):
        OverlapModel.of(Overlap.INTERFERENCE, ((0.5, 1.2),))


def test_a_measured_curve_below_taking_turns_is_not_used():
    # Sharing the device worse than taking turns: the two take turns.
    poor = OverlapModel.of(Overlap.INTERFERENCE, ((0.5, 0.1),))
    assert poor.seconds(1.0, 1.0) == pytest.approx(2.0)
