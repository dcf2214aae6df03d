"""A server of our own in a child process, for the commands that need one while they run."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import secrets
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import httpx

# How a front process tells its engine the key for its routes, and whom to follow into the end.
TOKEN_VARIABLE = "BLENDSERVE_ENGINE_TOKEN"
PARENT_VARIABLE = "BLENDSERVE_PARENT_PID"

_START_SECONDS = 600.0
_STOP_SECONDS = 30.0
_LOG_TAIL_LINES = 15
# The last line of a traceback.
_ERROR = re.compile(r"[\w.]*(Error|Exception): ")
_PR_SET_PDEATHSIG = 1
_FIRST_PORT = 20_000
# Linux gives outgoing connections ports from here on, unless it is told otherwise.
_FIRST_OUTGOING_PORT = 32_768
# Loaded here, once: to load it in a child just forked could wait for ever for the loader's lock,
# if another thread held that at the fork.
_LIBC = ctypes.CDLL(None)


class ServerFailed(RuntimeError):
    """The server did not start; the message holds the end of its log."""


def free_port() -> int:
    """A port on the loopback interface that nothing listens on now.

    Not one of the ports that the system gives to outgoing connections: a server binds its port
    only once its model is loaded, and by then some connection might have got it.
    """
    while True:
        port = secrets.randbelow(_FIRST_OUTGOING_PORT - _FIRST_PORT) + _FIRST_PORT
        with socket.socket() as listener, contextlib.suppress(OSError):
            listener.bind(("127.0.0.1", port))
            return port


@contextlib.contextmanager
def running_server(
    command: Sequence[str], port: int, log: Path, environment: Mapping[str, str] | None = None
) -> Iterator[str]:
    """Start a server, wait until it serves, yield its base URL, and stop it at the end.

    Args:
        command: how to start it; it must listen on 127.0.0.1 at ``port``.
        log: file that receives what it prints.
        environment: variables beside this process's own.

    Raises:
        ServerFailed: it ended before it served, or did not serve in time.
    """
    url = f"http://127.0.0.1:{port}"
    with log.open("ab") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env={**os.environ, **(environment or {})},
            # A Ctrl-C on the terminal is for this process, which then stops the server itself.
            start_new_session=True,
            preexec_fn=die_with_parent,
        )
        try:
            _wait_until_serving(process, url, log)
            yield url
        finally:
            _stop(process)


def die_with_parent() -> None:
    """In a child, on Linux: end with the parent process, even if that is killed without warning.

    All state of the server is durable at any instant, so a kill loses nothing; a server left
    behind would keep its directory locked.
    """
    with contextlib.suppress(AttributeError):
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def follow_parent() -> None:
    """In an engine process: end when its front process ends, also if that has ended already.

    Raises:
        SystemExit: it has.
    """
    die_with_parent()
    if os.getppid() != int(os.environ[PARENT_VARIABLE]):
        raise SystemExit("blendserve: the process that started this engine is gone")


def _wait_until_serving(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise ServerFailed(
                f"the server ended with status {process.returncode}:\n{log_tail(log)}"
            )
        try:
            if httpx.get(f"{url}/health", timeout=20, trust_env=False).status_code == 200:
                return
        except httpx.TransportError:
            pass  # not listening yet
        time.sleep(0.25)
    raise ServerFailed(f"the server did not answer within {_START_SECONDS:.0f} s:\n{log_tail(log)}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    # Its own children (scheduler, detokenizer) share its process group, and end with it.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def log_tail(log: Path) -> str:
    """What a log says of a server's end: our own words if there are any; else its last lines, and
    before them the first error, of which the later ones are often only the consequence."""
    lines = log.read_text(errors="replace").splitlines()
    said = [line for line in lines if line.startswith("blendserve")]
    tail = lines[-_LOG_TAIL_LINES:]
    first = next((line for line in lines if _ERROR.match(line)), None)
    if first is not None and first not in tail:
        tail = [f"first error: {first}", *tail]
    return "\n".join(said[-3:] or tail)
