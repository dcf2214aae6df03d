"""The urls that a line may have, and what somebody meant who wrote another one."""

from __future__ import annotations

import difflib
from collections.abc import Collection
from urllib.parse import urlsplit

OPENAI_ENDPOINTS = frozenset(
    {"/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses"}
)
EXTENSIONS = frozenset({"/v1/classify", "/v1/rerank", "/v1/score"})
"""Routes of SGLang's that OpenAI's Batch API does not have."""
ENDPOINTS = OPENAI_ENDPOINTS | EXTENSIONS
"""Urls that a line may have; an engine serves some of them."""

# A letter or two apart; not /v1/completions for /v1/chat.
_ALIKE = 0.85


def did_you_mean(url: str, known: Collection[str] = ENDPOINTS) -> str:
    """ " Did you mean ...?" for a url that is nearly one of those known, and "" for any other."""
    meant = _meant(url, known)
    return f" Did you mean {meant!r}?" if meant is not None else ""


def _meant(url: str, known: Collection[str]) -> str | None:
    try:
        path = urlsplit(url.strip()).path
    except ValueError:
        return None
    path = "/" + path.strip("/").lower()
    for guess in (path, f"/v1{path}"):
        if guess in known:
            return guess
    longer = sorted(name for name in known if name.startswith((f"{path}/", f"/v1{path}/")))
    if longer and path != "/v1":
        return longer[0]
    near = difflib.get_close_matches(path[:80], sorted(known), n=1, cutoff=_ALIKE)
    return near[0] if near else None
