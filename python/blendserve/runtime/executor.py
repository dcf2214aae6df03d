"""The batch room's executor: SGLang, blended. One per server, in the engine process."""

from __future__ import annotations

import asyncio
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from blendserve import __version__
from blendserve.batch.executor import BatchLine, LineFault, LineResult, LineSource
from blendserve.config import Settings
from blendserve.planner import PlannerConfig
from blendserve.runtime.arguments import resolved
from blendserve.runtime.attention import BACKEND_NAME
from blendserve.runtime.cache_salt import cache_salt, salted
from blendserve.runtime.credits import Credits
from blendserve.runtime.device import choose_hardware, cost_model_of
from blendserve.runtime.dispatcher import Dispatcher, DispatchView
from blendserve.runtime.feedback import ReportReceiver, SchedulerReport
from blendserve.runtime.fingerprint import fingerprint
from blendserve.runtime.guard import not_live
from blendserve.runtime.job_runner import JobRunner, Threads
from blendserve.runtime.job_view import JobView
from blendserve.runtime.line_client import LineClient
from blendserve.runtime.line_plans import planned
from blendserve.runtime.link_protocol import LINK_VERSION, EngineDescription
from blendserve.runtime.media_checks import checking_media, kinds_read
from blendserve.runtime.metrics import Metrics
from blendserve.runtime.pacing import Pacer, paced
from blendserve.runtime.planner_process import PlannerProcess
from blendserve.runtime.program_client import ProgramClient
from blendserve.runtime.program_job import ProgramJob, ProgramView
from blendserve.runtime.prompts import PromptReader
from blendserve.runtime.refusals import RefuseBodies, guarded, refuse_in_handlers, scoring
from blendserve.runtime.request_checks import ModelLimits, checked
from blendserve.runtime.served import served_endpoints
from blendserve.runtime.tickets import Tickets, ticketed
from sgl_kernel_ext import cpu

if TYPE_CHECKING:
    from blendserve.runtime.program_routes import Programs, ProgramStream

logger = logging.getLogger(__name__)

# How old what GET /metrics shows may be.
_METRICS_SECONDS = 1.0
# A report lies in its socket when the server starts; this is for a machine that swaps.
_HELLO_SECONDS = 60.0


def shares_reads(server_args: Any) -> bool:
    """Whether it is our attention, which reads what running requests share once a step for all."""
    if server_args.attention_backend != BACKEND_NAME:
        return False
    return not (server_args.device == "cpu" and cpu.unavailable_reason())


def planner_config(server_args: Any, settings: Settings, kv_tokens: int | None) -> PlannerConfig:
    """How jobs are planned on a server with so much KV memory (None: not known)."""
    return PlannerConfig(
        sample_fraction=settings.sample_fraction,
        sharing_preserved=settings.sharing_preserved,
        shared_decode_tokens=kv_tokens if shares_reads(server_args) else None,
        kv_tokens=None if kv_tokens is None else kv_tokens * server_args.dp_size,
    )


