"""The logic around the GPU kernels, on a CPU: FlashInfer's arguments, the choice, the take-over.

The wrappers here stand in for FlashInfer's: they compute, with the reference, exactly what the
arguments of their plan call say.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from kernel_cases import Case, make_case

from blendserve.planner import HARDWARE, MODEL_SPECS, CostModel
from blendserve.runtime import attention_gpu, prefix_paths
from blendserve.runtime.attention_gpu import BlendedSteps
from sgl_kernel_ext import reference
from sgl_kernel_ext.batch import AttentionShape
from sgl_kernel_ext.gpu import choice, steps
from sgl_kernel_ext.gpu.flashinfer_steps import FlashInferSteps
from sgl_kernel_ext.gpu.steps import Step
from sgl_kernel_ext.groups import shared_segments

SHAPE = AttentionShape(heads=6, kv_heads=2, head_dim=64, scale=0.125)


def states(
    query: torch.Tensor, pool: Any, indptrs: tuple[Any, Any, Any], scale: float, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and log-sum-exp of CSR attention, float64, one group of query rows at a time."""
    query_indptr, kv_indptr, indices = (x.long() for x in indptrs)
    output = torch.zeros(query.shape, dtype=torch.float64)
    log_sums = torch.zeros(query.shape[:2], dtype=torch.float64)
    group = query.shape[1] // pool[0].shape[2]
    for i in range(len(query_indptr) - 1):
        rows = slice(int(query_indptr[i]), int(query_indptr[i + 1]))
        slots = indices[kv_indptr[i] : kv_indptr[i + 1]]
        assert len(slots) > 0
        key, value = (p[slots, 0].double().repeat_interleave(group, 1) for p in pool)
        scores = torch.einsum("qhd,khd->qhk", query[rows].double(), key) * scale
        if causal:
            count = scores.shape[0]
            seen = torch.arange(len(slots))[None] <= torch.arange(count)[:, None] + (
                len(slots) - count
            )
            scores = scores.masked_fill(~seen[:, None], -torch.inf)
        output[rows] = torch.einsum("qhk,khd->qhd", scores.softmax(-1), value)
        log_sums[rows] = scores.logsumexp(-1)
    return output, log_sums


class FakePod:
    def __init__(self, workspace: torch.Tensor, layout: str) -> None:
        assert layout == "NHD"

    def plan(self, *args: Any, **kwargs: Any) -> None:
        assert kwargs["page_size"] == 1
        self.prefill, self.decode, self.scale = args[0:3], args[4:7], kwargs["sm_scale"]
        assert (args[3] == 1).all()
        assert (args[7] == 1).all()

    def run(self, q_p: Any, kv_p: Any, q_d: Any, kv_d: Any, causal_p: bool) -> Any:
        return (
            states(q_p, kv_p, self.prefill, self.scale, causal_p)[0].to(q_p.dtype),
            states(q_d, kv_d, self.decode, self.scale, False)[0].to(q_p.dtype),
        )


class FakeCascade:
    def __init__(self, levels: int, workspace: torch.Tensor, layout: str) -> None:
        assert levels == 2

    def plan(self, query: Any, kv: Any, indices: Any, last: Any, *args: Any, **kwargs: Any) -> None:
        self.levels, self.scale = list(zip(query, kv, indices, strict=True)), kwargs["sm_scale"]

    def run(self, query: torch.Tensor, pool: Any) -> torch.Tensor:
        both = [states(query, pool, level, self.scale, False) for level in self.levels]
        weights = torch.stack([log_sum for _, log_sum in both]).softmax(0)[..., None]
        return sum(w * out for w, (out, _) in zip(weights, both, strict=True)).to(query.dtype)


def flashinfer_steps(multiprocessors: int = 1) -> FlashInferSteps:
    module = SimpleNamespace(
        BatchPODWithPagedKVCacheWrapper=FakePod, MultiLevelCascadeAttentionWrapper=FakeCascade
    )
    return FlashInferSteps(module, "cpu", multiprocessors)


def bfloat_case(kv_lens: list[int], query_lens: list[int], shared: list[int]) -> tuple[Case, Step]:
    case = make_case(
        0,
        shape=SHAPE,
        kv_lens=kv_lens,
        query_lens=query_lens,
        shared=shared,
        dtype=torch.bfloat16,
    )
    decodes = np.flatnonzero(case.batch.query_lens == 1)
    segments = [
        steps.Segment(s.begin, s.end, decodes[s.members])
        for s in shared_segments(
            lambda members, at: case.lookup(decodes[members], at), case.batch.kv_lens[decodes]
        )
    ]
    return case, Step(case.batch, segments, case.slot_table)


def error(case: Case, step: Step) -> float:
    run = flashinfer_steps().plan(step, SHAPE, torch.bfloat16)
    assert run is not None
    output = case.poisoned_output()
    run(case.query, case.key_pool, case.value_pool, output)
    tensors = (case.query, case.key_pool, case.value_pool, case.slot_table)
    return reference.relative_error(output, reference.attention(*tensors, case.batch, SHAPE))


