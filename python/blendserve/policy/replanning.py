"""When a job is planned again with what its answers say."""

from __future__ import annotations

# Times the answers of the plan before. With twice as many, a job in which short answers come first
# was planned for too long as if all were short.
_MORE_ANSWERS = 1.4
# Of the sample's size, the answers after which its last ones are not waited for any more. The first
# answers are the short ones: with fewer, long ones were planned as short.
_OVER_SAMPLE = 2


class Replanning:
    """Due when the sample has been answered, and whenever there are so many more answers.

    Each plan costs the same, and the answers of most of the job say hardly less than all.

    Args:
        sampled: requests of the first plan's sample; with none, lengths are known, and the first
            plan stands.
    """

    def __init__(self, sampled: int) -> None:
        self._learns = sampled > 0
        self._at: float = _OVER_SAMPLE * sampled

    def due(self, answers: int, sample_is_in: bool) -> bool:
        """Whether to plan again, after so many answers in all."""
        return self._learns and (sample_is_in or answers >= self._at)

    def begins(self, answers: int, sampled: int) -> None:
        """A plan is made with so many answers, and with samples of so many requests named."""
        self._at = _MORE_ANSWERS * max(answers, sampled)

    def stop(self) -> None:
        """The plan that there is stands."""
        self._learns = False
