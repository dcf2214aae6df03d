"""The front process's application in a thread, over a fake engine in a process of its own."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import threading
from pathlib import Path

import httpx
import psutil
import uvicorn
from batch_fakes import until
from openai import OpenAI

from blendserve.batch import ApiKeys, BatchStore
from blendserve.cli.connections import PatientProtocol
from blendserve.cli.engine_process import WatchSettings
from blendserve.cli.front import Front
from blendserve.config import Settings

FAKE_ENGINE = Path(__file__).with_name("fake_engine.py")
WATCH = WatchSettings(hang_seconds=1.5, probe_seconds=0.2, pause_seconds=0.05)


class FrontServer:
    """Use as a context; `options` go to `fake_engine.py`."""

    def __init__(
        self,
        batch_dir: Path,
        *options: str,
        keys: ApiKeys | None = None,
        watch: WatchSettings = WATCH,
        command: list[str] | None = None,
    ) -> None:
        self.store = BatchStore(batch_dir)
        command = command or [sys.executable, str(FAKE_ENGINE), *options]
        settings = Settings(batch_dir=batch_dir, max_batch_lines=10**9)
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
        self.front = Front(self.store, command, settings, keys or ApiKeys({}), watch)
        config = uvicorn.Config(
            self.front.app, port=0, log_level="warning", http=PatientProtocol, ws="none"
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=lambda: asyncio.run(self._server.serve()))

    def __enter__(self) -> FrontServer:
        self._log_level = logging.getLogger("blendserve").level
        logging.getLogger("blendserve").setLevel(logging.CRITICAL)
        self._thread.start()
        until(lambda: self._server.started, bool)
        self.url = f"http://127.0.0.1:{self._server.servers[0].sockets[0].getsockname()[1]}"
        self.client = self.client_of("none")
        self.http = httpx.Client(base_url=self.url, timeout=30)
        return self

    def __exit__(self, *_: object) -> None:
        logging.getLogger("blendserve").setLevel(self._log_level)
        self.client.close()
        self.http.close()
        self._server.should_exit = True
        self._thread.join(60)
        assert not self._thread.is_alive()
        self.store.close()

    def client_of(self, key: str) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0)

    @property
    def engine_pid(self) -> int | None:
        return self.front.engine.pid

    def wait_until_up(self) -> None:
        until(lambda: self.front.engine.view, lambda view: view.state == "up")

    def kill_engine(self) -> None:
        """As a crash would: no warning."""
        pid = self.engine_pid
        assert pid is not None
        assert psutil.pid_exists(pid)
        os.kill(pid, signal.SIGKILL)
