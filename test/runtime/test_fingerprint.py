"""Which engine this is: what answers depend on changes it, and nothing else does."""

from __future__ import annotations

import json
import os
import shutil
import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from blendserve.runtime.fingerprint import fingerprint

TENSOR_BYTES, TENSORS = 4_096, 40


def write_weights(path: Path, fill: int = 0, changed: int | None = None) -> None:
    """As safetensors lays them out; `changed`: a tensor with other values."""
    header = json.dumps(
        {
            f"layer.{i}": {
                "dtype": "U8",
                "shape": [TENSOR_BYTES],
                "data_offsets": [i * TENSOR_BYTES, (i + 1) * TENSOR_BYTES],
            }
            for i in range(TENSORS)
        }
    ).encode()
    blocks = [bytes([fill + (i == changed)]) * TENSOR_BYTES for i in range(TENSORS)]
    path.write_bytes(struct.pack("<Q", len(header)) + header + b"".join(blocks))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    config = {"hidden_size": 64, "transformers_version": "5.12.1", "_name_or_path": "/here"}
    (folder / "config.json").write_text(json.dumps({**config, "text_config": dict(config)}))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "README.md").write_text("about it")
    write_weights(folder / "model.safetensors")
    return folder


def arguments(model: Path, **changes: Any) -> Any:
    names = ("revision", "quantization", "chat_template", "tool_call_parser", "reasoning_parser")
    plain: dict[str, Any] = dict.fromkeys(names)
    paths = {"model_path": str(model), "tokenizer_path": str(model)}
    return SimpleNamespace(**{**plain, **paths, "kv_cache_dtype": "auto", **changes})


def of(model: Path, *, dtype: str = "torch.float32", **changes: Any) -> str:
    return fingerprint(arguments(model, **changes), str(model), "served", dtype)


def test_a_copy_elsewhere_at_another_time_is_the_same_engine(model: Path) -> None:
    copy = shutil.copytree(model, model.with_name("copy"))
    for path in copy.iterdir():
        os.utime(path, (1, 1))
    config = (copy / "config.json").read_text()
    (copy / "config.json").write_text(config.replace("5.12.1", "6.0.0").replace("/here", "/x"))
    (copy / "README.md").write_text("about the copy")
    assert of(copy) == of(model)
    assert of(model).startswith("served@")


def retrained(model: Path) -> dict[str, Any]:
    write_weights(model / "model.safetensors", changed=17)
    return {}


def other_template(model: Path) -> dict[str, Any]:
    (model / "chat_template.jinja").write_text("{{ messages[0] }}")
    return {}


def other_tokenizer(model: Path) -> dict[str, Any]:
    (model / "tokenizer.json").write_text('{"added": 1}')
    return {}


def other_shape(model: Path) -> dict[str, Any]:
    (model / "config.json").write_text('{"hidden_size": 128}')
    return {}


def template_file(model: Path) -> dict[str, Any]:
    path = model.with_name("mine.jinja")
    path.write_text("{{ messages[1] }}")
    return {"chat_template": str(path)}


def adapter(model: Path) -> dict[str, Any]:
    folder = model.with_name("adapter")
    folder.mkdir()
    write_weights(folder / "adapter_model.safetensors")
    return {"lora_paths": [SimpleNamespace(lora_name="a", lora_path=str(folder))]}


@pytest.mark.parametrize(
    "change",
    [
        retrained,
        other_template,
        other_tokenizer,
        other_shape,
        template_file,
        adapter,
        lambda _: {"kv_cache_dtype": "fp8_e5m2"},
        lambda _: {"quantization": "fp8"},
        lambda _: {"tool_call_parser": "qwen25"},
        lambda _: {"reasoning_parser": "deepseek-r1"},
        lambda _: {"revision": "abc"},
        lambda _: {"dtype": "torch.float16"},
    ],
)
def test_what_answers_depend_on_makes_another_engine(model: Path, change: Any) -> None:
    before = of(model)
    assert of(model, **change(model)) != before


def test_an_adapter_trained_further_is_another_one(model: Path) -> None:
    loaded = adapter(model)
    before = of(model, **loaded)
    write_weights(model.with_name("adapter") / "adapter_model.safetensors", changed=3)
    assert of(model, **loaded) != before


def test_a_template_file_counts_by_what_is_in_it(model: Path) -> None:
    given = template_file(model)
    moved = Path(given["chat_template"]).rename(model.with_name("moved.jinja"))
    before = of(model, chat_template=str(moved))
    again = moved.rename(given["chat_template"])
    assert of(model, chat_template=str(again)) == before


@pytest.mark.parametrize("damage", [b"", b"short", struct.pack("<Q", 4) + b"[1]x" + b"y" * 999])
def test_a_file_that_is_no_safetensors_is_sampled_as_it_is(model: Path, damage: bytes) -> None:
    before = of(model)
    (model / "model.safetensors").write_bytes(damage)
    assert of(model) != before


def test_a_model_that_is_not_on_this_disk_counts_by_its_name() -> None:
    nowhere = Path("no-such-owner") / "no-such-model"
    assert of(nowhere) != of(nowhere.with_name("another"))
    assert of(nowhere) == of(nowhere)
