"""SGLang's real server, handlers and tokenizer manager, with a scheduler that only answers."""

from __future__ import annotations

import asyncio
import uuid
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import aclosing, contextmanager
from pathlib import Path
from typing import Any

import httpx
import msgspec
from sglang.srt import runtime_context
from sglang.srt.entrypoints import http_server
from sglang.srt.entrypoints.openai.serving_chat import OpenAIServingChat
from sglang.srt.entrypoints.openai.serving_classify import OpenAIServingClassify
from sglang.srt.entrypoints.openai.serving_completions import OpenAIServingCompletion
from sglang.srt.entrypoints.openai.serving_embedding import OpenAIServingEmbedding
from sglang.srt.entrypoints.openai.serving_rerank import OpenAIServingRerank
from sglang.srt.entrypoints.openai.serving_responses import OpenAIServingResponses
from sglang.srt.entrypoints.openai.serving_score import OpenAIServingScore
from sglang.srt.managers import io_struct
from sglang.srt.managers.tokenizer_manager import TokenizerManager
from sglang.srt.parser.template_manager import TemplateManager
from sglang.srt.server_args import PortArgs, prepare_server_args

from blendserve.batch.executor import BatchLine, LineResult
from blendserve.config import Settings
from blendserve.planner import Side
from blendserve.runtime.executor import BlendExecutor
from blendserve.runtime.feedback import SchedulerReport
from blendserve.runtime.plan_tag import PlanTag
from blendserve.runtime.refusals import refuse_in_handlers

MODEL = "a-model"
Line = tuple[str, dict[str, Any]]
_ONE_TOKEN: dict[str, Any] = {
    "output_strs": ["x"],
    "output_ids": [array("q", [5])],
    "completion_tokens": [1],
    "reasoning_tokens": [0],
    "output_hidden_states": None,
    "routed_experts": None,
    "indexer_topk": None,
    "output_token_entropy_val": None,
    "output_token_sampling_mask": None,
}


class AnsweringScheduler:
    """Reads what it is sent as SGLang's does, and answers with one token, or a vector of two.

    `deadly` has what would have ended a real one, `tags` the plan of each planned request.
    """

    def __init__(self, manager: Any, vocab_size: int) -> None:
        self._manager = manager
        self._vocab_size = vocab_size
        self._taken: Counter[str] = Counter({side.value: 0 for side in Side})
        self.executor: BlendExecutor | None = None
        self.deadly: list[str] = []
        self.tags: list[PlanTag] = []
        self._answers: set[asyncio.Future[None]] = set()

    def dispatch(self, sent: Any) -> None:
        for request in getattr(sent, "batch", [sent]):
            if not hasattr(request, "sampling_params"):
                continue
            # Time stamps are an object of SGLang's own, and not read here.
            light = msgspec.structs.replace(request, time_stats=None)
            received = io_struct.msgpack_decode(io_struct.msgpack_encode(light))
            self._look(received)
            asyncio.get_running_loop().call_soon(self._answer, received)

    def _look(self, request: Any) -> None:
        params = request.sampling_params
        tokens = [*request.input_ids, *(params.stop_token_ids or ())]
        tokens += [int(token) for token in params.logit_bias or ()]
        if not len(request.input_ids) or not all(0 <= t < self._vocab_size for t in tokens):
            self.deadly.append(f"tokens {tokens[:5]}")
        if not 0 <= getattr(request, "top_logprobs_num", 0) <= self._vocab_size:
            self.deadly.append(f"top_logprobs_num {request.top_logprobs_num}")
        for name in ("top_k", "min_new_tokens"):
            if not 0 <= getattr(params, name) < 2**31:
                self.deadly.append(f"{name} {getattr(params, name)}")
        tag = PlanTag.from_params(params.custom_params)
        self.tags += [tag] if tag is not None else []
        if tag is not None and self.executor is not None:
            self._taken[tag.side.value] += 1
            queued = {side.value: 0 for side in Side}
            self.executor._on_report(SchedulerReport(taken=dict(self._taken), queued=queued))

    def _answer(self, request: Any) -> None:
        embeds = isinstance(request, io_struct.TokenizedEmbeddingReqInput)
        kind = io_struct.BatchEmbeddingOutput if embeds else io_struct.BatchStrOutput
        fields = msgspec.structs.fields(kind)
        values: dict[str, Any] = {field.name: [[]] for field in fields if field.required}
        values |= {
            "rids": [request.rid],
            "finished_reasons": [{"type": "length", "length": 1}],
            "prompt_tokens": [len(request.input_ids)],
            "cached_tokens": [0],
            "retraction_counts": [0],
        }
        values |= {"embeddings": [[0.5, 0.25]]} if embeds else dict(_ONE_TOKEN)
        answer = asyncio.ensure_future(self._manager._handle_batch_output(kind(**values)))
        self._answers.add(answer)
        answer.add_done_callback(self._answers.discard)


