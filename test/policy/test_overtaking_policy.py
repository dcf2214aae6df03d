"""Whoever fits passes heads that do not, and no head is passed for ever."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from blendserve.planner import Side
from blendserve.policy import (
    LOOK_BEHIND,
    PATIENCE_STEPS,
    Admission,
    Candidate,
    KVAccount,
    Overtaking,
    PacedAdmission,
)

LEFT, RIGHT = Side.LEFT, Side.RIGHT


class Engine:
    """Requests of (prompt, output) tokens, one token a step each; a prompt takes no time."""

    def __init__(
        self, total: int, waiting: dict[Side, list[tuple[int, int]]], paced: bool = True
    ) -> None:
        self.kv = KVAccount(total)
        self.overtaking = Overtaking()
        self.admission = PacedAdmission() if paced else Admission()
        self.waiting: dict[Side, deque[Candidate]] = {side: deque() for side in Side}
        self.running: dict[str, list[int]] = {}  # Tokens held, and to come.
        self.started: list[str] = []
        for side, requests in waiting.items():
            for prompt, output in requests:
                self.add(side, prompt, output)

    def add(self, side: Side, prompt: int, output: int) -> str:
        number = sum(map(len, self.waiting.values())) + len(self.started)
        rid = f"{side}-{number}"
        candidate = Candidate(
            side,
            prompt,
            prompt,
            float(output),
            50.0 if side is LEFT else 0.1,
            max_output_tokens=output,
            request=rid,
        )
        self.waiting[side].append(candidate)
        return rid

    def look(self, side: Side) -> Iterator[Candidate]:
        return iter(self.waiting[side])

    @property
    def free(self) -> int:
        return self.kv.total_tokens - sum(held for held, _ in self.running.values())

    def choose(self) -> Candidate | None:
        self.kv.free_tokens = float(self.free)
        return self.overtaking.choose(
            self,
            self.kv,
            self.kv.now,
            lambda left, right: self.admission.choose(left, right, self.kv, 1.0),
        )

    def start_all(self) -> None:
        while (chosen := self.choose()) is not None:
            rid = str(chosen.request)
            self.waiting[chosen.side].remove(chosen)
            self.kv.start(rid, chosen)
            self.overtaking.start(chosen, self.kv.now)
            self.running[rid] = [chosen.prompt_tokens, int(chosen.estimated_output_tokens)]
            self.started.append(rid)

    def step(self) -> None:
        self.start_all()
        self.kv.decode_step()
        for rid, tokens in list(self.running.items()):
            tokens[0] += 1
            tokens[1] -= 1
            if not tokens[1]:
                del self.running[rid]
                self.kv.end(rid)
                self.overtaking.end(rid)


@pytest.mark.parametrize("paced", [True, False])
@pytest.mark.parametrize("side", Side)
def test_short_requests_pass_a_head_that_finds_no_memory(side: Side, paced: bool) -> None:
    engine = Engine(2_048, {side: [(804, 1_243), (12, 2_000), (14, 6), (14, 6)]}, paced)
    for _ in range(2 * PATIENCE_STEPS):
        engine.step()
        assert engine.started in ([f"{side}-0"], [f"{side}-{k}" for k in (0, 2, 3)])
    assert engine.started == [f"{side}-0", f"{side}-2", f"{side}-3"]


@pytest.mark.parametrize("paced", [True, False])
@pytest.mark.parametrize("side", Side)
def test_a_head_is_passed_until_all_that_ran_when_it_came_to_stand_first_have_ended(
    side: Side, paced: bool
) -> None:
    engine = Engine(1_000, {side: [(400, 100), (900, 50)]}, paced)
    head, steps = f"{side}-1", 0
    while head not in engine.started:
        if len(engine.waiting[side]) < 4:
            engine.add(side, 20, 30)
        engine.step()
        steps += 1
        assert steps < 1_000
    # The first takes 100 steps; of those that passed the head, the last one ends 30 later.
    assert 100 < steps <= 131
    assert len(engine.started) > 10, "what fitted went ahead all the time"


def test_a_head_waits_for_the_other_side_no_longer_than_for_its_own() -> None:
    engine = Engine(1_000, {RIGHT: [(10, 900)], LEFT: [(100, 10)]})
    while "right-0" not in engine.started:
        while len(engine.waiting[LEFT]) < 6:
            engine.add(LEFT, 100, 10)
        engine.step()
        assert engine.kv.now < 30


def test_what_is_too_large_beside_online_requests_holds_up_nobody() -> None:
    """Nothing of the job runs, and what others hold is not the job's to wait for."""
    engine = Engine(1_000, {RIGHT: [(600, 20), (30, 5)]})
    engine.kv.others_tokens = engine.kv.free_tokens = 500.0

    def choose(now: int) -> Candidate | None:
        return engine.overtaking.choose(
            engine,
            engine.kv,
            now,
            lambda left, right: engine.admission.choose(left, right, engine.kv, 1.0),
        )

    assert choose(0) is None
    chosen = choose(PATIENCE_STEPS)
    assert chosen is not None
    assert chosen.request == "right-1"


def test_no_more_than_so_many_are_looked_at() -> None:
    large = [(10, 900)] * (1 + LOOK_BEHIND)
    engine = Engine(1_000, {RIGHT: [(10, 900), *large, (10, 5)]})
    for _ in range(2 * PATIENCE_STEPS):
        engine.step()
    assert engine.started == ["right-0"]


requests = st.lists(st.tuples(st.integers(1, 400), st.integers(1, 300)), max_size=LOOK_BEHIND)


@settings(deadline=None, database=None, max_examples=25)
@given(left=requests, right=requests, total=st.integers(700, 2_000), paced=st.booleans())
@example(left=[(1, 293), (306, 189), (306, 193)], right=[(322, 189)], total=700, paced=False)
def test_whatever_fits_starts_and_every_request_ends(
    left: list[tuple[int, int]], right: list[tuple[int, int]], total: int, paced: bool
) -> None:
    engine = Engine(total, {LEFT: left, RIGHT: right}, paced)
    longest = max((output for _, output in left + right), default=0)
    # Two of its own side; and where both sides have heads, the other side's head.
    generations = (2 + bool(left and right)) * (longest + 1)
    headed: dict[str, int] = {}
    stuck = 0
    for step in range((len(left) + len(right)) * generations + 1):
        engine.start_all()
        waiting = [queue[0] for queue in engine.waiting.values() if queue]
        for head in waiting:
            since = headed.setdefault(str(head.request), step)
            assert step - since <= generations
        fitting = [c for side in Side for c in engine.look(side) if engine.kv.fits(c)]
        due = any(engine.overtaking.is_due(head.request) for head in waiting)
        stuck = stuck + 1 if fitting and not due else 0
        assert stuck <= 2 * PATIENCE_STEPS
        assert engine.running or not waiting, "never idle while something waits"
        if not engine.running:
            break
        assert engine.free >= 0, "known lengths are never outgrown"
        engine.step()
    assert not any(engine.waiting.values())
