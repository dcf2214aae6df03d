"""The batch room's executor: SGLang, blended. One per server, in the front process."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing
from typing import Any

import torch

from blendserve.batch.executor import BatchLine, LineFault, LineResult, LineSource
from blendserve.config import Settings
from blendserve.planner import (
    CostModel,
    Hardware,
    ModelSpec,
    PlannerConfig,
    hardware,
)
from blendserve.runtime.credits import Credits
from blendserve.runtime.feedback import ReportReceiver, SchedulerReport
from blendserve.runtime.job_runner import JobRunner, JobView
from blendserve.runtime.line_client import LineClient
from blendserve.runtime.prompts import PromptReader

# Names under which torch reports the chips of the planner's hardware table.
_CHIPS = {
    "A100": "a100-80g-sxm",
    "H100": "h100-80g-sxm",
    "H200": "h200-141g-sxm",
    "L40S": "l40s",
}


class BlendExecutor:
    """Runs the lines of batches on the server that it lives in.

    Args:
        app: SGLang's HTTP application.
        server_args: SGLang's settings.
        tokenizer_manager: SGLang's tokenizer manager.
        settings: BlendServe's settings.
    """

    def __init__(
        self, app: Any, server_args: Any, tokenizer_manager: Any, settings: Settings
    ) -> None:
        self._app = app
        self._server_args = server_args
        self._tokenizer_manager = tokenizer_manager
        self._credits = Credits()
        self._reader = PromptReader(app, tokenizer_manager)
        model = ModelSpec.from_config(tokenizer_manager.model_config.hf_config.to_dict())
        ranks = int(server_args.tp_size or 1)
        self._cost_model = CostModel(model, choose_hardware(settings.hardware).scaled(ranks))
        self._config = PlannerConfig(
            sample_fraction=settings.sample_fraction, sharing_preserved=settings.sharing_preserved
        )
        self._receiver = ReportReceiver(settings.feedback_address, self._on_report)
        self._receiving: asyncio.Task[None] | None = None
        self._runners: dict[str, JobRunner] = {}
        self.reports: dict[int, SchedulerReport] = {}

    # -- what the batch room asks for ----------------------------------------------------------

    @property
    def endpoints(self) -> frozenset[str]:
        if not self._tokenizer_manager.is_generation:
            return frozenset({"/v1/embeddings"})
        served = {"/v1/chat/completions", "/v1/completions"}
        # SGLang serves these only where its handler could be made, which it is at the start.
        if hasattr(self._app.state, "openai_serving_responses"):
            served.add("/v1/responses")
        return frozenset(served)

    @property
    def models(self) -> frozenset[str]:
        return frozenset(
            {self._tokenizer_manager.served_model_name, self._tokenizer_manager.model_path}
        )

    @property
    def fingerprint(self) -> str:
        """Model and number format: what the answers of a batch depend on."""
        config = self._tokenizer_manager.model_config.hf_config.to_dict()
        identity = {
            "model": self._tokenizer_manager.served_model_name,
            "config": config,
            "dtype": str(self._tokenizer_manager.model_config.dtype),
            "quantization": self._server_args.quantization,
        }
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode())
        return f"{self._tokenizer_manager.served_model_name}@{digest.hexdigest()[:16]}"

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
    ) -> AsyncIterator[LineResult]:
        runner = JobRunner(
            job_id,
            lines,
            pending,
            reader=self._reader,
            client=LineClient(
                self._app, self._tokenizer_manager.abort_request, self._server_args.api_key
            ),
            credits=self._credits,
            cost_model=self._cost_model,
            config=self._config,
            on_start=on_start,
        )
        self._runners[job_id] = runner
        try:
            async with aclosing(runner.run()) as results:
                async for result in results:
                    yield result
        finally:
            del self._runners[job_id]

    # -- life and view -------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to listen to the scheduler. Call on the server's event loop."""
        self._receiving = asyncio.create_task(self._receiver.run())

    async def stop(self) -> None:
        if self._receiving is not None:
            self._receiving.cancel()
            await asyncio.gather(self._receiving, return_exceptions=True)

    def jobs(self) -> list[JobView]:
        """The jobs that run now."""
        return [runner.view for runner in self._runners.values()]

    def _on_report(self, report: SchedulerReport) -> None:
        self.reports[report.dp_rank] = report
        self._credits.on_report(report)
        for runner in self._runners.values():
            runner.wake()


def choose_hardware(name: str) -> Hardware:
    """The row of the hardware table to plan for; "auto" asks torch which device there is."""
    if name != "auto":
        return hardware(name)
    if not torch.cuda.is_available():
        return hardware("cpu")
    device = torch.cuda.get_device_name()
    for chip, row in _CHIPS.items():
        if chip in device:
            return hardware(row)
    raise ValueError(
        f"No row of the hardware table fits {device!r}. Set BLENDSERVE_HARDWARE to one of: "
        + ", ".join(sorted(_CHIPS.values()))
    )
