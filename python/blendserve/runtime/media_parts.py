"""The pictures and videos of a request, as far as their headers and bytes tell.

What SGLang's handlers make of a body names each picture by a URL: `data:` with the content in
base64, or `file:` below the folder that the server was given. No pixel of a picture is decoded, and
of a video one frame where its decoder has no other way to tell its size.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

import pybase64
from PIL import Image, UnidentifiedImageError

IMAGE, VIDEO, AUDIO = "image", "video", "audio"

# As SGLang does it: ids of no vocabulary, so that its radix cache tells pictures apart by tokens.
_FIRST_ID = 1_000_000
_IDS = 1 << 30
# PIL takes more for an attack: so many pixels are 256 MiB in memory, and many more on their way.
MAX_IMAGE_PIXELS = 89_478_485
# What a picture's size is found in, with room for a thumbnail and a colour profile before it.
_HEADER_BYTES = 256 * 1024
_TURNED = (5, 6, 7, 8)  # EXIF orientations in which height and width change places.
_ORIENTATION = 0x0112


class UnreadableMedia(ValueError):
    """A part that cannot be planned, or not be served: says which and why."""


@dataclass(frozen=True)
class Part:
    """One picture, video or sound of a request.

    Attributes:
        kind: IMAGE, VIDEO or AUDIO.
        token_id: what stands for each of its tokens in the planner: equal for equal content that is
            asked for with equal options.
        size: (height, width) of an image; (frames, height, width, frames per second) of a video.
        options: what else SGLang's processor is told, as (name, value).
        source: as SGLang's handlers have it.
    """

    kind: str
    token_id: int
    size: tuple[float, ...]
    options: tuple[tuple[str, Any], ...]
    source: Any


def parts_of(adapted: Any, *, turns: bool = False) -> Iterator[Part]:
    """The parts of a request that SGLang's handlers have made, pictures first, each kind in order.

    Args:
        adapted: SGLang's GenerateReqInput.
        turns: the model's processor turns pictures as their EXIF data ask.

    Raises:
        UnreadableMedia: a part has no readable header, or is of a kind that is not planned.
    """
    if adapted.audio_data:
        raise UnreadableMedia("a prompt with sound is not planned")
    for index, source in enumerate(_listed(adapted.image_data)):
        content = content_of(url_of(source))
        height, width = image_size(content, f"image {index + 1}", turns=turns)
        options = _options(source)
        yield Part(IMAGE, _token_id(content, options), (height, width), options, source)
    for index, source in enumerate(_listed(adapted.video_data)):
        content = content_of(url_of(source))
        size = video_size(content, f"video {index + 1}")
        options = _options(source)
        yield Part(VIDEO, _token_id(content, options), size, options, source)


def reading_processor(mm_processor: Any) -> Any:
    """The processor that reads media: SGLang wraps those of LLaVA's family in another."""
    return getattr(mm_processor, "inner", mm_processor)


def url_of(source: Any) -> str:
    """The URL of what stands in a request's image_data, video_data or audio_data."""
    url = source if isinstance(source, str) else getattr(source, "url", None)
    if not isinstance(url, str):
        raise UnreadableMedia("a picture is neither a URL nor an object with one")
    return url


def content_of(url: str, most: int | None = None) -> bytes:
    """The bytes behind a data: or file: URL; of a long one no more than `most`, and a little.

    Raises:
        UnreadableMedia: it is no such URL, its base64 is wrong, or there is no such file.
    """
    if url.startswith("file://"):
        try:
            with Path(unquote(urlparse(url).path)).open("rb") as stream:
                return stream.read(-1 if most is None else most)
        except OSError as error:
            raise UnreadableMedia(f"{url[:200]}: {error.strerror or error}") from error
    head, comma, encoded = url.partition(",")
    if not head.startswith("data:") or not comma:
        raise UnreadableMedia("media must be data: URLs with a comma before the content")
    if not head.lower().endswith(";base64"):
        raise UnreadableMedia("a data: URL must hold base64: data:image/png;base64,...")
    if most is not None:
        encoded = encoded[: (most + 2) // 3 * 4]
    try:
        return pybase64.b64decode(encoded, validate=True)
    except ValueError as error:
        raise UnreadableMedia(f"the base64 of a data: URL is wrong: {error}") from error


def image_size(content: bytes, name: str, *, turns: bool = False) -> tuple[int, int]:
    """(height, width) of a picture by its header.

    Raises:
        UnreadableMedia: it is no picture that PIL knows, has no pixel, or too many.
    """
    try:
        with warnings.catch_warnings():
            # Its limit is ours, below.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(BytesIO(content)) as image:
                width, height = image.size
                if turns and "exif" in image.info:
                    turned = image.getexif().get(_ORIENTATION) in _TURNED
                    width, height = (height, width) if turned else (width, height)
    except UnidentifiedImageError as error:
        raise UnreadableMedia(
            f"{name} is no readable picture, of no format that is known"
        ) from error
    except Exception as error:  # Its readers raise whatever broken bytes make them.
        raise UnreadableMedia(f"{name} is no readable picture: {error}") from error
    if not height or not width:
        raise UnreadableMedia(f"{name} has {width} x {height} pixels")
    if height * width > MAX_IMAGE_PIXELS:
        raise UnreadableMedia(
            f"{name} has {width} x {height} pixels; no more than {MAX_IMAGE_PIXELS:,} are taken. "
            "Scale it down."
        )
    return height, width


def video_size(content: bytes, name: str) -> tuple[float, ...]:
    """(frames, height, width, frames per second) of a video, by the decoder that SGLang uses.

    Raises:
        UnreadableMedia: it cannot be decoded.
    """
    from sglang.srt.utils.video_decoder import VideoDecoderWrapper

    try:
        video = VideoDecoderWrapper(content)
        return (len(video), *video.frame_shape, float(video.avg_fps))
    except Exception as error:  # Its decoders raise types of their own.
        raise UnreadableMedia(f"{name} is no readable video: {error}") from error


def size_by_url(url: str, name: str) -> tuple[int, int]:
    """`image_size` of what is behind a data: or file: URL. Mostly only its beginning is read."""
    try:
        return image_size(content_of(url, _HEADER_BYTES), name)
    except UnreadableMedia:
        # Its size may stand behind much else, or at the end.
        return image_size(content_of(url), name)


def _listed(data: Any) -> list[Any]:
    if data is None:
        return []
    return data if isinstance(data, list) else [data]


def _options(source: Any) -> tuple[tuple[str, Any], ...]:
    names = ("detail", "max_dynamic_patch", "preprocess_kwargs")
    values = ((name, getattr(source, name, None)) for name in names)
    return tuple((name, repr(value)) for name, value in values if value not in (None, "auto", {}))


def _token_id(content: bytes, options: tuple[tuple[str, Any], ...]) -> int:
    digest = hashlib.sha256(content)
    digest.update(repr(options).encode())
    return _FIRST_ID + int.from_bytes(digest.digest()[:8], "big") % _IDS
