"""The executor of a coordinator: one plan for all jobs, run by several engines. Knows no SGLang."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from typing import Any

from blendserve.batch.executor import (
    BatchLine,
    EngineUnavailable,
    LineFault,
    LineResult,
    LineSource,
)
from blendserve.config import Settings
from blendserve.planner import CostModel, Hardware, ModelSpec, PlannerConfig
from blendserve.runtime.cache_salt import cache_salt
from blendserve.runtime.cluster import Cluster
from blendserve.runtime.cluster_lines import ClusterLines, ClusterReader
from blendserve.runtime.credits import Credits
from blendserve.runtime.dispatcher import Dispatcher, DispatchView
from blendserve.runtime.job_runner import JobRunner, Threads
from blendserve.runtime.job_view import JobView, without_infinity
from blendserve.runtime.link_protocol import EngineDescription
from blendserve.runtime.member import Patience
from blendserve.runtime.pacing import Pacer
from blendserve.runtime.planner_process import PlannerProcess

logger = logging.getLogger(__name__)


def cost_model_of(description: EngineDescription) -> CostModel:
    """The cost model that an engine has of itself."""
    spec = ModelSpec.from_config(description.model_config_json)
    chip = Hardware.from_dict(description.hardware)
    # Of a stand-in nothing that it attains is known any better.
    of = CostModel.tensor_parallel if chip.guess else CostModel.attained
    return of(spec, chip, description.tensor_ranks)


def planner_config(
    settings: Settings, description: EngineDescription, engines: int
) -> PlannerConfig:
    """How jobs are planned for so many engines of this kind."""
    kv_tokens = description.kv_tokens
    return PlannerConfig(
        sample_fraction=settings.sample_fraction,
        sharing_preserved=settings.sharing_preserved,
        shared_decode_tokens=kv_tokens if description.shares_reads else None,
        kv_tokens=None if kv_tokens is None else kv_tokens * description.dp_size * engines,
    )


class ClusterExecutor:
    """Runs the lines of batches on the engines of a cluster (an `Executor`).

    Args:
        settings: BlendServe's settings.
        engines: how many there are expected to be; plans are made for as many.
    """

    def __init__(self, settings: Settings, engines: int) -> None:
        credits = Credits(0)
        self._dispatcher = Dispatcher(credits, Pacer(lambda: False))
        patience = Patience(settings.engine_silent_seconds, settings.engine_hang_seconds)
        self.cluster = Cluster(credits, patience, self._dispatcher.wake)
        self._settings = settings
        self._engines = engines
        self._planner: PlannerProcess | None = None
        self._threads = Threads(
            ThreadPoolExecutor(1, "blendserve-reading"),
            ThreadPoolExecutor(1, "blendserve-planning"),
        )
        self._runners: dict[str, JobRunner] = {}

    # -- what the batch room asks for ----------------------------------------------------------

    @property
    def endpoints(self) -> frozenset[str]:
        return frozenset(self._known().endpoints)

    @property
    def models(self) -> frozenset[str]:
        return frozenset(self._known().models)

    @property
    def fingerprint(self) -> str:
        return self._known().fingerprint

    def check(self, line: BatchLine) -> LineFault | None:
        """None: the engines answer a body that they cannot run as that line's own error."""
        return None

    async def run(
        self,
        job_id: str,
        lines: LineSource,
        pending: Sequence[int],
        on_start: Callable[[int], None],
        deadline: float | None = None,
    ) -> AsyncIterator[LineResult]:
        description = self._known()
        runner = JobRunner(
            job_id,
            lines,
            pending,
            on_start=on_start,
            deadline=deadline,
            reader=ClusterReader(self.cluster, asyncio.get_running_loop()),
            client=ClusterLines(self.cluster, description.served_model, cache_salt.get()),
            planner=self._planner_of(description),
            threads=self._threads,
            dispatcher=self._dispatcher,
        )
        self._runners[job_id] = runner
        try:
            async with aclosing(runner.run()) as results:
                async for result in results:
                    yield result
        finally:
            del self._runners[job_id]

    # -- life and view -------------------------------------------------------------------------

    async def until_ready(self, engines: int) -> None:
        """Wait until so many engines have joined, and warm the planner up."""
        while len(self.cluster.members) < engines:
            await self.cluster.change()
        planner = self._planner_of(self._known())
        await asyncio.get_running_loop().run_in_executor(self._threads.planning, planner.start)

    async def stop(self) -> None:
        await self.cluster.close()
        if self._planner is not None:
            self._planner.close()

    def jobs(self) -> list[JobView]:
        """The jobs that run now."""
        return [runner.look() for runner in self._runners.values()]

    def dispatch(self) -> DispatchView:
        """How the engines' queues are shared between them."""
        return self._dispatcher.view()

    def view(self) -> dict[str, Any]:
        """For GET /blendserve/status: as one engine's, and all engines beside it."""
        engines = [dataclasses.asdict(view) for view in self.cluster.views()]
        schedulers = [
            # Every tenant sees these, and addresses are not for all.
            {"engine": number, **report}
            for number, engine in enumerate(engines)
            for report in engine.pop("schedulers")
        ]
        view = {
            "schedulers": schedulers,
            "engines": engines,
            "jobs": [dataclasses.asdict(job) for job in self.jobs()],
            "dispatch": dataclasses.asdict(self.dispatch()),
        }
        return {key: without_infinity(value) for key, value in view.items()}

    def _known(self) -> EngineDescription:
        if self.cluster.description is None:
            raise EngineUnavailable("no engine has joined yet")
        return self.cluster.description

    def _planner_of(self, description: EngineDescription) -> PlannerProcess:
        if self._planner is None:
            engines = max(self._engines, len(self.cluster.members))
            config = planner_config(self._settings, description, engines)
            self._planner = PlannerProcess(cost_model_of(description), config)
        return self._planner
