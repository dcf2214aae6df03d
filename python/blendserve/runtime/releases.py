"""Learns when SGLang gives a request's KV memory back, without looking through all that run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sglang.srt.managers.schedule_batch import FINISH_ABORT

# What SGLang's prefix caches call when a request ends or is retracted: from 0.5.21, and before.
RELEASE_METHODS = ("on_release", "cache_finished_req")


def watch_releases(tree_cache: Any, released: Callable[[str], object]) -> None:
    """Call ``released`` with a request's id whenever its memory has been given back.

    Raises:
        AttributeError: the cache has none of the methods that releases go through.
    """
    for name in RELEASE_METHODS:
        original = getattr(tree_cache, name, None)
        if original is None:
            continue

        def watched(req: Any, *args: Any, __call: Any = original, **kwargs: Any) -> Any:
            result = __call(req, *args, **kwargs)
            released(req.rid)
            return result

        setattr(tree_cache, name, watched)
        return
    raise AttributeError(
        f"{type(tree_cache).__name__} has neither of {', '.join(RELEASE_METHODS)}: BlendServe "
        "cannot tell when a request ends"
    )


def has_answer(req: Any) -> bool:
    """Whether SGLang's request has been computed to its end, not aborted or retracted."""
    return bool(req.finished()) and not isinstance(req.finished_reason, FINISH_ABORT)
