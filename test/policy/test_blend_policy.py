"""The policy of an engine: what its two heads may do, as lengths become known."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest

from blendserve.planner import Side, StepPace, linear_costs
from blendserve.policy import BlendPolicy, Candidate, Steps

LEFT, RIGHT = Side.LEFT, Side.RIGHT
PACE = StepPace(linear_costs(1.0, 0.0, 1 / 30, 20.0), chunk_tokens=512)


class Queues:
    def __init__(self, *candidates: Candidate) -> None:
        self.waiting = {side: [c for c in candidates if c.side is side] for side in Side}

    def look(self, side: Side) -> Iterator[Candidate]:
        return iter(self.waiting[side])


def head(name: str, side: Side, density: float, prompt: int = 50, output: float = 2) -> Candidate:
    return Candidate(side, prompt, prompt, output, density, request=name)


def policy_at(target: float, steps: Steps = Steps.MIXED) -> BlendPolicy:
    """That has looked ahead and found this density of what is left."""
    policy = BlendPolicy(10_000, PACE, steps)
    policy.rest_seconds = (target * 100.0, 100.0)
    policy.start(head("runs", LEFT, 5.0))
    if policy.paced:
        policy.prefill_tokens(backlog_tokens=0, decodes=0)
        policy.end("runs")
        policy.start(head("runs", LEFT, 5.0))
    return policy


def starts(policy: BlendPolicy, queues: Queues, count: int) -> list[str]:
    found = []
    for _ in range(count):
        chosen = policy.choose(queues)
        assert chosen is not None
        queues.waiting[chosen.side].remove(chosen)
        policy.start(chosen)
        found.append(str(chosen.request))
    return found


def test_a_memory_bound_head_goes_first_on_whichever_side_it_was_sent() -> None:
    long = {"density": 0.1, "output": 400}
    right = Queues(head("dense", LEFT, 9.0), head("long", RIGHT, **long))
    assert starts(policy_at(1.0), right, 2) == ["long", "dense"]
    # Both were sent before lengths were known, and each stands at the other's end.
    left = Queues(head("long", LEFT, **long), head("dense", RIGHT, 9.0))
    assert starts(policy_at(1.0), left, 2) == ["long", "dense"]


def test_of_two_dense_heads_neither_side_waits_for_ever() -> None:
    queues = Queues(
        *(head(f"left-{k}", LEFT, 9.0) for k in range(3)),
        *(head(f"right-{k}", RIGHT, 8.0) for k in range(3)),
    )
    order = starts(policy_at(1.0), queues, 6)
    assert order == ["right-0", "left-0", "right-1", "left-1", "right-2", "left-2"]


def test_a_dense_head_that_is_blocked_leaves_its_turn_to_the_other() -> None:
    blocked = head("right", RIGHT, 8.0)
    blocked.blocked = True
    queues = Queues(head("left-0", LEFT, 9.0), head("left-1", LEFT, 9.0), blocked)
    assert starts(policy_at(1.0), queues, 2) == ["left-0", "left-1"]


def test_the_density_of_a_request_falls_with_its_output() -> None:
    policy = policy_at(1.0)
    densities = [policy.density(100, output) for output in (0, 10, 100, 1_000)]
    assert densities[0] == math.inf
    assert densities == sorted(densities, reverse=True)
    # (100 + 10) tokens of 1 second; ten decodes that attend to 105 tokens each, of 1 / 30 second.
    assert densities[1] == pytest.approx(110 / (105 * 10 / 30))


def test_steps_are_filled_while_guesses_are_new_and_small_once_one_is_long() -> None:
    policy = BlendPolicy(100_000, PACE, Steps.MIXED)
    policy.rest_seconds = (1e6, 1e6)
    guess = head("guess", RIGHT, 1.0, prompt=1_000, output=500)
    guess.guessed = True
    policy.start(guess)
    policy.prefilled("guess", 1_001, 1)
    filled = policy.prefill_tokens(0, 1)
    assert filled == PACE.chunk_tokens - 1
    for _ in range(300):
        policy.decoded()
    for _ in range(64):  # It looks ahead again.
        paced = policy.prefill_tokens(0, 1)
    assert paced < filled / 4
    # Once it is known, steps are paced as if a part of memory were read.
    policy.learn("guess", 301, 900.0, (800.0, 1_000.0), guessed=False)
    for _ in range(64):
        known = policy.prefill_tokens(0, 1)
    assert known > paced


def test_where_steps_are_separate_nothing_is_paced() -> None:
    policy = policy_at(2.0, Steps.SEPARATE)
    assert not policy.paced
    assert policy.target_density == pytest.approx(2.0)
