"""What the planner needs to know of a request: its tokens, and how much it may answer.

The server's own handlers turn a body into the engine's request, so that the planner sees the very
tokens that the engine will see.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sglang.srt.entrypoints.openai.protocol import (
    ChatCompletionRequest,
    ClassifyRequest,
    CompletionRequest,
    EmbeddingRequest,
    ScoringRequest,
    V1RerankReqInput,
)
from sglang.srt.managers.io_struct import EmbeddingReqInput, GenerateReqInput

from blendserve.batch.errors import reason_of
from blendserve.runtime.media import MediaReader
from blendserve.runtime.media_parts import reading_processor
from blendserve.runtime.prompt_data import MediaRun, Prompt, UnreadablePrompt
from blendserve.runtime.request_checks import MAX_SEQUENCES

__all__ = ["Prompt", "PromptReader", "UnreadablePrompt"]

logger = logging.getLogger(__name__)

# A processor that is given a blank picture has an answer in a few milliseconds to a second.
_PROBE_SECONDS = 60.0
# SGLang's handlers and request classes of lines without output tokens.
_PREFILL_ONLY: Mapping[str, tuple[str, Any]] = {
    "/v1/embeddings": ("openai_serving_embedding", EmbeddingRequest),
    "/v1/classify": ("openai_serving_classify", ClassifyRequest),
    "/v1/rerank": ("openai_serving_rerank", V1RerankReqInput),
    "/v1/score": ("openai_serving_score", ScoringRequest),
}


class PromptReader:
    """Reads bodies of lines. Safe to call from a worker thread.

    Args:
        app: SGLang's HTTP application, whose state holds its handlers once it has started.
        tokenizer_manager: SGLang's tokenizer manager.
    """

    def __init__(self, app: Any, tokenizer_manager: Any) -> None:
        self._app = app
        self._tokenizer_manager = tokenizer_manager
        self._tokenizer = tokenizer_manager.tokenizer
        self._media: MediaReader | None = None
        self._context_length = int(tokenizer_manager.model_config.context_len)
        self._vocab_size = int(tokenizer_manager.model_config.vocab_size)
        self._one_replica = int(tokenizer_manager.server_args.dp_size or 1) == 1

    def probe_on(self, loop: asyncio.AbstractEventLoop) -> None:
        """Plan pictures from now on, with SGLang's processor, which runs on its event loop."""
        processor = self._tokenizer_manager.mm_processor
        if processor is None or not hasattr(reading_processor(processor), "mm_tokens"):
            return

        def process(kind: str, text: str, sources: Sequence[Any]) -> Any:
            request = GenerateReqInput(text=text, **{f"{kind}_data": list(sources)})
            made = processor.process_mm_data_async(
                image_data=request.image_data,
                audio_data=request.audio_data,
                input_text=text,
                request_obj=request,
                max_req_input_len=self._tokenizer_manager.max_req_input_len,
            )
            waiting = asyncio.run_coroutine_threadsafe(made, loop)
            try:
                return waiting.result(_PROBE_SECONDS)
            finally:
                waiting.cancel()

        try:
            self._media = MediaReader(processor, process)
        except Exception as error:
            # Of any type: it looks into SGLang's processor, of which there are forty.
            logger.warning("lines with pictures are not planned: %s", reason_of(error))

    def read(self, url: str, body: Mapping[str, Any]) -> Prompt:
        """Tokenise one body.

        Raises:
            UnreadablePrompt: the body is one that the server refuses or that has no plain tokens.
            Exception: of any type, out of SGLang's handlers: a body that it does not foresee.
        """
        if url == "/generate":
            return self._prompt(GenerateReqInput(**body))
        if url == "/v1/chat/completions":
            handler = self._app.state.openai_serving_chat
            request: Any = ChatCompletionRequest(**body)
        elif url == "/v1/completions":
            handler = self._app.state.openai_serving_completion
            request = CompletionRequest(**body)
        elif url in _PREFILL_ONLY:
            return self._prefill_only(url, body)
        else:
            raise UnreadablePrompt(f"{url} has no prompt to plan with")
        if (fault := handler._validate_request(request)) is not None:
            raise UnreadablePrompt(fault)
        return self._prompt(handler._convert_to_internal_request(request, None)[0])

    def _prefill_only(self, url: str, body: Mapping[str, Any]) -> Prompt:
        """A line whose answer is a vector, a label or numbers: no token is generated."""
        name, kind = _PREFILL_ONLY[url]
        handler = getattr(self._app.state, name)
        request = kind(**body)
        if (fault := handler._validate_request(request)) is not None:
            raise UnreadablePrompt(fault)
        if url == "/v1/score":
            token_ids, prompts = self._scored(request)
        else:
            adapted = handler._convert_to_internal_request(request, None)[0]
            if not self._one_replica or not isinstance(adapted, EmbeddingReqInput):
                # SGLang's class has no field for the replica; or it makes its prompts later.
                raise UnreadablePrompt(f"this body of {url} is not planned")
            if adapted.image_data or adapted.video_data or adapted.audio_data:
                raise UnreadablePrompt("embeddings of pictures are not planned")
            token_ids, prompts = self._token_ids(adapted)
        return Prompt(token_ids, max_output_tokens=0, ignore_eos=True, sequences=prompts)

    def _scored(self, request: Any) -> tuple[NDArray[np.int32], int]:
        """Tokens of the first item with its query, and how many items there are."""
        args = self._tokenizer_manager.server_args
        # As releases before 0.5.21 call it.
        delimiter = getattr(args, "multi_item_scoring_delimiter", None)
        if getattr(args, "enable_mis", False) or delimiter is not None:
            raise UnreadablePrompt("all items of a line are one prompt on this server")
        items = [request.items] if isinstance(request.items, str) else request.items
        if not items:
            raise UnreadablePrompt("there is no item")
        item = items[0]
        query = type(item)() if request.query is None else request.query
        if type(query) is not type(item):
            raise UnreadablePrompt("query and items are to be texts, or token ids")
        whole = item + query if request.item_first else query + item
        return self._planned_ids(whole if isinstance(whole, list) else self._encode(whole)), len(
            items
        )

    def _prompt(self, adapted: Any) -> Prompt:
        media: Sequence[MediaRun] = ()
        if adapted.image_data or adapted.audio_data or adapted.video_data:
            if self._media is None:
                raise UnreadablePrompt("this server does not plan prompts with pictures")
            (token_ids, media), prompts = self._media.read(adapted), 1
        else:
            token_ids, prompts = self._token_ids(adapted)
        sampling = adapted.sampling_params or {}
        n = 1 if sampling.get("n") is None else sampling["n"]
        if not 1 <= n <= MAX_SEQUENCES:
            raise UnreadablePrompt(f"n is {n}")
        room = max(self._context_length - len(token_ids) - 1, 0)
        limit = sampling.get("max_new_tokens")
        if limit is not None and limit < 0:
            raise UnreadablePrompt(f"max_new_tokens is {limit}")
        return Prompt(
            token_ids=token_ids,
            max_output_tokens=room if limit is None else min(limit, room),
            ignore_eos=bool(sampling.get("ignore_eos")),
            sequences=prompts * (1 if n == 1 else n + 1),
            media=media,
        )

    def _token_ids(self, adapted: Any) -> tuple[NDArray[np.int32], int]:
        """Tokens of the (first) prompt, and how many prompts there are."""
        ids, text = adapted.input_ids, adapted.text
        count = 1
        if isinstance(text, list):
            count, text = len(text), text[0]
        elif ids and isinstance(ids[0], list):
            count, ids = len(ids), ids[0]
        if ids is None:
            ids = self._encode(text)
        return self._planned_ids(ids), count

    def _encode(self, text: Any) -> Any:
        # A pair of texts is what a cross encoder reads.
        return self._tokenizer.encode(*([text] if isinstance(text, str) else text))

    def _planned_ids(self, ids: Any) -> NDArray[np.int32]:
        if not all(0 <= token < self._vocab_size for token in ids):
            raise UnreadablePrompt("the prompt has tokens that the vocabulary has not")
        return np.asarray(ids, dtype=np.int32)
