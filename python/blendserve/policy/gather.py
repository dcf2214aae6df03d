"""Where prefill and decodes have steps of their own: when the next prefill step is due."""

from __future__ import annotations


class Gather:
    """Gathers requests that may start, so that a prefill step computes more than one of them.

    Every prefill step reads the weights, however few tokens it has, and the decodes stand still
    meanwhile. A request that waits beside n decodes costs a decode step 1 / n of its worth. So
    those that could start wait until what their waiting has cost comes to what the step costs
    whatever is in it: at most twice of what would have been best, whatever comes.

    Mutable, without a clock.

    Args:
        step_seconds: what a prefill step takes at least.
    """

    def __init__(self, step_seconds: float) -> None:
        self._step_seconds = step_seconds
        self._places, self._waited, self._goes_on = 0, 0.0, True

    def ended(self) -> None:
        """A running request has ended: another may have its place."""
        self._places += 1

    def decode_step(self, decodes: int, seconds: float) -> None:
        """A step of so many decodes has taken so long."""
        self._waited += max(self._places, 1) * seconds / max(decodes, 1)

    def prefill_step(self, goes_on: bool) -> None:
        """Requests have started. goes_on: more could have with a larger step, or can once this one
        is done."""
        self._places, self._waited, self._goes_on = 0, 0.0, goes_on

    def holds(self, decodes: int) -> bool:
        """Whether the requests that may start should wait, beside so many decodes."""
        return decodes > 0 and not self._goes_on and self._waited < self._step_seconds
