"""Long decodes of like length start one after the other where memory is scarce."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blendserve.planner import Side
from blendserve.policy import Candidate, KVAccount, Overtaking
from blendserve.policy.stagger import WORTH, Stagger

LONG = 1e9


def candidate(number: int, prompt: int, output: float, likely: tuple[float, ...] = ()) -> Candidate:
    return Candidate(
        Side.RIGHT,
        prompt,
        prompt,
        output,
        density=0.1,
        likely_output_tokens=likely,
        request=number,
    )


class Waiting:
    """Requests of the right, all with the same plan."""

    def __init__(self, requests: list[Candidate]) -> None:
        self.requests = requests

    def look(self, side: Side) -> Iterator[Candidate]:
        return iter(self.requests if side is Side.RIGHT else [])


def steps_of(pool: int, requests: list[Candidate], rest_steps: float) -> int:
    """Decode steps of all through the policy that starts whatever fits."""
    account, overtaking, waiting = KVAccount(pool), Overtaking(), Waiting(requests)
    ends: dict[int, list[Candidate]] = {}

    def whatever_fits(left: Candidate | None, right: Candidate | None) -> Side | None:
        if right is not None and not right.blocked and account.fits(right):
            return Side.RIGHT
        return None

    for _ in range(200_000):
        account.free_tokens = pool - account._forecast.held_tokens(account.now)
        assert account.free_tokens >= 0, "memory ran out"
        while (
            chosen := overtaking.choose(
                waiting, account, account.now, whatever_fits, rest_steps=rest_steps
            )
        ) is not None:
            waiting.requests.remove(chosen)
            overtaking.start(chosen, account.now)
            account.start(chosen.request, chosen)
            end = account.now + int(chosen.estimated_output_tokens)
            ends.setdefault(end, []).append(chosen)
        if not len(account):
            return account.now
        account.decode_step()
        for ended in ends.pop(account.now, []):
            overtaking.end(ended.request)
            account.end(ended.request)
    raise AssertionError("they do not end")


@pytest.mark.parametrize(("pool", "prompt", "output"), [(4_096, 12, 160), (60_000, 100, 1_500)])
def test_equal_decodes_take_fewer_steps_than_in_waves(pool: int, prompt: int, output: int) -> None:
    count = 12 * pool // (prompt + output)
    together = steps_of(pool, [candidate(k, prompt, output) for k in range(count)], 0.0)
    spread = steps_of(pool, [candidate(k, prompt, output) for k in range(count)], LONG)
    assert together == pytest.approx(12 * output, rel=0.1)
    # In even flow, and the time of one decode to begin with: no order does better.
    even = count * (prompt + output / 2) * output / pool + output
    assert even <= spread < 0.8 * together


def test_near_the_end_all_that_fit_start() -> None:
    stagger = Stagger()
    first, second = candidate(1, 10, 100.0), candidate(2, 10, 100.0)
    stagger.start(first, 0)
    assert stagger.holds(second, 400, 0, WORTH * 120 + 1)
    assert not stagger.holds(second, 400, 0, WORTH * 120)


def test_short_unequal_and_unknown_ones_do_not_wait() -> None:
    stagger = Stagger()
    for number in range(50):
        stagger.start(candidate(number, 10, 1_000.0), 0)
    assert stagger.holds(candidate(99, 10, 1_000.0), 5_000, 0, LONG)
    # Its prompt is what it holds.
    assert not stagger.holds(candidate(99, 1_000, 900.0), 5_000, 0, LONG)
    # It ends among none of them.
    assert not stagger.holds(candidate(99, 10, 500.0), 5_000, 0, LONG)
    assert not stagger.holds(candidate(99, 10, 1_000.0, (200.0, 1_800.0)), 5_000, 0, LONG)
    # They have ended.
    for number in range(50):
        stagger.end(number)
    assert not stagger.holds(candidate(99, 10, 1_000.0), 5_000, 0, LONG)


@given(st.data())
@settings(deadline=None, max_examples=50)
def test_whatever_their_lengths_all_end(data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(1, 60), min_size=1, max_size=25))
    prompts = data.draw(st.lists(st.integers(1, 40), min_size=len(lengths), max_size=len(lengths)))
    requests = [
        candidate(k, p, float(n)) for k, (p, n) in enumerate(zip(prompts, lengths, strict=True))
    ]
    rest = data.draw(st.sampled_from([0.0, 100.0, LONG]))
    steps_of(data.draw(st.integers(101, 1_000)), requests, rest)