def test_pod_gets_the_chunks_with_their_prefixes_and_the_decodes() -> None:
    case, step = bfloat_case([40, 13, 200, 1], [40, 5, 1, 1], [0, 0, 0, 0])
    assert step.is_mixed
    assert error(case, step) < 2e-2


@pytest.mark.parametrize(
    ("kv_lens", "shared"),
    [
        ([90, 130, 71, 9, 2], [64, 64, 64, 0, 0]),  # a group, and two without one
        ([70, 80], [64, 64]),  # a group of all
        ([65, 100], [64, 64]),  # a member with one position of its own
    ],
)
def test_the_cascade_covers_every_position_once(kv_lens: list[int], shared: list[int]) -> None:
    case, step = bfloat_case(kv_lens, [1] * len(kv_lens), shared)
    assert error(case, step) < 2e-2


def test_a_request_of_one_position_is_left_to_others() -> None:
    _, step = bfloat_case([1, 100, 90], [1, 1, 1], [0, 64, 64])
    assert flashinfer_steps().plan(step, SHAPE, torch.bfloat16) is None


def test_pod_is_not_asked_for_a_soft_cap() -> None:
    _, step = bfloat_case([40, 50], [30, 1], [0, 0])
    capped = AttentionShape(heads=6, kv_heads=2, head_dim=64, scale=0.125, soft_cap=30.0)
    assert flashinfer_steps().plan(step, capped, torch.bfloat16) is None


def test_the_choice_names_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flashinfer", None)
    kernels, reason = choice.choose_kernels("cpu")
    assert [k.name for k in kernels] == ["triton"]
    assert "cannot be imported" in reason

    module = ModuleType("flashinfer")
    module.__version__ = "0.1"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flashinfer", module)
    kernels, reason = choice.choose_kernels("cpu")
    assert [k.name for k in kernels] == ["triton"]
    assert "0.1 lacks BatchPOD" in reason

    module.BatchPODWithPagedKVCacheWrapper = FakePod  # type: ignore[attr-defined]
    module.MultiLevelCascadeAttentionWrapper = FakeCascade  # type: ignore[attr-defined]
    kernels, reason = choice.choose_kernels("cpu")
    assert [k.name for k in kernels] == ["flashinfer", "triton"]


class FakeSGLangBackend:
    """What BlendedSteps stands in front of: answers with its own name, if it has planned."""

    def __init__(self, model_runner: Any) -> None:
        self.plans: list[Any] = []

    def init_forward_metadata(self, forward_batch: Any) -> None:
        self.plans.append(forward_batch)

    def init_forward_metadata_out_graph(self, forward_batch: Any, in_capture: bool = False) -> None:
        self.plans.append(forward_batch)

    def forward_extend(self, q: Any, k: Any, v: Any, layer: Any, batch: Any, **_: Any) -> str:
        assert self.plans[-1] is batch
        return "sglang"

    forward_decode = forward_extend


class FakeKernels:
    name = "fake"

    def saved_tokens(self, step: Step) -> int:
        return step.saved_tokens

    def plan(self, step: Step, shape: AttentionShape, dtype: torch.dtype) -> Any:
        return lambda query, key_pool, value_pool, output: output.fill_(7.0)


