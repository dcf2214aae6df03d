"""Answers 400 where SGLang answers 500 to what is a fault of the request.

SGLang expects a ValueError of what it does before a request is sent to the scheduler, and many an
odd request raises something else there. Until the scheduler has a request, nothing but the request
itself can be at fault, so whatever is raised becomes a ValueError, or a 400.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from contextvars import ContextVar
from typing import Any

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from blendserve.batch.errors import cause_of, reason_of
from blendserve.batch.line_parser import is_too_deep, too_deep
from blendserve.batch.tool_calls import NEEDS_PARSER
from blendserve.runtime.media_checks import keeping_media
from blendserve.runtime.request_checks import check_before

logger = logging.getLogger(__name__)

# Routes whose bodies are requests to the engine.
_ROUTES = frozenset(
    {
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/embeddings",
        "/v1/responses",
        "/v1/score",
        "/v1/rerank",
        "/v1/classify",
        "/generate",
        "/encode",
    }
)
_HANDLERS = (
    *("openai_serving_chat", "openai_serving_completion", "openai_serving_embedding"),
    *("openai_serving_classify", "openai_serving_rerank"),
)
_STEPS = ("_validate_request", "_convert_to_internal_request")
# Whether the engine has answered, in the task of one HTTP request.
_answered: ContextVar[list[bool] | None] = ContextVar("answered", default=None)


def _refusal(error: Exception) -> ValueError:
    logger.warning("a request is refused: %s", reason_of(error))
    return ValueError(f"The request cannot be read. {cause_of(error)}")


def refusing(function: Callable[..., Any]) -> Callable[..., Any]:
    """A step before a request is sent, which raises nothing but ValueError and HTTPException."""

    @functools.wraps(function)
    def step(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except (ValueError, HTTPException, MemoryError):
            raise
        except Exception as error:
            raise _refusal(error) from error

    return step


def refuse_in_handlers(state: Any) -> None:
    """Wrap the steps of SGLang's handlers, which are there once its application has started."""
    for handler in (getattr(state, name, None) for name in _HANDLERS):
        for step in _STEPS if handler is not None else ():
            setattr(handler, step, refusing(getattr(handler, step)))
    chat = getattr(state, "openai_serving_chat", None)
    if chat is not None:
        chat._validate_request = needing_parser(chat)
        chat._convert_to_internal_request = keeping_media(chat._convert_to_internal_request)
    responses = getattr(state, "openai_serving_responses", None)
    if responses is not None:
        responses.create_responses = repeating(responses)


def needing_parser(chat: Any) -> Callable[[Any], str | None]:
    """The ``_validate_request`` of SGLang's chat handler, which takes forced calls of tools also
    where nothing can read them, and then answers them as plain text, without a word."""
    validate = chat._validate_request

    def validate_request(request: Any) -> str | None:
        fault: str | None = validate(request)
        if fault is not None or chat.tool_call_parser:
            return fault
        choice = request.tool_choice
        named = choice is not None and not isinstance(choice, str)
        return NEEDS_PARSER if request.tools and (named or choice == "required") else None

    return validate_request


def repeating(handler: Any) -> Callable[..., Awaitable[Any]]:
    """The ``create_responses`` of SGLang's handler, whose answer repeats most of the body: what is
    nested too deeply to be written again is refused before the engine works on it."""
    create = handler.create_responses

    async def create_responses(request: Any, raw_request: Any, *args: Any, **kwargs: Any) -> Any:
        # Parsed already, and kept.
        if is_too_deep(await raw_request.json()):
            fault = too_deep("body")
            return handler.create_error_response(fault.message, param=fault.param)
        return await create(request, raw_request, *args, **kwargs)

    return create_responses


def guarded(generate: Callable[..., AsyncIterator[Any]]) -> Callable[..., AsyncIterator[Any]]:
    """SGLang's ``TokenizerManager.generate_request``, which raises ValueError for whatever is
    wrong with a request that the engine has not begun to answer."""

    async def generate_request(obj: Any, *args: Any, **kwargs: Any) -> AsyncIterator[Any]:
        has_answered = False
        try:
            check_before(obj)
            async with aclosing(generate(obj, *args, **kwargs)) as outputs:  # type: ignore[type-var]
                async for output in outputs:
                    has_answered = True
                    if (seen := _answered.get()) is not None:
                        seen.append(True)
                    yield output
        except (ValueError, HTTPException, MemoryError):
            raise
        except Exception as error:
            if has_answered:
                raise
            raise _refusal(error) from error

    return generate_request


def scoring(score: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    """SGLang's ``TokenizerManager.score_request``, which puts prompts together itself: what it
    raises before the engine has answered is a fault of the request."""

    async def score_request(*args: Any, **kwargs: Any) -> Any:
        try:
            return await score(*args, **kwargs)
        except (ValueError, HTTPException, MemoryError):
            raise
        except Exception as error:
            if _answered.get():
                raise
            raise _refusal(error) from error

    return score_request


class RefuseBodies:
    """ASGI middleware: 400 for a body of which the framework's own reading raises.

    SGLang's request classes run code of their own on a body before it is validated, and that raises
    whatever it meets.
    """

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(
        self, scope: Any, receive: Any, send: Callable[..., Awaitable[None]]
    ) -> None:
        if scope["type"] != "http" or scope["path"] not in _ROUTES:
            await self._app(scope, receive, send)
            return
        answered: list[bool] = []
        token = _answered.set(answered)

        async def watched(message: Any) -> None:
            answered.append(True)
            await send(message)

        try:
            await self._app(scope, receive, watched)
        except Exception as error:
            if answered or isinstance(error, MemoryError):
                raise
            logger.warning("a request is refused: %s", reason_of(error))
            await _bad_request(error)(scope, receive, send)
        finally:
            _answered.reset(token)


def _bad_request(error: Exception) -> JSONResponse:
    message = f"The request cannot be read. {cause_of(error)}"
    fault = {"message": message, "type": "invalid_request_error", "param": None, "code": 400}
    return JSONResponse({"error": fault}, status_code=400)
