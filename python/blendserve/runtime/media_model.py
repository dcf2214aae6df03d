"""A model's processor of pictures without an engine: what `plan` counts image lines with."""

from __future__ import annotations

import asyncio
import logging
import warnings
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from blendserve.batch.errors import cause_of
from blendserve.runtime import cpu_platform
from blendserve.runtime.media import MediaReader
from blendserve.runtime.media_parts import UnreadableMedia, reading_processor
from blendserve.runtime.prompt_data import MediaRun


class NoMediaModel(ValueError):
    """The folder has no model that SGLang serves with pictures."""


class MediaModel:
    """Reads conversations with pictures. Loading takes about half a minute: SGLang imports all its
    models to find the processor of one.

    Args:
        folder: the model's.

    Raises:
        NoMediaModel: it has no processor that SGLang knows.
    """

    def __init__(self, folder: str) -> None:
        try:
            with warnings.catch_warnings():
                # Of quantised and other models, which are only imported.
                warnings.simplefilter("ignore")
                self._processor = _load(folder)
        except Exception as error:  # Of any type: SGLang and transformers read what is in there.
            raise NoMediaModel(
                f"{folder} has no processor of pictures: {cause_of(error)}"
            ) from error
        self._loop = asyncio.new_event_loop()
        self._reader = MediaReader(self._processor, self._process)

    def read(
        self, messages: Sequence[Any], tools: list[Any] | None
    ) -> tuple[NDArray[np.int32], list[MediaRun]]:
        """Tokens of a conversation with the opening of the answer, and its pictures.

        Raises:
            UnreadableMedia: it cannot be counted, or the engine would refuse it.
        """
        images: list[Any] = []
        videos: list[Any] = []
        plain = [
            {**one, "content": _content(one.get("content"), images, videos)} for one in messages
        ]
        text = reading_processor(self._processor)._tokenizer.apply_chat_template(
            plain, tools=tools, add_generation_prompt=True, tokenize=False
        )
        request = SimpleNamespace(text=text, image_data=images, video_data=videos, audio_data=None)
        return self._reader.read(request)

    def close(self) -> None:
        """End the processor's threads."""
        reading_processor(self._processor).shutdown()
        self._loop.close()

    def _process(self, kind: str, text: str, sources: Sequence[Any]) -> Any:
        from sglang.srt.managers.io_struct import GenerateReqInput

        request = GenerateReqInput(text=text, **{f"{kind}_data": list(sources)})
        return self._loop.run_until_complete(
            self._processor.process_mm_data_async(
                image_data=request.image_data,
                audio_data=request.audio_data,
                input_text=text,
                request_obj=request,
                max_req_input_len=None,
            )
        )


def _content(content: Any, images: list[Any], videos: list[Any]) -> Any:
    """A message's content as templates have it; its media go to the lists, as SGLang does it."""
    from sglang.srt.parser.jinja_template_utils import process_content_for_template_format

    message = {"role": "user", "content": content}
    sounds: list[Any] = []
    made = process_content_for_template_format(message, "openai", images, videos, sounds, [])
    if sounds:
        raise UnreadableMedia("a prompt with sound is not planned")
    return made.get("content") or ""


def _load(folder: str) -> Any:
    cpu_platform.activate()
    logging.getLogger("sglang").setLevel(logging.ERROR)
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.managers.multimodal_processor import get_mm_processor, import_processors
    from sglang.srt.managers.tokenizer_manager import get_processor_wrapper
    from sglang.srt.runtime_context import publish
    from sglang.srt.server_args import ServerArgs

    server_args = ServerArgs(model_path=folder, enable_multimodal=True)
    publish(server_args, role="tokenizer")
    config = ModelConfig.from_server_args(server_args)
    import_processors("sglang.srt.multimodal.processors")
    return get_mm_processor(
        config.hf_config, server_args, get_processor_wrapper(), "default", model_config=config
    )
