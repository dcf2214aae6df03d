"""PD multiplexing whose split of the multiprocessors follows the blend.

With ``--enable-pdmux`` SGLang runs a prefill batch and the decodes on two streams, each with a part
of the GPU's multiprocessors, and picks the split by the number of decodes. Whenever it would pick
one while planned requests run, it gets the split under which prefill and decode end together, if
they go on in the proportion of all that is left of the job.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from blendserve.planner import StepPace, best_split, separate_parts

if TYPE_CHECKING:
    from blendserve.runtime.side_queues import SideQueues


class BlendMultiplex:
    """Mixed into SGLang's scheduler class, in front of it."""

    blend: SideQueues
    blend_pace: StepPace
    blend_rest: tuple[float, float]
    enable_pdmux: bool
    split_prefill_batch: Any
    sm_counts: list[tuple[int, int]]
    stream_groups: list[Any]
    tp_worker: Any

    def adjust_stream_groups(self, running_batch: Any) -> tuple[int, Any]:
        """The index of the stream group for the next steps, and the group."""
        both = not running_batch.is_empty() and self.split_prefill_batch is not None
        if not both or not self.blend.running:
            return super().adjust_stream_groups(running_batch)  # type: ignore[misc, no-any-return]
        from sglang.srt.multiplex.pdmux_context import set_current_stream_idx

        prefill, decode = separate_parts(
            self.blend_pace,
            self._density_left(),
            self.blend.policy.decodes.context_tokens,
            running_batch.batch_size(),
        )
        # The first group is all prefill's, the last all decode's.
        index = 1 + best_split(prefill, decode, self.sm_counts[1:-1])
        set_current_stream_idx(index)
        self.tp_worker.model_runner.update_decode_attn_backend(index)
        return index, self.stream_groups[index]

    def is_fully_idle(self, *args: Any, **kwargs: Any) -> bool:
        # SGLang does not count the batch whose layers are being computed.
        prefills = self.enable_pdmux and self.split_prefill_batch is not None
        return not prefills and bool(super().is_fully_idle(*args, **kwargs))  # type: ignore[misc]

    def _density_left(self) -> float:
        """Of what was not sent, waits, is in the prefill batch, or decodes; inf without decodes."""
        blend, pace = self.blend, self.blend_pace
        tokens, _ = blend.account.profile()
        memory = self.blend_rest[1] + blend.waiting_seconds[1]
        memory += float(tokens.sum()) * blend.account.bin_steps * pace.context_seconds
        to_come = blend.account.remaining_tokens() + self.split_prefill_batch.extend_num_tokens
        compute = self.blend_rest[0] + blend.waiting_seconds[0] + to_come * pace.token_seconds
        return compute / memory if memory > 0 else math.inf
