"""The engine process under watch: started, waited for, restarted when it dies or hangs."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx
from pydantic import ValidationError

from blendserve.batch import EngineAddress, EngineInfo, engine_client
from blendserve.cli.server_process import (
    PARENT_VARIABLE,
    TOKEN_VARIABLE,
    free_port,
    log_tail,
)

logger = logging.getLogger(__name__)

_START_POLL_SECONDS = 0.5
# Less than others wait for this process itself.
_STOP_SECONDS = 20.0
# SGLang itself waits 20 s for a sign of its scheduler before it says that it is not healthy.
_HEALTH_TIMEOUT_SECONDS = 25.0
_INFO_TIMEOUT_SECONDS = 30.0
_LOST_SECONDS = 3.0
_MAX_PAUSE_SECONDS = 60.0
_STEADY_SECONDS = 60.0


class EngineFailed(RuntimeError):
    """The engine does not start; the message holds the end of its log, `status` how it ended."""

    def __init__(self, message: str, status: int | None) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class WatchSettings:
    """When to give an engine up.

    start_seconds: not serving so long after its start. hang_seconds: not healthy for so long; 0
    never. probe_seconds: between two looks at it.
    max_failed_starts: in a row, without having served between; None goes on for ever once the
    engine has served. pause_seconds: before the first restart; each further one waits twice as
    long, up to a minute, until an engine has lasted.
    """

    start_seconds: float = 1_800.0
    hang_seconds: float = 120.0
    probe_seconds: float = 15.0
    max_failed_starts: int | None = None
    pause_seconds: float = 1.0


@dataclass
class EngineState:
    """What is told of the engine: "starting", "up", "restarting" or "stopped"."""

    state: str = "starting"
    since: float = field(default_factory=time.time)
    restarts: int = 0
    reason: str | None = None


class EngineProcess:
    """One engine at a time, on a loopback port of its own. Everything runs on the event loop.

    Args:
        command: starts the engine, given the port as a further `--port N`; it must take the key
            for its routes from the variable BLENDSERVE_ENGINE_TOKEN.
        on_up, on_down: told of every change; `on_up` again if an engine was wrongly thought lost.
        log: file that receives what it prints; None leaves that to this process's own streams.
        environment: variables beside this process's own.
    """

    def __init__(
        self,
        command: Sequence[str],
        on_up: Callable[[EngineAddress, EngineInfo], None],
        on_down: Callable[[str], None],
        *,
        log: Path | None = None,
        environment: Mapping[str, str] | None = None,
        watch: WatchSettings | None = None,
    ) -> None:
        self.view = EngineState()
        self.command = list(command)
        self._on_up = on_up
        self._on_down = on_down
        self._log = log
        self._environment = environment or {}
        self._watch = watch or WatchSettings()
        self._process: asyncio.subprocess.Process | None = None
        self._lost = asyncio.Event()
        self._has_served = False

    @property
    def pid(self) -> int | None:
        """The engine process of the hour."""
        return self._process.pid if self._process is not None else None

    def look_again(self) -> None:
        """A connection broke: see at once whether the engine is gone. Loop thread only."""
        self._lost.set()

    async def run(self) -> None:
        """Keep an engine running until cancelled, which stops it.

        Raises:
            EngineFailed: the first start failed, or too many in a row.
        """
        failed_starts = 0
        pause = self._watch.pause_seconds
        try:
            while True:
                began = time.monotonic()
                served, reason = await self._one_engine()
                self._on_down(reason)
                self._kill_group()
                await self._ended()
                failed_starts = 0 if served else failed_starts + 1
                if not self._has_served or failed_starts == self._watch.max_failed_starts:
                    raise EngineFailed(f"{reason}{self._tail()}", self._status())
                if time.monotonic() - began > _STEADY_SECONDS:
                    pause = self._watch.pause_seconds
                self._show("restarting", reason)
                self.view.restarts += 1
                logger.error("%s; the next one starts in %.0f s", reason, pause)
                await asyncio.sleep(pause)
                pause = min(pause * 2, _MAX_PAUSE_SECONDS)
        finally:
            await self._stop()
            self._show("stopped", self.view.reason)

    async def _one_engine(self) -> tuple[bool, str]:
        """From start to end: whether it has served, and why it ended."""
        address = EngineAddress(f"http://127.0.0.1:{free_port()}", secrets.token_hex(24))
        self._process = process = await self._spawn(address)
        ended = asyncio.create_task(process.wait())
        try:
            info = await self._until_serving(address, ended)
            if info is None and not ended.done():
                return False, f"the engine did not serve within {self._watch.start_seconds:.0f} s"
            if info is None:
                return False, f"the engine ended with status {ended.result()} before it served"
            self._has_served = True
            self._show("up", None)
            self._on_up(address, info)
            return True, await self._until_down(address, info, ended)
        except BaseException:
            # Somebody stops this process: the engine is to end in peace, which `_stop` sees to.
            ended.cancel()
            raise

    async def _spawn(self, address: EngineAddress) -> asyncio.subprocess.Process:
        port = address.url.rsplit(":", 1)[1]
        environment = {
            **os.environ,
            **self._environment,
            TOKEN_VARIABLE: address.token,
            PARENT_VARIABLE: str(os.getpid()),
        }
        with contextlib.ExitStack() as files:
            output = files.enter_context(self._log.open("ab")) if self._log is not None else None
            return await asyncio.create_subprocess_exec(
                *[*self.command, "--port", port],
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=environment,
                # A Ctrl-C on the terminal is for this process, which then stops the engine.
                start_new_session=True,
            )

    async def _until_serving(
        self, address: EngineAddress, ended: asyncio.Task[int]
    ) -> EngineInfo | None:
        deadline = time.monotonic() + self._watch.start_seconds
        while not ended.done() and time.monotonic() < deadline:
            if await self._is_healthy(address):
                info = await self._info(address)
                if info is not None:
                    return info
            await asyncio.wait([ended], timeout=_START_POLL_SECONDS)
        return None

    async def _until_down(
        self, address: EngineAddress, info: EngineInfo, ended: asyncio.Task[int]
    ) -> str:
        healthy_at = time.monotonic()
        while True:
            lost = asyncio.create_task(self._lost.wait())
            await asyncio.wait(
                [ended, lost],
                timeout=self._watch.probe_seconds,
                return_when=asyncio.FIRST_COMPLETED,
            )
            lost.cancel()
            was_lost = self._lost.is_set()
            self._lost.clear()
            if was_lost:
                # A dying server closes its connections a moment before it is gone.
                await asyncio.wait([ended], timeout=_LOST_SECONDS)
            if ended.done():
                return f"the engine ended with status {ended.result()}"
            if await self._is_healthy(address):
                healthy_at = time.monotonic()
                if was_lost:
                    self._on_up(address, info)
            elif was_lost:
                self._lost.set()
            silent = time.monotonic() - healthy_at
            if 0 < self._watch.hang_seconds < silent:
                return f"the engine gave no sign of life for {silent:.0f} s and was ended"

    async def _is_healthy(self, address: EngineAddress) -> bool:
        timeout = min(_HEALTH_TIMEOUT_SECONDS, self._watch.hang_seconds or _HEALTH_TIMEOUT_SECONDS)
        try:
            async with engine_client(timeout) as client:
                answer = await client.get(f"{address.url}/health")
        except httpx.HTTPError:
            return False
        return answer.status_code == 200

    async def _info(self, address: EngineAddress) -> EngineInfo | None:
        try:
            async with engine_client(_INFO_TIMEOUT_SECONDS) as client:
                answer = await client.get(
                    f"{address.url}/blendserve/engine", headers=address.headers
                )
            return EngineInfo.model_validate_json(answer.raise_for_status().content)
        except (httpx.HTTPError, ValidationError) as error:
            logger.error("the engine does not say what it serves: %s", type(error).__name__)
            return None

    async def _stop(self) -> None:
        process = self._process
        if process is None or process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(process.wait(), _STOP_SECONDS)
        self._kill_group()
        await self._ended()

    def _status(self) -> int | None:
        return self._process.returncode if self._process is not None else None

    async def _ended(self) -> None:
        if self._process is not None:
            await self._process.wait()

    def _kill_group(self) -> None:
        # Its own children (scheduler, detokenizer) share its process group.
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def _tail(self) -> str:
        return f":\n{log_tail(self._log)}" if self._log is not None else ""

    def _show(self, state: str, reason: str | None) -> None:
        self.view.state, self.view.reason, self.view.since = state, reason, time.time()
