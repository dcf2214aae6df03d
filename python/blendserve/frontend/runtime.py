"""A server of one's own for frontend programs, started and stopped by a Python program."""

from __future__ import annotations

import atexit
import contextlib
import sys
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any

from blendserve.cli.server_process import free_port, running_server
from blendserve.frontend.endpoint import Endpoint
from blendserve.frontend.flags import as_flags


class Runtime:
    """A BlendServe server on this machine, for as long as it is needed.

    It takes the place of `sgl.Runtime`: give it to `sgl.set_default_backend`. It stops with
    `shutdown`, at the end of a `with` block, or with this process; and with the thread that
    started it, so start it in one that stays.

    Args:
        model_path: folder or hub id; None: the small default model.
        flags: those of `blendserve serve` with underscores, as `tp_size=2`.

    Attributes:
        endpoint: the backend.
        url: of the server.
        log: file with what the server prints.

    Raises:
        ServerFailed: it did not start; with the end of its log.
    """

    def __init__(self, model_path: str | None = None, **flags: Any) -> None:
        self._stack = contextlib.ExitStack()
        folder = Path(
            self._stack.enter_context(tempfile.TemporaryDirectory(prefix="blendserve-runtime-"))
        )
        self.log = folder / "server.log"
        port = free_port()
        given = {"batch_dir": str(folder / "batches"), "model_path": model_path, **flags}
        command = [sys.executable, "-m", "blendserve", "serve", *as_flags(given)]
        command += ["--host", "127.0.0.1", "--port", str(port)]
        try:
            self.url = self._stack.enter_context(running_server(command, port, self.log))
            self.endpoint = Endpoint(self.url)
        except BaseException:
            self._stack.close()
            raise
        atexit.register(self.shutdown)

    def shutdown(self) -> None:
        """Stop the server, and remove its files. May be repeated."""
        self._stack.close()
        atexit.unregister(self.shutdown)

    def __enter__(self) -> Runtime:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.shutdown()
