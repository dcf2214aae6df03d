"""When a job is planned again with what its answers say."""

from __future__ import annotations


class Replanning:
    """Due when the sample has been answered, and whenever there are twice as many answers.

    Each plan costs the same, and the answers of half of the job say hardly less than all.

    Args:
        sampled: requests of the first plan's sample; with none, lengths are known, and the first
            plan stands.
    """

    def __init__(self, sampled: int) -> None:
        self._learns = sampled > 0
        self._at = 2 * sampled

    def due(self, answers: int, sample_is_in: bool) -> bool:
        """Whether to plan again, after so many answers in all."""
        return self._learns and (sample_is_in or answers >= self._at)

    def begins(self, answers: int, sampled: int) -> None:
        """A plan is made with so many answers, and with samples of so many requests named."""
        self._at = 2 * max(answers, sampled)

    def stop(self) -> None:
        """The plan that there is stands."""
        self._learns = False
