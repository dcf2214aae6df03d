"""The page at /blendserve/: static files, served from the package; no build step, no internet."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from importlib import resources

from fastapi import APIRouter
from fastapi.responses import RedirectResponse, Response

_FILES = {
    "": ("index.html", "text/html; charset=utf-8"),
    "page.css": ("page.css", "text/css; charset=utf-8"),
    "page.js": ("page.js", "text/javascript; charset=utf-8"),
}
PAGE_PATHS = frozenset({"/blendserve", *(f"/blendserve/{name}" for name in _FILES)})
"""Open to everybody: they hold no data, and the page asks for a key where one is needed."""

_HEADERS = {
    # Nothing but these files is loaded, whatever a custom_id or an error message holds.
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "img-src data:; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def build_page_router() -> APIRouter:
    """The page and what it loads."""
    router = APIRouter(include_in_schema=False)
    folder = resources.files("blendserve.batch") / "static"
    for name, (file, kind) in _FILES.items():
        content = (folder / file).read_bytes()
        router.add_api_route(f"/blendserve/{name}", _sender(content, kind), methods=["GET"])

    @router.get("/blendserve")
    async def without_slash() -> RedirectResponse:
        return RedirectResponse("/blendserve/")

    return router


def _sender(content: bytes, kind: str) -> Callable[[], Awaitable[Response]]:
    async def send() -> Response:
        return Response(content, media_type=kind, headers=_HEADERS)

    return send
