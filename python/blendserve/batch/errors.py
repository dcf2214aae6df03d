"""Errors that a client sees, always in the shape {"error": {message, type, param, code}}."""

from __future__ import annotations

import traceback
from collections.abc import Mapping

from fastapi.responses import JSONResponse
from sqlalchemy.exc import DBAPIError

_MAX_CAUSE_CHARACTERS = 500


class ApiError(Exception):
    """A request that cannot be served, with the HTTP status and the fields of its answer."""

    def __init__(
        self,
        status_code: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        kind: str = "invalid_request_error",
        retry_after_seconds: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status_code = status_code
        self.message = message
        self.code = code
        self.param = param
        self.kind = kind
        self.retry_after_seconds = retry_after_seconds


def bad_request(message: str, *, code: str | None = None, param: str | None = None) -> ApiError:
    return ApiError(400, message, code=code, param=param)


def not_found(what: str, identifier: str, *, param: str = "id") -> ApiError:
    # A foreign string is echoed only in part: it may be of any length.
    return ApiError(404, f"No such {what}: {identifier[:80]}", code="not_found", param=param)


def conflict(message: str, *, code: str, param: str | None = None) -> ApiError:
    return ApiError(409, message, code=code, param=param)


def cause_of(error: BaseException) -> str:
    """An error's type and the beginning of its text, as UTF-8 can have it. For the error line of
    the request that caused it, never for a log: it may quote a prompt."""
    text = f"{type(error).__name__}: {error}"[:_MAX_CAUSE_CHARACTERS]
    return text.encode(errors="backslashreplace").decode()


def reason_of(error: BaseException) -> str:
    """An error's cause for the log, without its data: its text might quote a row or a prompt."""
    if isinstance(error, DBAPIError):
        return f"{type(error).__name__}: {error.orig}"
    if isinstance(error, OSError):
        return f"{type(error).__name__}: {error.strerror}"
    frames = "".join(traceback.format_tb(error.__traceback__))
    return f"{type(error).__name__}\n{frames}"


def error_response(
    status: int,
    message: str,
    code: str,
    *,
    kind: str = "invalid_request_error",
    param: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> JSONResponse:
    """An error in OpenAI's shape, as an answer."""
    error = {"message": message, "type": kind, "param": param, "code": code}
    return JSONResponse({"error": error}, status, headers=headers)
