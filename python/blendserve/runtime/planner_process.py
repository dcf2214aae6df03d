"""The planner in a process of its own, so that planning never holds up the engine process's loop.

One child per server, started ahead of need and kept. It is a plain Python program that imports
the planner only: multiprocessing's own spawn would import the server's main module in it, and
with it torch. Arrays cross the socket outside of the pickle, so that the engine process copies
none of them while it holds the interpreter lock.
"""

from __future__ import annotations

import os
import pickle
import signal
import socket
import struct
import subprocess
import sys
import threading
import traceback
from typing import Any

import numpy as np

from blendserve.planner import CostModel, PlannerConfig, ProgressCurve
from blendserve.runtime.plan_worker import JobPlan, News, PlanWorker, PromptBatch

_EXIT_SECONDS = 5.0
_COUNT = struct.Struct("!I")
_SIZE = struct.Struct("!Q")


class PlannerDied(RuntimeError):
    """The planning process ended by itself, for example for want of memory; its jobs are gone."""


class PlannerProcess:
    """A `Planner` whose work is done in a child process.

    Thread-safe: one call at a time goes to the child, the others wait. A child that died is
    replaced at the next call, without the jobs that it had.
    """

    def __init__(self, cost_model: CostModel, config: PlannerConfig) -> None:
        self._settings = (cost_model, config)
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._closed = False

    @property
    def pid(self) -> int | None:
        """Of the child, None before the first start."""
        return self._child.pid if self._child is not None else None

    def start(self) -> None:
        """Start the child, if it does not run."""
        with self._lock:
            self._connected()

    def close(self) -> None:
        """End the child for good. A call that waits for it, or comes later, fails with
        `PlannerDied`."""
        self._closed = True
        if self._child is not None:
            self._child.kill()
        with self._lock:
            self._disconnect()

    def append(self, job_id: str, batch: PromptBatch) -> None:
        self._call("append", job_id, batch)

    def plan(self, job_id: str, news: News) -> JobPlan:
        plan: JobPlan = self._call("plan", job_id, news)
        return plan

    def forecast(self, job_id: str, news: News) -> ProgressCurve | None:
        curve: ProgressCurve | None = self._call("forecast", job_id, news)
        return curve

    def forget(self, job_id: str) -> None:
        if self._socket is not None:
            self._call("forget", job_id)

    def _call(self, name: str, *args: Any) -> Any:
        with self._lock:
            connection = self._connected()
            try:
                _send(connection, (name, args))
                answer, error = _receive(connection)
            except (OSError, EOFError) as cause:
                code = self._disconnect()
                raise PlannerDied(f"the planning process ended with code {code}") from cause
        if error is not None:
            raise error
        return answer

    def _connected(self) -> socket.socket:
        if self._closed:
            raise PlannerDied("the planning process has been closed")
        if self._socket is None:
            ours, theirs = socket.socketpair()
            with theirs:
                self._child = subprocess.Popen(
                    [sys.executable, "-m", __name__, str(theirs.fileno())],
                    # Held open as long as this process lives: its end is the child's end.
                    stdin=subprocess.PIPE,
                    pass_fds=(theirs.fileno(),),
                )
            _send(ours, self._settings)
            self._socket = ours
        return self._socket

    def _disconnect(self) -> int | None:
        """The child's exit code, None if there was no child."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        if self._child is None:
            return None
        if self._child.stdin is not None:
            self._child.stdin.close()
        try:
            return self._child.wait(_EXIT_SECONDS)
        except subprocess.TimeoutExpired:
            self._child.kill()
            return self._child.wait()


def main() -> None:
    """The child: answer calls until the parent closes the socket or ends."""
    # Ctrl-C reaches the whole process group; the parent decides what ends when.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with socket.socket(fileno=int(sys.argv[1])) as connection:
        worker = PlanWorker(*_receive(connection))
        while True:
            try:
                name, args = _receive(connection)
            except EOFError:
                return
            try:
                _send(connection, (getattr(worker, name)(*args), None))
            except Exception as error:
                error.add_note("In the planning process:\n" + traceback.format_exc())
                _send(connection, (None, error))


def _end_with_parent() -> None:
    # Not through sys.stdin, whose lock the interpreter wants when it ends in order.
    os.read(0, 1)
    os._exit(0)


def _send(connection: socket.socket, message: Any) -> None:
    buffers: list[pickle.PickleBuffer] = []
    head = pickle.dumps(message, protocol=5, buffer_callback=buffers.append)
    connection.sendall(_COUNT.pack(len(buffers)) + _SIZE.pack(len(head)))
    connection.sendall(head)
    for buffer in buffers:
        with buffer.raw() as raw:
            connection.sendall(_SIZE.pack(raw.nbytes))
            connection.sendall(raw)


def _receive(connection: socket.socket) -> Any:
    """Raises EOFError when the other end has closed."""
    (count,) = _COUNT.unpack(_read(connection, _COUNT.size))
    head = _read(connection, _SIZE.unpack(_read(connection, _SIZE.size))[0])
    buffers = [
        _read(connection, _SIZE.unpack(_read(connection, _SIZE.size))[0]) for _ in range(count)
    ]
    return pickle.loads(head, buffers=buffers)


def _read(connection: socket.socket, size: int) -> memoryview:
    # An array of NumPy's is not cleared first, so nothing but the system touches its pages.
    data = np.empty(size, dtype=np.uint8).data
    done = 0
    while done < size:
        received = connection.recv_into(data[done:])
        if not received:
            raise EOFError("the other end has closed")
        done += received
    return data


if __name__ == "__main__":
    main()
