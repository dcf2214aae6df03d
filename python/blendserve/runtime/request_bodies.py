"""A body as SGLang's own request classes read it, without a server."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError
from sglang.srt.entrypoints.openai.protocol import (
    ChatCompletionRequest,
    ClassifyRequest,
    CompletionRequest,
    EmbeddingRequest,
    ResponsesRequest,
    ScoringRequest,
    V1RerankReqInput,
)

from blendserve.batch.errors import cause_of

_CLASSES: Mapping[str, Any] = {
    "/v1/chat/completions": ChatCompletionRequest,
    "/v1/completions": CompletionRequest,
    "/v1/embeddings": EmbeddingRequest,
    "/v1/responses": ResponsesRequest,
    "/v1/score": ScoringRequest,
    "/v1/rerank": V1RerankReqInput,
    "/v1/classify": ClassifyRequest,
}
# Fields of which the planner reads the value, and of which the classes read "8" and 8.0 as 8.
_VALUES = ("max_tokens", "max_completion_tokens", "max_output_tokens", "n", "ignore_eos")
_MAX_TOLD = 3


def as_read(url: str, body: Mapping[str, Any]) -> dict[str, Any]:
    """The body, with the values that the engine would take for those that are given.

    Raises:
        ValueError: the engine would refuse it; says which field is at fault.
    """
    try:
        request = _CLASSES[url](**{"model": "any", **body})
    except ValidationError as error:
        raise ValueError(_told(error)) from error
    except Exception as error:
        # The classes run code of their own on a body that nothing has looked at yet.
        raise ValueError(cause_of(error)) from error
    read = {name: getattr(request, name) for name in _VALUES if name in body}
    return {**body, **read}


def _told(error: ValidationError) -> str:
    faults = error.errors(include_url=False, include_context=False, include_input=False)
    named = [f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in faults]
    more = [f"and {len(named) - _MAX_TOLD} more"] if len(named) > _MAX_TOLD else []
    return "; ".join([*named[:_MAX_TOLD], *more])