class BlendExecutor:
    """Runs the lines of batches on the server that it lives in.

    Args:
        app: SGLang's HTTP application.
        server_args: SGLang's settings.
        tokenizer_manager: SGLang's tokenizer manager.
        settings: BlendServe's settings.
        kv_tokens: size of a replica's KV pool; None: not known.
    """

    def __init__(
        self,
        app: Any,
        server_args: Any,
        tokenizer_manager: Any,
        settings: Settings,
        kv_tokens: int | None,
    ) -> None:
        self._app = app
        self._server_args = server_args
        self._settings = settings
        self._kv_tokens = kv_tokens
        self._tokenizer_manager = tokenizer_manager
        self.pacer = pacer = Pacer(self._serves_online)
        self._dispatcher = Dispatcher(Credits(server_args.dp_size), pacer)
        self._fingerprint: tuple[str, str] | None = None
        # On the one object that serves all requests: SGLang's own methods stay as they are.
        page_size = int(resolved(server_args).page_size or 1)
        tokenizer_manager._create_tokenized_object = checked(
            tokenizer_manager._create_tokenized_object,
            ModelLimits.of(tokenizer_manager, kv_tokens, page_size),
        )
        self._tickets = Tickets()
        generate = salted(ticketed(tokenizer_manager.generate_request, self._tickets))
        generate = planned(generate)
        generate = guarded(checking_media(generate, kinds_read(tokenizer_manager)))
        tokenizer_manager.generate_request = paced(generate, pacer)
        tokenizer_manager.score_request = scoring(tokenizer_manager.score_request)
        app.add_middleware(RefuseBodies)
        self.reader = PromptReader(app, tokenizer_manager)
        self._planner = PlannerProcess(
            cost_model_of(tokenizer_manager.model_config, server_args.tp_size, settings),
            planner_config(server_args, settings, kv_tokens),
        )
        self._threads = Threads(
            ThreadPoolExecutor(1, "blendserve-reading"),
            ThreadPoolExecutor(1, "blendserve-planning"),
        )
        self._receiver = ReportReceiver(settings.feedback_address, self._on_report)
        self._tasks: list[asyncio.Task[None]] = []
        self._runners: dict[str, JobRunner] = {}
        self.reports: dict[int, SchedulerReport] = {}
        self.on_report: Callable[[SchedulerReport], None] = lambda _: None
        """Told of each report."""
        self.lines_of_coordinator: Callable[[], int] = lambda: 0
        """How many are in flight that are no job's of this executor."""
        self._reported = asyncio.Event()

    # -- what the batch room asks for ----------------------------------------------------------

    @property
    def endpoints(self) -> frozenset[str]:
        return served_endpoints(self._app, self._tokenizer_manager)

    @property
    def models(self) -> frozenset[str]:
        return frozenset(
            {self._tokenizer_manager.served_model_name, self._tokenizer_manager.model_path}
        )

    @property
    def fingerprint(self) -> str:
        """What the answers of a batch depend on; see `runtime.fingerprint`."""
        manager = self._tokenizer_manager
        # New weights may have been loaded since, from another path.
        if self._fingerprint is None or self._fingerprint[0] != manager.model_path:
            value = fingerprint(
                self._server_args,
                manager.model_path,
                manager.served_model_name,
                str(manager.model_config.dtype),
            )
            self._fingerprint = (manager.model_path, value)
        return self._fingerprint[1]

    def check(self, line: BatchLine) -> LineFault | None:
        # A body that the server would refuse is answered line by line, so that one poor line does
        # not stop a job; what makes the whole file wrong is the batch room's to find.
        return None

    async def run(
        self,
        job_id: str,
        lines: LineSource,
        pending: Sequence[int],
        on_start: Callable[[int], None],
        deadline: float | None = None,
    ) -> AsyncIterator[LineResult]:
        runner = JobRunner(
            job_id,
            lines,
            pending,
            on_start=on_start,
            deadline=deadline,
            reader=self.reader,
            client=LineClient(
                self._app,
                self._tokenizer_manager.abort_request,
                self.tokens_so_far,
                self._server_args.api_key,
                self._tokenizer_manager.served_model_name,
                cache_salt.get(),
            ),
            planner=self._planner,
            threads=self._threads,
            dispatcher=self._dispatcher,
        )
        with self.shown(runner):
            async with aclosing(runner.run()) as results:
                async for result in results:
                    yield result

    def program_job(self, given: Programs, salt: str, stream: ProgramStream) -> ProgramJob:
        """A job of frontend programs, which runs once `run_all` of it does."""
        view = ProgramView(
            f"programs_{uuid.uuid4().hex}",
            deadline=given.window_seconds and time.time() + given.window_seconds,
            name=given.name,
            programs=len(given.programs),
            running_limit=given.limit,
            owner=salt,
        )
        client = ProgramClient(
            salt,
            stream.go,
            tickets=self._tickets,
            dispatcher=self._dispatcher,
            abort=self._tokenizer_manager.abort_request,
            tokens_so_far=self.tokens_so_far,
        )
        return ProgramJob(
            view,
            given.programs,
            client,
            stream.limit,
            reader=self.reader,
            planner=self._planner,
            threads=self._threads,
            dispatcher=self._dispatcher,
        )

    @contextmanager
    def shown(self, runner: JobRunner) -> Iterator[None]:
        """Among the jobs that run, for as long as this lasts."""
        self._runners[runner.job_id] = runner
        try:
            yield
        finally:
            del self._runners[runner.job_id]

    def describe(self, session: str) -> EngineDescription:
        """What a coordinator needs to know of this engine to plan for it."""
        manager, args = self._tokenizer_manager, self._server_args
        return EngineDescription(
            session=session,
            link_version=LINK_VERSION,
            release=__version__,
            endpoints=sorted(self.endpoints),
            models=sorted(self.models),
            served_model=manager.served_model_name,
            fingerprint=self.fingerprint,
            # As it would be written to a file: it may hold what JSON has no word for.
            model_config_json=json.loads(manager.model_config.hf_config.to_json_string(False)),
            hardware=asdict(choose_hardware(self._settings.hardware)),
            tensor_ranks=int(args.tp_size or 1),
            dp_size=args.dp_size,
            kv_tokens=self._kv_tokens,
            shares_reads=shares_reads(args),
        )

    # -- life and view -------------------------------------------------------------------------

    def start(self, *, plans: bool = True) -> None:
        """Begin to listen to the scheduler, and warm the planner up unless a coordinator plans.
        Call on the event loop."""
        # Reads files, so it is done before anybody asks.
        logger.info("BlendServe: this engine is %s", self.fingerprint)
        refuse_in_handlers(self._app.state)
        self.reader.probe_on(asyncio.get_running_loop())
        if plans:
            self._threads.planning.submit(self._planner.start)
        self._tasks.append(asyncio.create_task(self._receiver.run()))
        if self._server_args.enable_metrics:
            self._tasks.append(asyncio.create_task(self._keep_metrics(Metrics())))

    async def replicas_live(self) -> None:
        """Wait until the scheduler of each data-parallel replica has spoken. Each did before SGLang
        called it ready, so that takes a moment.

        Raises:
            UnsupportedSGLang: one has not; it is not BlendServe's.
        """
        if self._server_args.dp_size == 1:
            return  # Its handshake has told.
        try:
            async with asyncio.timeout(_HELLO_SECONDS):
                while len(self.reports) < self._server_args.dp_size:
                    await self._reported.wait()
                    self._reported.clear()
        except TimeoutError as error:
            raise not_live() from error

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._planner.close()

    def jobs(self) -> list[JobView]:
        """The jobs that run now."""
        return [runner.look() for runner in self._runners.values()]

    def dispatch(self) -> DispatchView:
        """How the scheduler's queues are shared between them."""
        return self._dispatcher.view()

    async def _keep_metrics(self, metrics: Metrics) -> None:
        while True:
            reports: dict[tuple[str, ...], SchedulerReport] = {
                (str(rank),): report for rank, report in self.reports.items()
            }
            metrics.update(reports, self.jobs(), self.dispatch())
            await asyncio.sleep(_METRICS_SECONDS)

    def _on_report(self, report: SchedulerReport) -> None:
        self.reports[report.dp_rank] = report
        self._reported.set()
        self._dispatcher.credits.on_report(report)
        self._dispatcher.wake()
        self.on_report(report)

    def _serves_online(self) -> bool:
        in_flight = sum(runner.view.in_flight for runner in self._runners.values())
        in_flight += self.lines_of_coordinator()
        return len(self._tokenizer_manager.rid_to_state) > in_flight

    def tokens_so_far(self, rid: str) -> int:
        """Output tokens that the engine is known to have produced for a request in flight."""
        # SGLang sends what a request has said so far every few dozen tokens, streamed or not.
        state = self._tokenizer_manager.rid_to_state.get(rid)
        return len(state.output_ids) if state is not None else 0
