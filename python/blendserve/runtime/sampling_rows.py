"""Keeps one request without a possible next token from ending the engine.

A grammar can come to where no token of the vocabulary continues it, and the tokens that a minimum
length or a bias rules out can be all there are. The row of such a request is then no distribution,
and some of SGLang's samplers raise for the whole batch because of it, others return ids that no
vocabulary has.
"""

from __future__ import annotations

from typing import Any

import torch


def protect(sampler: torch.nn.Module) -> None:
    """Let a sampler of SGLang's draw at random where a request leaves it nothing to draw from.

    Its grammar does not accept the token then, and SGLang ends that request.
    """
    sampler.register_forward_pre_hook(_revive_rows)


def _revive_rows(_: torch.nn.Module, args: tuple[Any, ...]) -> None:
    logits_output, info = args[:2]
    if not _constrained(info):
        return
    logits = logits_output.next_token_logits  # [requests, vocabulary]
    dead = ~torch.isfinite(logits.amax(dim=-1, keepdim=True))
    logits.masked_fill_(dead, 0.0)


def _constrained(info: Any) -> bool:
    """Whether anything but the model has a say in a batch; else nothing is worth the reading."""
    penalties = info.penalizer_orchestrator
    return (
        any(info.grammars or ())
        or info.logit_bias is not None
        or (penalties is not None and penalties.is_required)
        # In their place, where steps overlap.
        or info.acc_additive_penalties is not None
        or info.acc_scaling_penalties is not None
    )
