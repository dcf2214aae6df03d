"""A request that has no possible next token must not end its neighbours."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from blendserve.runtime import sampling_rows

INF = float("inf")


class Draw(torch.nn.Module):
    """A sampler that raises as SGLang's do, where one row is no distribution."""

    def forward(self, logits_output: Any, info: Any) -> torch.Tensor:
        probabilities = torch.softmax(logits_output.next_token_logits, dim=-1)
        return torch.multinomial(probabilities, num_samples=1).view(-1)


def info(**constraints: Any) -> SimpleNamespace:
    names = (
        "grammars",
        "logit_bias",
        "penalizer_orchestrator",
        "acc_additive_penalties",
        "acc_scaling_penalties",
    )
    return SimpleNamespace(**{**dict.fromkeys(names), **constraints})


CONSTRAINTS = [
    {"grammars": [None, object(), None]},
    {"logit_bias": torch.zeros(3, 4)},
    {"penalizer_orchestrator": SimpleNamespace(is_required=True)},
    {"acc_additive_penalties": torch.zeros(3, 4)},
    {"acc_scaling_penalties": torch.ones(3, 4)},
]


@pytest.mark.parametrize("constraints", CONSTRAINTS, ids=lambda each: next(iter(each)))
@pytest.mark.parametrize("dead", [[-INF] * 4, [float("nan")] * 4, [0.0, INF, 0.0, 0.0]])
def test_a_row_without_a_token_costs_no_other_row(constraints, dead):
    logits = torch.tensor([[0.0, 50.0, 0.0, 0.0], dead, [-INF, -INF, -INF, 1.0]])
    sampler = Draw()
    with pytest.raises(RuntimeError):
        sampler(SimpleNamespace(next_token_logits=logits.clone()), info(**constraints))
    sampling_rows.protect(sampler)
    drawn = sampler(SimpleNamespace(next_token_logits=logits), info(**constraints)).tolist()
    assert (drawn[0], drawn[2]) == (1, 3)
    assert drawn[1] in range(4)


def test_rows_that_nothing_constrains_are_not_read():
    sampler = Draw()
    sampling_rows.protect(sampler)
    logits = torch.tensor([[0.0, 1.0], [float("nan"), 0.0]])
    penalties = SimpleNamespace(is_required=False)
    with pytest.raises(RuntimeError):
        sampler(
            SimpleNamespace(next_token_logits=logits),
            info(penalizer_orchestrator=penalties, grammars=[None, None]),
        )
