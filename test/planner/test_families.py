"""Which lengths are guesses, and what a plan does with them."""

from __future__ import annotations

import numpy as np
from planner_workloads import LLAMA_ON_A100

from blendserve.planner import Job, PlannerConfig, make_plan
from blendserve.planner.families import (
    GUESSED_RANGE,
    KNOWN_ANSWERS,
    UNCERTAIN_TOKENS,
    families,
    guessed,
    likely_guesses,
    longest_guesses,
)

CHATS, VIDEOS, OTHERS = 60, 20, 5


def job(limit: int = 8_192) -> Job:
    rng = np.random.default_rng(1)
    prompts = [np.append(np.full(8, 1), rng.integers(9, 10**6, 50)) for _ in range(CHATS)]
    prompts += [np.append(np.full(8, 2), rng.integers(9, 10**6, 50)) for _ in range(VIDEOS)]
    prompts += [rng.integers(9, 10**6, 50) for _ in range(OTHERS)]
    return Job([p.astype(np.int32) for p in prompts], np.full(len(prompts), limit))


def test_a_family_stands_under_one_node_right_below_the_root() -> None:
    family = families(job().build_tree())
    chats, videos, others = np.split(family, [CHATS, CHATS + VIDEOS])
    assert len(set(chats.tolist())) == len(set(videos.tolist())) == 1
    assert chats[0] != videos[0]
    assert not others.any()


def test_lengths_are_guesses_until_some_of_the_family_have_been_answered() -> None:
    family = families(job().build_tree())
    limit = np.full(len(family), 8_192)
    answered = list(range(KNOWN_ANSWERS))
    guess = guessed(family, answered, limit)
    assert not guess[:CHATS].any()
    assert guess[CHATS:].all()
    assert guessed(family, answered[1:], limit).all()
    assert not guessed(family, [], np.full(len(family), 100)).any(), "none can get long"


def test_a_guess_may_be_of_any_magnitude_up_to_four_times_the_longest_so_far() -> None:
    family = np.array([0, 0, 1])
    longest = longest_guesses(family, {2: 3_000}, np.array([9_999, 50, 9_999]))
    assert longest.tolist() == [4 * UNCERTAIN_TOKENS, 50, 9_999]
    likely = likely_guesses(longest, 8)
    assert (np.diff(likely, axis=1) > 0).all()
    assert (likely[:, -1] <= longest).all()
    assert (likely[:, 0] >= longest / GUESSED_RANGE).all()


def test_guesses_stand_at_the_memory_end_of_a_later_plan() -> None:
    work = job()
    first = make_plan(work, LLAMA_ON_A100, PlannerConfig(sample_fraction=0.1))
    assert first.guessed.all()
    answers = dict.fromkeys(range(CHATS - 10), 30)
    plan = make_plan(
        work, LLAMA_ON_A100, observed=answers, exclude=answers, sampled=first.sample.tolist()
    )
    assert not plan.guessed[:CHATS].any()
    assert plan.guessed[CHATS:].all()
    place = np.empty(len(work))
    place[plan.order] = np.arange(len(plan.order))
    assert place[CHATS : CHATS + VIDEOS].min() > place[CHATS - 10 : CHATS].max()
    # What is expected of them stays what their neighbours say.
    assert plan.estimated_output_tokens[CHATS] < UNCERTAIN_TOKENS


def test_without_a_sample_nothing_is_a_guess() -> None:
    plan = make_plan(job(), LLAMA_ON_A100, PlannerConfig(sample_fraction=0.0, min_sample=0))
    assert not plan.guessed.any()
