"""Prompts with pictures: what is planned is what the model's own processor makes of them."""

from __future__ import annotations

import base64
import io
import random
import re
import struct
import sys
import zlib
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "end_to_end"))

import tiny_vlm

from blendserve.planner import CostModel, ModelSpec, PlannerConfig, hardware
from blendserve.runtime import media as media_module
from blendserve.runtime.job_prompts import _batch
from blendserve.runtime.media import MediaReader, MediaRun
from blendserve.runtime.media_checks import check_media, keeping_media
from blendserve.runtime.media_parts import UnreadableMedia, parts_of
from blendserve.runtime.plan_worker import News, PlanWorker
from blendserve.runtime.prompts import Prompt

QWEN, GEMMA = "<|vision_start|><|image_pad|><|vision_end|>", "<start_of_image>"
ONE = frozenset({"image"})
SIZES = ((14, 14), (60, 45), (112, 112), (150, 40), (40, 150), (336, 200))


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def data_url(content: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(content).decode()


def noise(width: int, height: int, seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def request(text="", images=(), audio=None, video=None):
    return SimpleNamespace(
        text=text, image_data=list(images) or None, audio_data=audio, video_data=video
    )


class Tokens:
    """SGLang's MultimodalSpecialTokens of a model that has pictures only."""

    def __init__(self, placeholder: str) -> None:
        self.placeholder = placeholder

    def get_combined_regex(self):
        return re.compile("(" + re.escape(self.placeholder) + ")")

    def get_modality_of_token(self, token):
        return SimpleNamespace(name="IMAGE") if token == self.placeholder else None


class Processor:
    """The model's real processor, as SGLang has it in its hands."""

    smart_rgb_conversion = False

    def __init__(self, family: str, folder: Path) -> None:
        from transformers import AutoConfig, AutoProcessor

        tiny_vlm.build(family, folder, weights=False)
        self.real = AutoProcessor.from_pretrained(folder)
        self.hf_config = AutoConfig.from_pretrained(folder)
        self._tokenizer = self.real.tokenizer
        self._tokenizer_auto_adds_specials = False
        self.mm_tokens = Tokens(GEMMA if family == "gemma3" else QWEN)
        config = self.hf_config
        self.token = getattr(config, "image_token_id", None) or config.image_token_index
        self.runs = 0

    def process(self, kind, text, sources):
        self.runs += 1
        urls = [source if isinstance(source, str) else source.url for source in sources]
        images = [base64.b64decode(url.partition(",")[2]) for url in urls]
        return self.on_images(text, [Image.open(io.BytesIO(one)).convert("RGB") for one in images])

    def on_images(self, text, images):
        made = self.real(text=[text], images=[images], return_tensors="pt")
        ids = made["input_ids"][0].tolist()
        offsets, at = [], 0
        for token, run in groupby(ids):
            length = len(list(run))
            if token == self.token:
                offsets.append((at, at + length - 1))
            at += length
        item = SimpleNamespace(offsets=offsets, feature=made["pixel_values"])
        return SimpleNamespace(input_ids=ids, mm_items=[item])

    def resolve_image_token_counts(self, images):
        sizes = [(image.height, image.width) for image in images]
        return self.real._get_num_multimodal_tokens(image_sizes=sizes).num_image_tokens


@pytest.fixture(scope="module", params=["qwen2-vl", "gemma3"])
def processor(request, tmp_path_factory):
    return Processor(request.param, tmp_path_factory.mktemp("model") / "model")


@pytest.fixture
def reader(processor):
    return MediaReader(processor, processor.process)


def test_planned_tokens_are_those_of_the_processor(processor, reader):
    rng = random.Random(0)
    mark = processor.mm_tokens.placeholder
    for number, size in enumerate(SIZES):
        for count in (1, 2, 3):
            sizes = [size, *rng.choices(SIZES, k=count - 1)]
            images = [noise(*one, seed=number * 3 + k) for k, one in enumerate(sizes)]
            layouts = (
                f"What?\n\n{mark * count}",
                f"{mark}\n\n a{mark * (count - 1)}",
                mark * count,
            )
            for text in (f"user: {layout} why?\nassistant: " for layout in layouts):
                ids, runs = reader.read(request(text, [data_url(encoded(one)) for one in images]))
                made = processor.on_images(text, images)
                of_text = ids < 1_000_000
                assert len(ids) == len(made.input_ids)
                assert ids[of_text].tolist() == np.array(made.input_ids)[of_text].tolist()
                assert set(np.array(made.input_ids)[~of_text]) == {processor.token}
                (item,) = made.mm_items
                assert [run.end - 1 for run in runs][-1] == item.offsets[-1][1]
                whole = sum(run.patches for run in runs) * reader._probe.patch_elements
                assert whole == item.feature.numel()


def test_a_size_is_learnt_once(processor, reader):
    mark = processor.mm_tokens.placeholder
    before = processor.runs
    for seed in range(5):
        reader.read(request(f"{mark}{seed}", [data_url(encoded(noise(64, 48, seed)))]))
    assert processor.runs == before + 1


def test_the_formula_takes_over_where_it_was_right(processor, reader, monkeypatch):
    monkeypatch.setattr(media_module, "_LEARNT", 3)
    mark = processor.mm_tokens.placeholder
    before = processor.runs
    for side in range(30, 300, 30):
        image = noise(side, 2 * side, side)
        ids, _ = reader.read(request(f"a {mark}", [data_url(encoded(image))]))
        assert len(ids) == len(processor.on_images(f"a {mark}", [image]).input_ids)
    assert processor.runs == before + 3


def test_prompts_share_up_to_the_end_of_the_same_picture(processor, reader):
    mark = processor.mm_tokens.placeholder
    cat, dog = (data_url(encoded(noise(112, 112, seed))) for seed in (1, 2))

    def read(question, *urls):
        return reader.read(request(f"user: {mark * len(urls)} {question}", urls))

    def shared(one, other):
        same = np.asarray(one[: min(len(one), len(other))]) == other[: min(len(one), len(other))]
        return int(np.argmin(same)) if not same.all() else len(same)

    (first, (run,)), (second, _), (third, _) = read("What?", cat), read("Why?", cat), read("Y", dog)
    assert shared(first, second) >= run.end
    assert shared(first, third) == np.flatnonzero(first >= 1_000_000)[0]
    both, runs = read("What?", cat, dog)
    assert shared(first, both) >= run.end == runs[0].end


def test_placeholders_and_pictures_must_match(processor, reader):
    url = data_url(encoded(noise(28, 28, 0)))
    mark = processor.mm_tokens.placeholder
    with pytest.raises(UnreadableMedia, match="no place"):
        reader.read(request("no placeholder", [url]))
    with pytest.raises(UnreadableMedia, match="more placeholders"):
        reader.read(request(mark * 2, [url]))
    with pytest.raises(UnreadableMedia, match="not planned"):
        reader.read(request(mark, [url], audio=["data:audio/wav;base64,AA"]))


def test_a_processor_that_fails_leaves_the_lines_unplanned(processor):
    def fail(kind, text, sources):
        raise RuntimeError("no such size")

    mark = processor.mm_tokens.placeholder
    reader = MediaReader(processor, fail)
    for _ in range(2):
        with pytest.raises(UnreadableMedia, match="cannot be learnt"):
            reader.read(request(mark, [data_url(encoded(noise(28, 28, 0)))]))


# -- bad media: no model is asked


def png(width: int, height: int, rows: bytes = b"") -> bytes:
    """A PNG with this header, of any size, whose pixels are the rows."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        whole = kind + data
        return struct.pack(">I", len(data)) + whole + struct.pack(">I", zlib.crc32(whole))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    ends = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + ends


BAD = {
    "no picture": (b"hello", "no readable picture"),
    "empty": (b"", "no readable picture"),
    "half a header": (encoded(noise(30, 30, 0))[:20], "no readable picture"),
    "no pixels": (png(0, 0), "."),
    "100 megapixels": (png(10_000, 10_000), "10000 x 10000 pixels"),
    "a bomb": (png(60_000, 60_000), "."),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_picture_is_refused_by_its_header(name):
    content, said = BAD[name]
    good = data_url(encoded(noise(30, 30, 0)))
    with pytest.raises(ValueError, match=f"(?i)picture 2.*{said}"):
        check_media(request(images=[good, data_url(content)]), ONE)
    with pytest.raises(UnreadableMedia, match="image 2"):
        list(parts_of(request(images=[good, data_url(content)])))


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("data:image/png;base64,!!!!", "base64"),
        ("data:image/png,abc", "base64"),
        ("file:///no/such/file.png", "No such file"),
    ],
)
def test_a_bad_url_is_refused(url, said):
    with pytest.raises(ValueError, match=said):
        check_media(request(images=[url]), ONE)


def test_what_sglang_reads_in_its_own_way_is_left_to_it():
    check_media(
        request(images=["iVBORw0KGgo=", "/a/path.png", {"format": "processor_output"}]), ONE
    )
    check_media(request(images=["https://media.example/a.png"]), ONE)


def test_a_size_may_stand_behind_much_else():
    """A JPEG with 600 KB of other segments before its size."""
    whole = encoded(noise(20, 10, 0), "JPEG")
    much = b"".join(b"\xff\xe5" + struct.pack(">H", 60_002) + bytes(60_000) for _ in range(10))
    check_media(request(images=[data_url(whole[:2] + much + whole[2:])]), ONE)
    with pytest.raises(ValueError, match="no readable picture"):
        check_media(request(images=[data_url(whole[:2] + much)]), ONE)


def test_odd_pictures_are_taken():
    frames = [noise(20, 10, seed) for seed in range(3)]
    odd = (
        encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        encoded(noise(20, 10, 0).convert("CMYK"), "JPEG"),
        encoded(Image.fromarray(np.zeros((10, 20), dtype=np.uint16))),
        encoded(noise(20, 10, 0).convert("P")),
        encoded(noise(20, 10, 0), "WEBP"),
    )
    asked = request(images=[data_url(one) for one in odd])
    check_media(asked, ONE)
    assert [part.size for part in parts_of(asked)] == [(10, 20)] * len(odd)


def test_turned_pictures_have_their_sides_changed():
    exif = Image.Exif()
    exif[0x0112] = 6
    url = data_url(encoded(noise(20, 10, 0), "JPEG", exif=exif))
    assert [part.size for part in parts_of(request(images=[url]))] == [(10, 20)]
    assert [part.size for part in parts_of(request(images=[url]), turns=True)] == [(20, 10)]


def test_what_a_model_cannot_take_is_refused():
    with pytest.raises(ValueError, match="takes no sounds"):
        check_media(request(audio=["data:audio/wav;base64,AA"]), ONE)
    with pytest.raises(ValueError, match="takes no videos"):
        check_media(request(video=["data:video/mp4;base64,AA"]), ONE)
    check_media(request(audio=["data:audio/wav;base64,AA"]), frozenset({"audio"}))


def test_a_part_that_the_template_drops_is_refused():
    def convert(body, raw):
        return request("hello"), body

    part = SimpleNamespace(type="image_url")
    body = SimpleNamespace(messages=[SimpleNamespace(content=[part])])
    with pytest.raises(ValueError, match="no place for pictures"):
        keeping_media(convert)(body, None)
    plain = SimpleNamespace(messages=[SimpleNamespace(content="hello")])
    assert keeping_media(convert)(plain, None)[1] is plain


# -- from prompts to plans


def test_pictures_of_later_batches_keep_their_requests():
    config = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 1000,
        "max_position_embeddings": 4096,
        "vision_config": {"depth": 2, "hidden_size": 32, "patch_size": 14},
    }
    cost_model = CostModel(ModelSpec.from_config(config), hardware("cpu"))

    def prompt(picture, patches):
        ids = np.array([*range(5), *[1_000_000 + picture] * 10, 7], dtype=np.int32)
        return Prompt(ids, 8, True, 1, [MediaRun(15, patches)] if patches else [])

    def compute(*patches):
        worker = PlanWorker(cost_model, PlannerConfig())
        for picture, one in enumerate(patches):
            worker.append("job", _batch([prompt(picture, one)] * 2))
        return worker.plan("job", News()).compute_seconds

    plain, seen = compute(0, 0, 0), compute(50, 0, 200)
    # The two lines of a batch share their picture.
    each = (seen - plain).reshape(3, 2)
    assert each.sum(axis=1) == pytest.approx(cost_model.encoder_seconds([50, 0, 200]))


def test_what_models_look_up_when_they_are_imported_is_there():
    import torch
    import torchvision.transforms.v2  # noqa: F401

    for name in ("fused_sigmoid_mul_cpu", "fused_qk_gemma_rmsnorm_cpu"):
        assert hasattr(torch.ops.sgl_kernel, name)
    # Its presence is how SGLang knows a processor with AMX.
    assert not hasattr(torch.ops.sgl_kernel, "convert_weight_packed")
