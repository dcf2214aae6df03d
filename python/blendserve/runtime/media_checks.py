"""What a request's pictures, videos and sounds may be, where SGLang has no check of its own.

SGLang leaves out, without a word, what a model or its chat template has no place for. A picture is
decoded whole whatever its header says.
"""

from __future__ import annotations

import functools
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

from blendserve.runtime.media_parts import AUDIO, IMAGE, VIDEO, reading_processor, size_by_url

_FIELDS = {IMAGE: "image_data", VIDEO: "video_data", AUDIO: "audio_data"}
_NAMES = {IMAGE: "pictures", VIDEO: "videos", AUDIO: "sounds"}
_PARTS = {
    "image_url": IMAGE,
    "input_image": IMAGE,
    "video_url": VIDEO,
    "audio_url": AUDIO,
    "input_audio": AUDIO,
}
# What SGLang fetches, or takes for base64 or a path, is its own to read.
_READ_HERE = ("data:", "file://")


def kinds_read(tokenizer_manager: Any) -> frozenset[str]:
    """The kinds of media that the served model takes."""
    config, processor = tokenizer_manager.model_config, tokenizer_manager.mm_processor
    if processor is None:
        return frozenset()
    tokens = getattr(reading_processor(processor), "mm_tokens", None)
    kinds = {IMAGE, VIDEO}
    if tokens is not None:
        kinds = {
            kind
            for kind in (IMAGE, VIDEO)
            if getattr(tokens, f"{kind}_token") or getattr(tokens, f"{kind}_token_id") is not None
        }
    return frozenset(
        kinds | {AUDIO} if getattr(config, "is_audio_understandable_model", True) else kinds
    )


def check_media(request: Any, kinds: frozenset[str]) -> None:
    """Check what a request brings before anything is decoded.

    Args:
        request: SGLang's GenerateReqInput or EmbeddingReqInput, as a route made it.
        kinds: that the model takes.

    Raises:
        ValueError: the model does not take a part, or it is not what it says.
    """
    for kind, field in _FIELDS.items():
        for number, source in enumerate(_flat(getattr(request, field, None)), start=1):
            if kind not in kinds:
                raise ValueError(f"This model takes no {_NAMES[kind]}; leave them out.")
            url = source if isinstance(source, str) else getattr(source, "url", None)
            if kind == IMAGE and isinstance(url, str) and url.startswith(_READ_HERE):
                size_by_url(url, f"Picture {number}")


def checking_media(
    generate: Callable[..., AsyncIterator[Any]], kinds: frozenset[str]
) -> Callable[..., AsyncIterator[Any]]:
    """SGLang's ``TokenizerManager.generate_request``, which refuses such requests."""

    async def generate_request(obj: Any, *args: Any, **kwargs: Any) -> AsyncIterator[Any]:
        check_media(obj, kinds)
        async for output in generate(obj, *args, **kwargs):
            yield output

    return generate_request


def keeping_media(convert: Callable[..., Any]) -> Callable[..., Any]:
    """The ``_convert_to_internal_request`` of SGLang's chat handler, which drops no part."""

    @functools.wraps(convert)
    def convert_to_internal_request(request: Any, *args: Any, **kwargs: Any) -> Any:
        made = convert(request, *args, **kwargs)
        given = list(_kinds_of(request))
        for kind, field in _FIELDS.items():
            if len(list(_flat(getattr(made[0], field, None)))) < given.count(kind):
                raise ValueError(
                    f"The model's chat template has no place for {_NAMES[kind]}; serve it with "
                    "one that has (--chat-template)."
                )
        return made

    return convert_to_internal_request


def _kinds_of(request: Any) -> Iterator[str]:
    for message in getattr(request, "messages", ()):
        content = getattr(message, "content", None)
        for part in content if isinstance(content, list) else ():
            if (kind := _PARTS.get(getattr(part, "type", ""))) is not None:
                yield kind


def _flat(data: Any) -> Iterator[Any]:
    if isinstance(data, list | tuple):
        for one in data:
            yield from _flat(one)
    elif data is not None:
        yield data
