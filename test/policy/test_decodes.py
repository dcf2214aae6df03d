"""How far the running requests have come, and when a job is planned again."""

from __future__ import annotations

from blendserve.policy import Decodes, Replanning


def test_contexts_and_outputs_grow_with_every_step_until_a_request_ends() -> None:
    decodes = Decodes()
    decodes.start("a", 0, guessed=True)
    decodes.start("b", 40, guessed=False)
    assert decodes.context_tokens == 0
    decodes.prefilled("a", 101, 1)
    decodes.step()
    decodes.prefilled("b", 541, 41)
    decodes.step(3)
    assert decodes.context_tokens == 105 + 544
    assert (decodes.done_tokens("a"), decodes.done_tokens("b")) == (5, 44)
    assert (decodes.guessed, decodes.longest_guessed()) == (1, 5)
    decodes.revise("b", guessed=True)
    assert (decodes.guessed, decodes.longest_guessed()) == (2, 44)
    decodes.end("b")
    assert decodes.context_tokens == 105
    decodes.end("a")
    assert (decodes.context_tokens, decodes.guessed, len(decodes)) == (0, 0, 0)


def test_a_job_is_planned_again_with_its_sample_and_then_with_more_answers() -> None:
    replanning = Replanning(sampled=10)
    assert not replanning.due(19, sample_is_in=False)
    assert replanning.due(9, sample_is_in=True)
    assert replanning.due(20, sample_is_in=False)
    replanning.begins(20, sampled=10)
    assert not replanning.due(27, sample_is_in=False)
    assert replanning.due(28, sample_is_in=False)
    replanning.stop()
    assert not replanning.due(1_000, sample_is_in=True)
    assert not Replanning(sampled=0).due(1_000, sample_is_in=False), "lengths are known"
