"""From the keys of a config.json to the shape of a transformer and its parameter counts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# Two matrices in the feed-forward block (up, down) where others have three (gate, up, down).
_UNGATED = (
    "bloom, codegen, falcon, gpt2, gpt_bigcode, gpt_neo, gpt_neox, gptj, mpt, nemotron, opt, phi, "
    "stablelm_epoch, starcoder2"
)
_TIED_BY_DEFAULT = (
    "bloom, cohere, cohere2, falcon, gemma, gemma2, gemma3, gemma3_text, gpt2, gpt_bigcode, mpt, "
    "opt"
)
_KNOWN_TYPES = (
    f"{_UNGATED}, {_TIED_BY_DEFAULT}, baichuan, deepseek, deepseek_v2, deepseek_v3, exaone, "
    "gemma3n, glm, glm4, glm4_moe, gpt_oss, granite, internlm2, internlm3, internvl_chat, "
    "kimi_k2, llama, llama4, llama4_text, llava, mimo, minicpm, minicpm3, mistral, mistral3, "
    "mixtral, mllama, olmo, olmo2, phi3, phi4mm, phimoe, qwen, qwen2, qwen2_5_vl, qwen2_moe, "
    "qwen2_5_vl_text, qwen2_vl, qwen2_vl_text, qwen3, qwen3_moe, qwen3_next, qwen3_vl, "
    "qwen3_vl_moe, qwen3_vl_moe_text, qwen3_vl_text, seed_oss, smollm3, solar, "
    "stablelm, starcoder2, yi"
)
_ACTIVE_EXPERTS = ("num_experts_per_tok", "moe_top_k", "num_experts_per_token")
# Kinds of layers in layer_types.
_FULL = ("full_attention", "attention", "global_attention")
_WINDOWED = ("sliding_attention", "chunked_attention", "local_attention")
_LINEAR = "linear_attention"
# Of every so many layers the last has full attention, where the config does not say so.
_WINDOW_PATTERNS = {"gemma2": 2, "gemma3": 6, "gemma3_text": 6, "gpt_oss": 2, "cohere2": 4}
# Models whose windows SGLang keeps in a pool of their own (is_hybrid_swa_model).
_POOLED_WINDOWS = ("gpt_oss", "llama4", "llama4_text", "gemma4", "gemma4_text", "step3p5")
# Keys of state-space, sparse and other attention.
_UNKNOWN_LAYERS = (
    *("ssm_cfg", "mamba_d_state", "mamba_num_heads", "state_size", "time_mix_extra_dim"),
    *("index_topk", "attn_type_list", "lightning_attn_config", "hybrid_override_pattern"),
)


class ModelSpecError(ValueError):
    """A config that cannot be read: names the file, the key and the remedy."""


@dataclass(frozen=True)
class MLAShape:
    """Multi-head latent attention (DeepSeek-V2 and later)."""

    kv_rank: int
    query_rank: int  # 0: queries are projected directly.
    nope_dim: int
    rope_dim: int
    value_dim: int


@dataclass(frozen=True)
class ExpertShape:
    """Mixture of experts; sparse_layers of the layers have one."""

    total: int
    active: int
    width: int
    shared_width: int
    sparse_layers: int


@dataclass(frozen=True)
class LinearShape:
    """Linear attention (gated delta rule, as in Qwen3-Next): a state of fixed size per request."""

    layers: int
    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    kernel: int

    @property
    def state_elements(self) -> int:
        """Of all layers, without the few of the convolution."""
        return self.layers * self.value_heads * self.key_dim * self.value_dim

    @property
    def width(self) -> int:
        """Columns of the input projection: queries, keys, values and the output gate."""
        return 2 * self.key_heads * self.key_dim + 2 * self.value_heads * self.value_dim


@dataclass(frozen=True)
class WindowShape:
    """Layers whose attention reaches only so many tokens back. pooled: the engine keeps no more
    of them than a pool of their own has room for (else it keeps all and reads a window)."""

    layers: int
    tokens: int
    pooled: bool


@dataclass(frozen=True)
class ModelShape:
    """The integers that parameter counts follow from."""

    hidden_size: int
    num_layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn_width: int
    ffn_matrices: int
    vocab_size: int
    tied: bool
    experts: ExpertShape | None = None
    mla: MLAShape | None = None
    window: WindowShape | None = None
    linear: LinearShape | None = None
    query_gate: bool = False  # A gate as wide as the queries beside them.

    @property
    def softmax_layers(self) -> int:
        """Layers with softmax attention, windows included."""
        return self.num_layers - (self.linear.layers if self.linear else 0)

    @property
    def full_layers(self) -> int:
        """Layers whose attention reaches the whole context."""
        return self.softmax_layers - (self.window.layers if self.window else 0)

    @property
    def attention_width(self) -> int:
        if self.mla is None:
            return self.heads * self.head_dim
        per_head = self.mla.nope_dim + self.mla.rope_dim + self.mla.value_dim
        return self.heads * per_head // 2

    @property
    def kv_elements_per_layer(self) -> int:
        """Of one token in one layer with softmax attention."""
        if self.mla is None:
            return 2 * self.kv_heads * self.head_dim
        return self.mla.kv_rank + self.mla.rope_dim


def parameter_counts(shape: ModelShape) -> tuple[int, int]:
    """(parameters a token passes through, all parameters); see ModelSpec for what counts."""
    hidden = shape.hidden_size
    dense_ffn = shape.ffn_matrices * hidden * shape.ffn_width
    # Two norms a layer, and the final one.
    active = total = (2 * shape.num_layers + 1) * hidden
    mixers = shape.softmax_layers * _attention_params(shape)
    if shape.linear:
        mixers += shape.linear.layers * _linear_params(shape.linear, hidden)
    active, total = active + mixers, total + mixers
    experts = shape.experts
    dense_layers = shape.num_layers - (experts.sparse_layers if experts else 0)
    active += dense_layers * dense_ffn
    total += dense_layers * dense_ffn
    if experts:
        expert = shape.ffn_matrices * hidden * experts.width
        always = shape.ffn_matrices * hidden * experts.shared_width + hidden * experts.total
        active += experts.sparse_layers * (experts.active * expert + always)
        total += experts.sparse_layers * (experts.total * expert + always)
    table = shape.vocab_size * hidden
    return active + table, total + (table if shape.tied else 2 * table)


def _attention_params(shape: ModelShape) -> int:
    hidden = shape.hidden_size
    mla = shape.mla
    if mla is None:
        query_heads = (3 if shape.query_gate else 2) * shape.heads
        return hidden * shape.head_dim * (query_heads + 2 * shape.kv_heads)
    query_width = shape.heads * (mla.nope_dim + mla.rope_dim)
    query = mla.query_rank * (hidden + query_width) if mla.query_rank else hidden * query_width
    down = hidden * (mla.kv_rank + mla.rope_dim)
    up = mla.kv_rank * shape.heads * (mla.nope_dim + mla.value_dim)
    return query + down + up + shape.heads * mla.value_dim * hidden


def _linear_params(linear: LinearShape, hidden: int) -> int:
    gates = 2 * linear.value_heads
    values = linear.value_heads * linear.value_dim
    return hidden * (linear.width + gates + values)


class ConfigReader:
    """Looks keys up under their many names; complains with file, key and remedy."""

    def __init__(self, config: Mapping[str, Any], source: str) -> None:
        self._outer = config
        self._config = config
        for nested in ("text_config", "llm_config", "language_config"):
            inner = config.get(nested)
            if isinstance(inner, Mapping):
                self._config = inner
                break
        self.source = source

    def shape(self) -> ModelShape:
        """Raises ModelSpecError for a missing or impossible value."""
        model_type = self.optional_text("model_type") or ""
        hidden = self.integer("hidden_size", "n_embd", "d_model", "dim")
        layers = self.integer("num_hidden_layers", "n_layer", "num_layers", "n_layers")
        heads = self.integer("num_attention_heads", "n_head", "n_heads", "num_heads")
        mla = self._mla()
        kv_heads = self.optional_integer("num_key_value_heads", "num_kv_heads", "n_head_kv")
        if kv_heads is None:
            kv_heads = 1 if self._find("multi_query") else heads
        head_dim = self.optional_integer("head_dim", "kv_channels")
        if head_dim is None:
            if mla is None and hidden % heads:
                raise ModelSpecError(
                    f"{self.source}: hidden_size {hidden} is not a multiple of "
                    f"num_attention_heads {heads}; add head_dim"
                )
            head_dim = hidden // heads
        ungated = model_type in _UNGATED.split(", ")
        experts = self._experts(layers)
        width_names = ("intermediate_size", "ffn_hidden_size", "n_inner", "ffn_dim", "ffn_size")
        width = self.optional_integer("intermediate_size_mlp", *width_names)
        if width is None and ungated:
            width = 4 * hidden
        if width is None:
            if experts is None or experts.sparse_layers < layers:
                self.integer(*width_names)  # Raises, naming the key.
            width = 0
        tied = self._find("tie_word_embeddings")
        return ModelShape(
            hidden_size=hidden,
            num_layers=layers,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            ffn_width=width,
            ffn_matrices=2 if ungated else 3,
            vocab_size=self.integer("vocab_size", "padded_vocab_size"),
            tied=model_type in _TIED_BY_DEFAULT.split(", ") if tied is None else bool(tied),
            experts=experts,
            mla=mla,
            **self._layers(model_type, layers),
        )

    def _layers(self, model_type: str, layers: int) -> dict[str, Any]:
        """Which layers have no full attention."""
        kinds = self._layer_kinds(model_type, layers)
        windowed, linear = (
            sum(kind in names for kind in kinds) for names in (_WINDOWED, (_LINEAR,))
        )
        found: dict[str, Any] = {}
        if windowed:
            tokens = self.integer("sliding_window", "attention_chunk_size")
            found["window"] = WindowShape(windowed, tokens, model_type in _POOLED_WINDOWS)
        if linear:
            found["linear"] = LinearShape(
                linear,
                self.integer("linear_num_key_heads"),
                self.integer("linear_num_value_heads"),
                self.integer("linear_key_head_dim"),
                self.integer("linear_value_head_dim"),
                self.integer("linear_conv_kernel_dim"),
            )
            found["query_gate"] = True
        return found

    def _layer_kinds(self, model_type: str, layers: int) -> list[str]:
        listed = self._find("layer_types")
        if isinstance(listed, (list, tuple)) and listed:
            return [str(kind) for kind in listed][:layers]
        interval = self.optional_integer("full_attention_interval")
        if interval and self._find("linear_num_value_heads"):
            return [_FULL[0] if (at + 1) % interval == 0 else _LINEAR for at in range(layers)]
        if model_type.startswith("llama4") and self.optional_integer("attention_chunk_size"):
            return [_FULL[0] if (at + 1) % 4 == 0 else _WINDOWED[1] for at in range(layers)]
        window = self.optional_integer("sliding_window")
        pattern = self.optional_integer("sliding_window_pattern")
        if pattern is None:
            pattern = _WINDOW_PATTERNS.get(model_type)
        if window and pattern:
            return [_FULL[0] if (at + 1) % pattern == 0 else _WINDOWED[0] for at in range(layers)]
        return [_FULL[0]] * layers

    def caveats(self) -> tuple[str, ...]:
        """What to warn of: whatever is counted as a transformer of full attention and may not be
        one."""
        found = [key for key in _UNKNOWN_LAYERS if self._find(key)]
        listed = self._find("layer_types")
        if isinstance(listed, (list, tuple)):
            known = {*_FULL, *_WINDOWED, _LINEAR}
            found += sorted({f"layers of type {kind}" for kind in listed if kind not in known})
        model_type = self.optional_text("model_type")
        if model_type is not None and model_type not in _KNOWN_TYPES.split(", "):
            found.append(f"model_type {model_type}")
        return tuple(
            f"{self.source}: {what} is not known; costs and memory are counted as if every such "
            "layer had full attention, and may be far off"
            for what in found
        )

    def _mla(self) -> MLAShape | None:
        rank = self.optional_integer("kv_lora_rank")
        if rank is None:
            return None
        return MLAShape(
            kv_rank=rank,
            query_rank=self.optional_integer("q_lora_rank") or 0,
            nope_dim=self.integer("qk_nope_head_dim"),
            rope_dim=self.integer("qk_rope_head_dim"),
            value_dim=self.integer("v_head_dim"),
        )

    def _experts(self, layers: int) -> ExpertShape | None:
        total = self.optional_integer("num_local_experts", "num_experts", "n_routed_experts")
        if total is None or total <= 1:
            return None
        active = self.integer(*_ACTIVE_EXPERTS)
        if active > total:
            raise ModelSpecError(
                f"{self.source}: num_experts_per_tok {active} exceeds the {total} experts; "
                "correct one of them"
            )
        width = self.integer("moe_intermediate_size", "intermediate_size")
        shared = self.optional_integer("shared_expert_intermediate_size")
        if shared is None:
            count = self.optional_integer("n_shared_experts", "num_shared_experts")
            if count is None:
                count = int((self.optional_text("model_type") or "").startswith("llama4"))
            shared = count * width
        return ExpertShape(total, active, width, shared, self._sparse_layers(layers))

    def _sparse_layers(self, layers: int) -> int:
        dense_first = self.optional_integer("first_k_dense_replace") or 0
        step = self.optional_integer("decoder_sparse_step", "interleave_moe_layer_step") or 1
        listed = self._find("mlp_only_layers")
        dense = set(listed) if isinstance(listed, (list, tuple)) else set()
        return sum(
            1
            for layer in range(layers)
            if layer >= dense_first and layer not in dense and (layer + 1) % step == 0
        )

    def context_length(self) -> int:
        return self.integer(
            "max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length",
            "seq_length", "n_ctx", "model_max_length",
        )  # fmt: skip

    def name(self) -> str:
        return self.optional_text("_name_or_path", "model_type") or "unnamed"

    def section(self, key: str) -> Mapping[str, Any] | None:
        value = self._find(key)
        return value if isinstance(value, Mapping) else None

    def optional_text(self, *names: str) -> str | None:
        value = self._find(*names)
        return value if isinstance(value, str) and value else None

    def integer(self, *names: str) -> int:
        value = self.optional_integer(*names)
        if value is None:
            aliases = f" (or {', '.join(names[1:])})" if len(names) > 1 else ""
            raise ModelSpecError(
                f"{self.source}: key {names[0]!r}{aliases} is missing; add it, or use the "
                "config.json that came with the model"
            )
        return value

    def optional_integer(self, *names: str) -> int | None:
        value = self._find(*names)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise ModelSpecError(
                f"{self.source}: key {names[0]!r} must be a whole number, not {value!r}; use the "
                "config.json that came with the model"
            )
        return value

    def _find(self, *names: str) -> Any:
        """The first of these keys that is present and not null; the nested config goes first."""
        for config in (self._config, self._outer):
            for name in names:
                value = config.get(name)
                if value is not None:
                    return value
        return None
