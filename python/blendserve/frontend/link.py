"""A client's end of one job of programs; `runtime/program_routes.py` is the server's."""

from __future__ import annotations

import json
import threading
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import httpx

from blendserve.frontend.held import HeldProgram, Stopped

_PATH = "/blendserve/programs"
# The server says something every few seconds. It may be busy, and its machine may swap.
_TIMEOUT = httpx.Timeout(30.0, read=120.0, write=120.0)
_NOTICE_SECONDS = 30.0
# What to do with these is for another day; others say that the request itself is wrong.
_TEMPORARY = frozenset({408, 429, 500, 502, 503, 504})


class ServerRefused(RuntimeError):
    """The server does not take programs as a job; the message says why."""


class Gate(Protocol):
    """Lets programs run; see `ProgramRun`."""

    def admit(self, program: HeldProgram, ticket: str | None) -> None: ...

    def again(self, held: Sequence[tuple[HeldProgram, dict[str, Any]]]) -> bool: ...

    def widen(self, limit: int) -> None: ...

    def end(self, programs: Sequence[HeldProgram], error: BaseException) -> None: ...

    def refuse(self, error: BaseException) -> None: ...


class Link:
    """One job: its programs are told to go on as the server says, and the server is told of their
    ends.

    Args:
        gate: what lets programs run.
        programs: that are held, in the order in which the server is told of them.
        bodies: what it is told.
        name: of the program.
        limit: programs that may run at once.
        window_seconds: see `Endpoint`.
    """

    def __init__(
        self,
        endpoint: Any,
        gate: Gate,
        programs: Sequence[HeldProgram],
        bodies: Sequence[dict[str, Any]],
        name: str,
        limit: int,
        window_seconds: float | None = None,
    ) -> None:
        self._gate = gate
        self._programs = programs
        self._bodies = bodies
        self._numbers = {program: number for number, program in enumerate(programs)}
        self._given: dict[str, Any] = {
            "name": name,
            "limit": limit,
            "window_seconds": window_seconds,
            "programs": list(bodies),
        }
        key = {"Authorization": f"Bearer {endpoint.api_key}"} if endpoint.api_key else {}
        self._client = httpx.Client(
            base_url=endpoint.base_url,
            headers=key,
            timeout=_TIMEOUT,
            verify=endpoint.verify if isinstance(endpoint.verify, str) else True,
        )
        self._news = threading.Condition()
        self._ended: list[tuple[int, bool]] = []
        self._told = 0
        self._cancelled = False
        self._job = ""
        self._closed = False
        self.thread = threading.Thread(target=self._run, name="blendserve-link", daemon=True)
        self._teller = threading.Thread(target=self._tell, name="blendserve-tell", daemon=True)

    def start(self) -> None:
        self.thread.start()

    def ended(self, program: HeldProgram, failed: bool) -> None:
        """A program has ended; one of another job is passed over."""
        number = self._numbers.get(program)
        if number is not None:
            with self._news:
                self._ended.append((number, failed))
                self._news.notify_all()

    def cancel(self) -> None:
        """Nothing more of this job is wanted."""
        with self._news:
            self._cancelled = True
            self._news.notify_all()

    # -- threads -----------------------------------------------------------------------------------

    def _run(self) -> None:
        said: dict[str, Any] = {}
        try:
            with self._client:
                for said in self._events():
                    self._take(said)
        except ServerRefused as error:
            self._gate.refuse(error)
        except (httpx.HTTPError, ValueError) as error:
            said = {"lost": f"{type(error).__name__}: {error}"}
        finally:
            with self._news:
                self._closed = True
                self._news.notify_all()
        self._release(said)

    def _events(self) -> Iterator[dict[str, Any]]:
        with self._client.stream("POST", _PATH, json=self._given) as response:
            self._given = {}
            if response.status_code != 200:
                response.read()
                _raise_for(response)
            self._teller.start()
            for line in response.iter_lines():
                yield json.loads(line)

    def _take(self, event: dict[str, Any]) -> None:
        if "job" in event:
            with self._news:
                self._job = event["job"]
                self._news.notify_all()
        for number, ticket in event.get("go", ()):
            self._gate.admit(self._programs[number], ticket)
        if "limit" in event:
            self._gate.widen(event["limit"])
        if "cancelled" in event:
            self._gate.end(self._programs, Stopped("The job of this program was cancelled."))

    def _release(self, said: dict[str, Any]) -> None:
        """The stream is over: what is still held runs without a plan, or not at all."""
        both = zip(self._programs, self._bodies, strict=True)
        held = [(program, body) for program, body in both if not program.gone]
        if not held:
            return
        # Without a last word the engine has died, or there was none.
        if "failed" not in said and self._gate.again(held):
            return
        why = said.get("failed") or said.get("lost") or "the connection ended"
        warnings.warn(f"{len(held)} programs run without a plan: {why}", stacklevel=2)
        for program, _ in held:
            self._gate.admit(program, None)

    def _tell(self) -> None:
        while True:
            with self._news:
                self._news.wait_for(
                    lambda: self._closed or (self._job and (self._ended or self._cancelled))
                )
                if self._closed:
                    return
                ended, self._ended = self._ended, []
                cancel = self._cancelled
            news: dict[str, Any] = {
                "ended": [number for number, failed in ended if not failed],
                "failed": [number for number, failed in ended if failed],
            }
            try:
                self._client.post(
                    f"{_PATH}/{self._job}",
                    json={**news, "cancel": True} if cancel else news,
                    timeout=_NOTICE_SECONDS,
                )
            except (httpx.HTTPError, RuntimeError):
                return  # The stream tells what became of the server.
            if cancel:
                return


def _raise_for(response: httpx.Response) -> None:
    if response.status_code in _TEMPORARY:
        response.raise_for_status()
    if response.status_code == 404:
        raise ServerRefused(
            f"The server at {response.url.copy_with(path='')} does not take programs as a job. Is "
            "it `blendserve serve` of this release? sgl.RuntimeEndpoint works with any SGLang."
        )
    try:
        said = response.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        said = response.text[:500]
    raise ServerRefused(f"The server refused the programs: {response.status_code}, {said}")
