"""The plan of a batch line on its way to the scheduler, where SGLang's request has no place for it.

Chat and completions take ``custom_params`` out of a body themselves. The request classes of
embeddings, labels, rankings and scores do not know the field, so it is taken here from the body
that came, and given to the request that SGLang has made of it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import aclosing
from typing import Any

from blendserve.runtime.cache_salt import with_custom
from blendserve.runtime.pacing import is_batch_line
from blendserve.runtime.plan_tag import KEY

# Routes without ``custom_params``.
_ROUTES = frozenset({"/v1/embeddings", "/v1/classify", "/v1/rerank", "/v1/score"})


def planned(generate: Callable[..., AsyncIterator[Any]]) -> Callable[..., AsyncIterator[Any]]:
    """SGLang's ``TokenizerManager.generate_request``, where such requests of lines get their plan,
    and the id by which they can be ended."""

    async def generate_request(
        obj: Any, request: Any = None, *args: Any, **kwargs: Any
    ) -> AsyncIterator[Any]:
        if is_batch_line.get() and request is not None and request.url.path in _ROUTES:
            # Read already, and kept by the framework.
            _give(obj, await request.json())
        outputs = generate(obj, request, *args, **kwargs)
        async with aclosing(outputs) as each:  # type: ignore[type-var]
            async for output in each:
                yield output

    return generate_request


def _give(obj: Any, body: Mapping[str, Any]) -> None:
    rid, rank = body.get("rid"), body.get("routed_dp_rank")
    several = any(isinstance(given, list) for given in (obj.text, obj.rid)) or _nested(obj)
    if obj.rid is None and isinstance(rid, str) and not several:
        obj.rid = rid
    if rank is not None and hasattr(obj, "routed_dp_rank"):
        obj.routed_dp_rank = rank
    plan = (body.get("custom_params") or {}).get(KEY)
    if plan is None:
        return
    params = obj.sampling_params
    if isinstance(params, list):
        obj.sampling_params = [with_custom(one, {KEY: plan}) for one in params]
    else:
        obj.sampling_params = with_custom(params, {KEY: plan})


def _nested(obj: Any) -> bool:
    ids = obj.input_ids
    return bool(ids) and isinstance(ids[0], list)
