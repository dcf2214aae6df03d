"""Settings that cannot be served are refused before SGLang loads weights."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from blendserve.runtime import arguments


def settings(prefill: str = "breakable", **given: Any) -> SimpleNamespace:
    """SGLang's resolved settings on a GPU, as far as they are looked at."""
    graphs = SimpleNamespace(
        prefill=SimpleNamespace(backend=prefill), decode=SimpleNamespace(backend="full")
    )
    usual = {
        "device": "cuda", "enable_mixed_chunk": True, "cuda_graph_config": graphs,
        "disaggregation_mode": "null", "attention_backend": "fa3", "speculative_algorithm": None,
    }  # fmt: skip
    return SimpleNamespace(**{**usual, **given})


@pytest.mark.parametrize(
    "good",
    [
        settings(),
        settings("disabled"),
        settings("tc_piecewise", enable_mixed_chunk=False),
        settings("tc_piecewise", device="cpu"),
        settings(attention_backend="blend", page_size=64),
        settings(speculative_algorithm="EAGLE", enable_mixed_chunk=False),
        settings(
            speculative_algorithm="EAGLE", attention_backend="blend",
            speculative_draft_attention_backend="flashinfer",
        ),
    ],
)  # fmt: skip
def test_what_can_be_served_is_not_refused(good: SimpleNamespace) -> None:
    assert arguments.refusals(good) == []


@pytest.mark.parametrize(
    ("bad", "flag", "remedy"),
    [
        (settings("tc_piecewise"), "--enable-mixed-chunk", "--disable-mixed-chunk"),
        (settings("full"), "--enable-mixed-chunk", "--disable-mixed-chunk"),
        (settings(disaggregation_mode="prefill"), "--disaggregation-mode", "--enable-pdmux"),
        (settings(device="cpu", page_size=16), "--page-size 16", "Leave the flag away on a CPU"),
        (
            settings(speculative_algorithm="EAGLE", decode_attention_backend="blend"),
            "--attention-backend blend",
            "--speculative-draft-attention-backend",
        ),
    ],
)
def test_what_cannot_is_named_with_a_remedy(bad: SimpleNamespace, flag: str, remedy: str) -> None:
    (said,) = arguments.refusals(bad)
    assert said.startswith(flag)
    assert remedy in said


def test_how_many_decodes_a_graph_takes_is_sglangs_to_say() -> None:
    decode = SimpleNamespace(backend="full", max_bs=256)
    graphs = SimpleNamespace(prefill=SimpleNamespace(backend="disabled"), decode=decode)
    assert arguments.most_graphed_decodes(settings(cuda_graph_config=graphs)) == 256
    assert arguments.most_graphed_decodes(SimpleNamespace()) is None


def test_the_refusal_ends_the_process_after_sglangs_own_check(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(arguments, "resolved", lambda args: args)
    arguments.check(None, settings())
    with pytest.raises(SystemExit, match="blendserve: --disaggregation-mode"):
        arguments.check(None, settings(disaggregation_mode="decode"))
