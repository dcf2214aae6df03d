"""Engines on a Ray cluster: an actor per engine, which owns its GPUs and starts it as a child.

Ray places them and says when one is gone; all else is the coordinator's, as for engines that were
started by hand. Nothing of Ray is imported before it is asked for.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blendserve.batch import EngineAddress
from blendserve.cli.cluster_flags import RAY_MISSING
from blendserve.cli.server_process import (
    PARENT_VARIABLE,
    TOKEN_VARIABLE,
    die_with_parent,
    free_port,
    log_tail,
)
from blendserve.config import ConfigError
from blendserve.runtime.cluster import Cluster

logger = logging.getLogger(__name__)

_LOOK_SECONDS = 1.0
_ANSWER_SECONDS = 15.0
# An engine whose host lives, but that the coordinator has not had for so long, is started anew.
_LOST_SECONDS = 60.0
_START_SECONDS = 1_800.0
_FIRST_PAUSE_SECONDS, _MAX_PAUSE_SECONDS = 2.0, 60.0
_STOP_SECONDS = 20.0


def import_ray() -> Any:
    """Ray itself. Raises ConfigError if it is not installed."""
    # Nobody asked it to tell anyone.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as error:
        raise ConfigError(RAY_MISSING) from error
    return ray


def gpus_of(flags: Sequence[str]) -> int:
    """GPUs of an engine with these flags of SGLang's. Raises ConfigError."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for names in (
        ("--tp-size", "--tp", "--tensor-parallel-size"),
        ("--pp-size", "--pp", "--pipeline-parallel-size"),
        ("--dp-size", "--dp", "--data-parallel-size"),
        ("--nnodes",),
    ):
        parser.add_argument(*names, type=int, default=1)
    parser.add_argument("--enable-dp-attention", action="store_true")
    try:
        known, _ = parser.parse_known_args(list(flags))
    except argparse.ArgumentError as error:
        raise ConfigError(str(error)) from error
    if known.nnodes > 1:
        raise ConfigError(
            "--nnodes with --ray: an engine must fit on one node; see docs/cluster.md"
        )
    replicas = 1 if known.enable_dp_attention else known.dp_size
    return int(known.tp_size * known.pp_size * replicas)


class EngineHost:
    """The actor: one engine, which ends with it."""

    def __init__(self, flags: Sequence[str], key: str, environment: dict[str, str]) -> None:
        import ray

        self._host = ray.util.get_node_ip_address()
        self._port = free_port()
        self._log = Path(tempfile.mkdtemp(prefix="blendserve-engine-")) / "engine.log"
        command = [sys.executable, "-m", "blendserve.cli.serve", *flags]
        with self._log.open("wb") as output:
            self._child = subprocess.Popen(
                [*command, "--host", self._host, "--port", str(self._port)],
                env={
                    **{
                        name: value for name, value in os.environ.items() if name != PARENT_VARIABLE
                    },
                    **environment,
                    TOKEN_VARIABLE: key,
                    "BLENDSERVE_ENABLED": "True",
                    "BLENDSERVE_BEHIND_COORDINATOR": "True",
                },
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=die_with_parent,
            )

    def look(self) -> dict[str, Any]:
        """Where it listens; `ended` says why it has, if it has."""
        status = self._child.poll()
        ended = None
        if status is not None:
            ended = f"the engine ended with status {status}:\n{log_tail(self._log)}"
        return {
            "url": f"http://{self._host}:{self._port}",
            "pid": self._child.pid,
            "ended": ended,
        }

    def stop(self) -> None:
        """End the engine in peace, and then its group."""
        self._child.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._child.wait(_STOP_SECONDS)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._child.pid, signal.SIGKILL)


@dataclass
class _Slot:
    """A place for an engine on the cluster."""

    number: int
    group: Any = None
    host: Any = None
    address: EngineAddress | None = None


