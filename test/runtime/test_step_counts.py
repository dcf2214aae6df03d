"""What a step is counted as, where SGLang overlaps steps: results come one step late."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest

from blendserve.planner import Side
from blendserve.runtime.feedback import SchedulerReport
from blendserve.runtime.scheduler import BlendScheduler


def request(ended: bool = False, retracted: bool = False) -> Any:
    return SimpleNamespace(rid="r", finished=lambda: ended, is_retracted=retracted, output_ids=[1])


def batch(mode: str, reqs: list[Any], decodes: int, lens: list[int] | None) -> Any:
    """As SGLang 0.5.16 copies it to overlap steps: without the sum of its tokens."""
    return SimpleNamespace(
        forward_mode=SimpleNamespace(
            is_decode=lambda: mode == "decode", is_extend=lambda: mode == "extend"
        ),
        reqs=reqs,
        decoding_reqs=reqs[len(reqs) - decodes :] if mode == "extend" else None,
        extend_lens=lens,
        extend_num_tokens=None,
    )


@pytest.mark.parametrize(
    ("step", "prefilled", "decoded"),
    [
        (batch("decode", [request(), request(), request()], 0, None), 0, 3),
        (batch("decode", [request(ended=True), request(), request(retracted=True)], 0, None), 0, 1),
        (batch("extend", [request(), request(), request(ended=True)], 2, [40, 1, 1]), 40, 1),
        (batch("extend", [request(), request()], 0, [40, 7]), 47, 0),
        (batch("extend", [request()], 0, None), 0, 0),  # a verification step
    ],
)
def test_a_request_that_has_ended_is_decoded_once_more_and_not_counted(
    step: Any, prefilled: int, decoded: int
) -> None:
    live = object.__new__(BlendScheduler)
    live.blend_report = SchedulerReport(dp_rank=0)
    live.blend_online = SimpleNamespace(step=lambda: None)
    live.blend_pace = SimpleNamespace(seconds=lambda tokens, context: (0.0, 0.0))
    live.blend_trace = None
    live.blend_policy = SimpleNamespace(
        decodes=SimpleNamespace(context_tokens=0), decoded=lambda decodes, seconds: False
    )
    live.blend_reported = (0, 0)
    live.blend = SimpleNamespace(
        prefilled=lambda rid: False, taken={Side.LEFT: 0, Side.RIGHT: 0}, running={},
    )  # fmt: skip
    # By what it derives from: where the plugin is active, SGLang's module names ours.
    with mock.patch.object(BlendScheduler.__bases__[-1], "process_batch_result", create=True):
        live.process_batch_result(step, None)
    assert (live.blend_report.prefill_tokens, live.blend_report.decode_tokens) == (
        prefilled,
        decoded,
    )