class Lines:
    """A file of lines, as far as a job sees it."""

    def __init__(self, lines: Sequence[Line]) -> None:
        self.lines = lines
        self.path = Path("/nowhere")
        self.max_line_bytes = 1 << 20

    def __len__(self) -> int:
        return len(self.lines)

    def read(self, index: int) -> BatchLine:
        url, body = self.lines[index]
        return BatchLine(index, f"line-{index}", url, {"model": MODEL, **body})


class WholeServer:
    """The server, and jobs on it."""

    def __init__(self, executor: BlendExecutor, scheduler: AnsweringScheduler) -> None:
        self.executor = executor
        self.scheduler = scheduler

    async def run(self, lines: Sequence[Line]) -> list[LineResult]:
        """All answers to the lines of one job."""
        results = self.executor.run(
            uuid.uuid4().hex, Lines(lines), range(len(lines)), on_start=lambda _: None
        )
        async with aclosing(results) as stream:  # type: ignore[type-var]
            return [result async for result in stream]

    async def ask(self, url: str, body: dict[str, Any], **headers: str) -> httpx.Response:
        """What a client is answered that asks online."""
        transport = httpx.ASGITransport(app=http_server.app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://engine") as client:
            return await client.post(url, json={"model": MODEL, **body}, headers=headers)


@contextmanager
def whole_server(model_path: str, *, embeds: bool = False) -> Iterator[WholeServer]:
    """A server of a model of which only configuration and tokenizer are read."""
    before = runtime_context.snapshot_context()
    flags = ["--device", "cpu", "--dtype", "float32", "--served-model-name", MODEL]
    flags += ["--is-embedding"] if embeds else []
    args = prepare_server_args(["--model-path", model_path, *flags])
    runtime_context.publish(args, role="tokenizer")
    manager = TokenizerManager(args, PortArgs.init_new(args))
    # Nothing comes over the socket, and the signals stay with the test.
    manager.auto_create_handle_loop = lambda: None
    templates = TemplateManager()
    templates.initialize_templates(
        tokenizer_manager=manager,
        model_path=model_path,
        chat_template=None,
        completion_template=None,
    )
    manager.max_req_input_len = manager.context_len
    app = http_server.app
    http_server.set_global_state(
        http_server._GlobalState(
            tokenizer_manager=manager, template_manager=templates, scheduler_info={}
        )
    )
    app.state.openai_serving_chat = OpenAIServingChat(manager, templates)
    app.state.openai_serving_completion = OpenAIServingCompletion(manager, templates)
    app.state.openai_serving_embedding = OpenAIServingEmbedding(manager, templates)
    app.state.openai_serving_classify = OpenAIServingClassify(manager, templates)
    app.state.openai_serving_rerank = OpenAIServingRerank(manager, templates)
    app.state.openai_serving_score = OpenAIServingScore(manager)
    app.state.openai_serving_responses = OpenAIServingResponses(
        manager, templates, enable_prompt_tokens_details=True, tool_server=None
    )
    scheduler = AnsweringScheduler(manager, manager.model_config.vocab_size)
    manager._dispatch_to_scheduler = scheduler.dispatch
    middleware = list(app.user_middleware)
    settings = Settings(feedback_address=f"ipc://@test-{uuid.uuid4().hex}")
    executor = BlendExecutor(app, args, manager, settings, None)
    scheduler.executor = executor
    refuse_in_handlers(app.state)
    try:
        yield WholeServer(executor, scheduler)
    finally:
        executor._planner.close()
        # The one application of this process, as the next server would have it.
        app.user_middleware, app.middleware_stack = middleware, None
        runtime_context.restore_context(before)