class RayEngines:
    """Keeps a number of engines on a Ray cluster, and the coordinator told of them.

    Args:
        engines: how many; None: as many as the cluster has room for, as nodes come and go.
        flags: of `blendserve serve`, for each.
        environment: variables for each, beside those of its node.
    """

    def __init__(
        self,
        engines: int | None,
        flags: Sequence[str],
        environment: dict[str, str],
    ) -> None:
        self._ray = import_ray()
        self._engines = engines
        self._flags = list(flags)
        self._environment = environment
        self._gpus = gpus_of(flags)
        # Only the actors get it, through Ray's own connections.
        self._key = secrets.token_hex(24)
        self._slots: list[asyncio.Task[None]] = []

    def connect(self) -> int:
        """Join the cluster; how many engines are wanted now. Blocks. Raises ConfigError."""
        ray = self._ray
        try:
            ray.init(address="auto", log_to_driver=False, logging_level=logging.WARNING)
        except ConnectionError as error:
            raise ConfigError(
                "there is no Ray cluster here: `ray start --head` starts one, RAY_ADDRESS names one"
            ) from error
        largest = max((node.get("GPU", 0) for node in self._nodes()), default=0)
        if 0 < largest < self._gpus:
            raise ConfigError(
                f"an engine needs {self._gpus} GPUs on one node, and the largest has "
                f"{largest:.0f}; see docs/cluster.md for engines over several nodes"
            )
        return self._wanted()

    async def run(self, cluster: Cluster) -> None:
        """Keep the engines, and the cluster told of them, until cancelled, which stops them."""
        try:
            while True:
                try:
                    wanted = await asyncio.to_thread(self._wanted)
                except Exception as error:
                    # The head may be away for a moment; the engines are not.
                    logger.error("Ray does not tell of its nodes: %s", type(error).__name__)
                    wanted = 0
                # Slots of nodes that are gone wait for others; they cost nothing.
                while len(self._slots) < wanted:
                    slot = _Slot(len(self._slots))
                    self._slots.append(asyncio.create_task(self._keep(slot, cluster)))
                await asyncio.sleep(_LOOK_SECONDS)
        finally:
            for task in self._slots:
                task.cancel()
            await asyncio.gather(*self._slots, return_exceptions=True)

    def _nodes(self) -> list[dict[str, float]]:
        return [node["Resources"] for node in self._ray.nodes() if node["Alive"]]

    def _wanted(self) -> int:
        if self._engines is not None:
            return self._engines
        nodes = self._nodes()
        gpus = [int(node.get("GPU", 0)) for node in nodes]
        if any(gpus):
            return sum(count // self._gpus for count in gpus)
        return sum(node.get("CPU", 0) >= 1 for node in nodes)

    async def _keep(self, slot: _Slot, cluster: Cluster) -> None:
        pause = _FIRST_PAUSE_SECONDS
        while True:
            began = time.monotonic()
            try:
                reason = await self._one(slot, cluster)
            finally:
                await asyncio.shield(self._clear(slot, cluster))
            logger.error("engine %d on Ray: %s", slot.number, reason)
            if time.monotonic() - began > _LOST_SECONDS:
                pause = _FIRST_PAUSE_SECONDS
            await asyncio.sleep(pause)
            pause = min(2 * pause, _MAX_PAUSE_SECONDS)

    async def _one(self, slot: _Slot, cluster: Cluster) -> str:
        """From its placement to its end, and why it ended."""
        ray = self._ray
        # The CPU is for the host itself, where GPUs do the work.
        bundle = {"CPU": 1.0, "GPU": float(self._gpus)} if self._has_gpus() else {"CPU": 1.0}
        slot.group = ray.util.placement_group([bundle], strategy="STRICT_PACK")
        await asyncio.wrap_future(slot.group.ready().future())
        strategy = ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy(slot.group, 0)
        actor = ray.remote(EngineHost).options(
            num_cpus=bundle["CPU"],
            num_gpus=bundle.get("GPU", 0),
            max_restarts=0,
            scheduling_strategy=strategy,
        )
        slot.host = actor.remote(self._flags, self._key, self._environment)
        had_at, patience = time.monotonic(), _START_SECONDS
        while True:
            try:
                seen = await self._ask(slot.host.look.remote())
            except (ray.exceptions.ActorUnavailableError, TimeoutError):
                # Not a death: Ray looks again, and so does this. The link tells whether it serves.
                await asyncio.sleep(_LOOK_SECONDS)
                continue
            except ray.exceptions.RayError as error:
                return f"its node or its host is gone ({type(error).__name__})"
            if seen["ended"] is not None:
                return str(seen["ended"])
            if slot.address is None:
                slot.address = EngineAddress(seen["url"], self._key)
                cluster.add(slot.address)
            if cluster.has(slot.address):
                had_at, patience = time.monotonic(), _LOST_SECONDS
            elif time.monotonic() - had_at > patience:
                return f"it was not to be had for {patience:.0f} s"
            await asyncio.sleep(_LOOK_SECONDS)

    async def _ask(self, reference: Any) -> Any:
        return await asyncio.wait_for(asyncio.wrap_future(reference.future()), _ANSWER_SECONDS)

    def _has_gpus(self) -> bool:
        return any(node.get("GPU", 0) for node in self._nodes())

    async def _clear(self, slot: _Slot, cluster: Cluster) -> None:
        ray = self._ray
        if slot.address is not None:
            await cluster.remove(slot.address, "its engine on Ray has ended")
        if slot.host is not None:
            with contextlib.suppress(Exception):
                await asyncio.wait_for(
                    asyncio.wrap_future(slot.host.stop.remote().future()), _STOP_SECONDS + 5
                )
            with contextlib.suppress(Exception):
                ray.kill(slot.host)
        if slot.group is not None:
            with contextlib.suppress(Exception):
                ray.util.remove_placement_group(slot.group)
        slot.address = slot.host = slot.group = None
