"""What the planner needs to know of a request: its tokens, and how much it may answer.

The server's own handlers turn a body into the engine's request, so that the planner sees the very
tokens that the engine will see.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sglang.srt.entrypoints.openai.protocol import ChatCompletionRequest, CompletionRequest

from blendserve.runtime.prompt_data import Prompt, UnreadablePrompt
from blendserve.runtime.request_checks import MAX_SEQUENCES

__all__ = ["Prompt", "PromptReader", "UnreadablePrompt"]


class PromptReader:
    """Reads bodies of lines. Safe to call from a worker thread.

    Args:
        app: SGLang's HTTP application, whose state holds its handlers once it has started.
        tokenizer_manager: SGLang's tokenizer manager.
    """

    def __init__(self, app: Any, tokenizer_manager: Any) -> None:
        self._app = app
        self._tokenizer = tokenizer_manager.tokenizer
        self._context_length = int(tokenizer_manager.model_config.context_len)
        self._vocab_size = int(tokenizer_manager.model_config.vocab_size)

    def read(self, url: str, body: Mapping[str, Any]) -> Prompt:
        """Tokenise one body.

        Raises:
            UnreadablePrompt: the body is one that the server refuses or that has no plain tokens.
            Exception: of any type, out of SGLang's handlers: a body that it does not foresee.
        """
        if url == "/v1/chat/completions":
            handler = self._app.state.openai_serving_chat
            request: Any = ChatCompletionRequest(**body)
        elif url == "/v1/completions":
            handler = self._app.state.openai_serving_completion
            request = CompletionRequest(**body)
        else:
            raise UnreadablePrompt(f"{url} has no prompt to plan with")
        if (fault := handler._validate_request(request)) is not None:
            raise UnreadablePrompt(fault)
        adapted, _ = handler._convert_to_internal_request(request, None)
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
        )

    def _token_ids(self, adapted: Any) -> tuple[NDArray[np.int32], int]:
        """Tokens of the (first) prompt, and how many prompts there are."""
        if adapted.image_data or adapted.audio_data or adapted.video_data:
            raise UnreadablePrompt("a prompt with images, audio or video is not planned")
        ids, text = adapted.input_ids, adapted.text
        count = 1
        if isinstance(text, list):
            count, text = len(text), text[0]
        elif ids and isinstance(ids[0], list):
            count, ids = len(ids), ids[0]
        if ids is None:
            ids = self._tokenizer.encode(text)
        if not all(0 <= token < self._vocab_size for token in ids):
            raise UnreadablePrompt("the prompt has tokens that the vocabulary has not")
        return np.asarray(ids, dtype=np.int32), count