class Backend(BlendedSteps, FakeSGLangBackend):
    def __init__(self, model_runner: Any, takes_mixed: bool = True) -> None:
        super().__init__(model_runner)
        self.blend_init(model_runner, steps.Planner([FakeKernels()]), takes_mixed)


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_gpu, "choose_kernels", lambda device: ([FakeKernels()], "a test"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    monkeypatch.setattr(
        attention_gpu,
        "cost_model_of",
        lambda *args: CostModel(MODEL_SPECS["llama-3.1-8b"], HARDWARE["h100-80g-sxm"]),
    )


class FakePool:
    """SGLang's KV pool of one layer."""

    def __init__(self, slots: int = 500, dtype: torch.dtype = torch.float32) -> None:
        self.dtype = dtype
        self.keys, self.values = (torch.zeros(slots, 2, 64).to(dtype) for _ in "kv")

    def get_key_buffer(self, layer_id: int) -> torch.Tensor:
        return self.keys

    def get_value_buffer(self, layer_id: int) -> torch.Tensor:
        return self.values

    def set_kv_buffer(self, layer: Any, loc: Any, k: torch.Tensor, v: torch.Tensor) -> None:
        self.keys[loc], self.values[loc] = k, v


def runner(**extra: Any) -> SimpleNamespace:
    described: dict[str, Any] = {
        "device": "cpu",
        "dtype": torch.float32,
        "token_to_kv_pool": FakePool(),
        "req_to_token_pool": SimpleNamespace(req_to_token=torch.zeros(2, 200, dtype=torch.int32)),
        "model_config": SimpleNamespace(
            num_hidden_layers=32, num_attention_heads=6, head_dim=64,
            get_num_kv_heads=lambda ranks: 2 // ranks,
        ),
        "server_args": SimpleNamespace(tp_size=1, dp_size=1, enable_dp_attention=False),
        "use_mla_backend": False,
    }  # fmt: skip
    return SimpleNamespace(**{**described, **extra})


def batch_of(
    mode: str, query_lens: list[int], kv_lens: list[int], shared: int, known: bool = True
) -> SimpleNamespace:
    """A batch of SGLang's; its requests stand below one node of so many tokens."""
    root = SimpleNamespace(parent=None)
    node = SimpleNamespace(parent=root, id=1, value=torch.arange(shared))
    prefix_paths.current.reqs = [
        SimpleNamespace(rid=str(i), last_node=node if shared else root, req_pool_idx=i)
        for i in range(len(kv_lens))
    ]
    return SimpleNamespace(
        forward_mode=SimpleNamespace(
            is_decode=lambda: mode == "decode", is_mixed=lambda: mode == "mixed"
        ),
        spec_info=None,
        encoder_lens=None,
        rids=[str(i) for i in range(len(kv_lens))] if known else ["another"],
        seq_lens_cpu=torch.tensor(kv_lens),
        extend_seq_lens_cpu=query_lens,
        out_cache_loc=torch.arange(sum(query_lens)),
    )


def forward(
    mode: str,
    *,
    shared: int = 100,
    known: bool = True,
    graph: bool = False,
    rows: int | None = None,
    **layer: Any,
) -> Any:
    backend = Backend(runner())
    query_lens = {"decode": [1, 1], "mixed": [5, 1], "extend": [5, 4]}[mode]
    batch = batch_of(mode, query_lens, [110, 120], shared, known)
    backend.init_forward_metadata(batch)
    if graph:
        backend.init_forward_metadata_out_graph(batch, in_capture=True)
    described = {
        "layer_id": 0, "tp_q_head_num": 6, "tp_k_head_num": 2, "head_dim": 64, "qk_head_dim": 64,
        "v_head_dim": 64, "scaling": 0.125, "logit_cap": 0.0, "sliding_window_size": -1,
        "is_cross_attention": False, "attn_type": "decoder", **layer,
    }  # fmt: skip
    tokens = rows or sum(query_lens)
    q, k = torch.zeros(tokens, 6 * 64), torch.ones(tokens, 2 * 64)
    method = backend.forward_decode if mode == "decode" else backend.forward_extend
    return method(q, k, k, SimpleNamespace(**described), batch)


@pytest.mark.parametrize("mode", ["decode", "mixed"])
def test_steps_that_gain_are_taken_over(mode: str) -> None:
    assert (forward(mode) == 7.0).all()


@pytest.mark.parametrize(
    ("mode", "options"),
    [
        ("extend", {}),
        ("decode", {"shared": 0}),
        ("decode", {"known": False}),
        ("decode", {"graph": True}),
        ("mixed", {"v_head_dim": 32}),
        ("mixed", {"is_cross_attention": True}),
        ("mixed", {"attn_type": "encoder_only"}),
        ("mixed", {"rows": 8}),  # SGLang has padded the step
    ],
)
def test_everything_else_is_sglangs(mode: str, options: dict[str, Any]) -> None:
    assert forward(mode, **options) == "sglang"


def runs_in_graph(backend: Any, batch: Any, sglang_says: bool = True) -> bool:
    holder = SimpleNamespace(model_runner=SimpleNamespace(attn_backend=backend))
    return attention_gpu._can_run_graph(lambda runner, batch: sglang_says, holder, batch)


def test_decodes_leave_the_graph_where_sharing_saves_more_than_it() -> None:
    """An 8B Llama on an H100: a token's KV is read in 39 ns, and a graph may save 3.2 ms."""
    backend = Backend(runner())
    for count, prefix, in_graph in ((64, 2_000, False), (64, 1_000, True), (4, 8_000, True)):
        batch = batch_of("decode", [1] * count, [prefix + 500] * count, prefix)
        assert runs_in_graph(backend, batch) is in_graph
        assert not runs_in_graph(backend, batch, sglang_says=False)
    apart = batch_of("decode", [1] * 64, [2_500] * 64, shared=0)
    assert runs_in_graph(backend, apart)
    assert runs_in_graph(FakeSGLangBackend(None), apart)


def test_replicas_with_one_attention_keep_to_the_graph_together() -> None:
    alone = runner()
    alone.server_args.enable_dp_attention = True
    batch = batch_of("decode", [1] * 64, [2_500] * 64, shared=2_000)
    assert runs_in_graph(Backend(alone), batch)


def test_sglang_has_the_method_that_decides_about_graphs() -> None:
    found = [
        functools.reduce(getattr, method.split("."), importlib.import_module(module))
        for module, method in attention_gpu._GRAPH_TESTS
        if importlib.util.find_spec(module) is not None
    ]
    assert len(found) == 1
    assert list(inspect.signature(found[0]).parameters)[:2] == ["self", "forward_batch"]
