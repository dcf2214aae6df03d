"""What a first run on a GPU would have met: models, pools and steps that are not the usual ones."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from test_gpu_steps import (
    SHAPE,
    Backend,
    FakeKernels,
    FakePool,
    FakeSGLangBackend,
    batch_of,
    bfloat_case,
    flashinfer_steps,
    no_gpu,  # noqa: F401 - a fixture
    runner,
    runs_in_graph,
)
from torch.overrides import TorchFunctionMode

from blendserve.runtime import attention_gpu, attention_warm_up
from sgl_kernel_ext import reference
from sgl_kernel_ext.batch import AttentionShape, PagedBatch
from sgl_kernel_ext.gpu.flashinfer_steps import (
    FlashInferSteps,
    cascade_groups,
    cascade_levels,
    plan_bytes,
)
from sgl_kernel_ext.gpu.steps import Planner, Step, by_savings
from sgl_kernel_ext.gpu.triton_steps import TritonSteps
from sgl_kernel_ext.groups import shared_segments

# Worst steps of a scan of FlashInfer 0.6.18's own planner (compiled, 2,400 mixed steps each), MiB.
WORST_PLANS = [
    ((32, 8, 128), 132, 64.5),
    ((32, 8, 128), 148, 72.6),
    ((28, 4, 128), 148, 127.0),
    ((64, 8, 128), 148, 145.0),
    ((16, 2, 128), 148, 147.0),
]


@pytest.mark.parametrize(("heads", "multiprocessors", "worst_mib"), WORST_PLANS)
def test_flashinfer_gets_the_workspace_that_its_planner_may_ask_for(
    heads: tuple[int, int, int], multiprocessors: int, worst_mib: float
) -> None:
    shape = AttentionShape(*heads, scale=0.1)
    assert plan_bytes(shape, multiprocessors) >= worst_mib * 2**20
    assert plan_bytes(shape, multiprocessors) < 1.15 * worst_mib * 2**20
    # POD attention halves what it is given.
    family = flashinfer_steps(multiprocessors)
    assert len(family.workspace(shape)) // 2 >= plan_bytes(shape, multiprocessors)


def test_the_workspace_grows_with_the_shape_and_never_shrinks() -> None:
    family = flashinfer_steps(132)
    small, large = (AttentionShape(8 * n, 8, 128, scale=0.1) for n in (1, 4))
    first = family.workspace(small)
    assert len(family.workspace(large)) > len(first)
    assert len(family.workspace(small)) == len(family.workspace(large))


def test_a_family_that_cannot_plan_gives_way_to_the_next_and_is_not_asked_again() -> None:
    asked: list[str] = []

    class Failing(FakeKernels):
        name = "failing"

        def plan(self, *args: Any) -> Any:
            asked.append(self.name)
            raise RuntimeError("Buffer overflow when allocating memory for batch_prefill_tmp_v")

    planner = Planner([Failing(), FakeKernels()])
    _, step = bfloat_case([40, 50], [30, 1], [0, 0])
    assert planner.plan(step, SHAPE, torch.bfloat16) is not None
    assert planner.plan(step, SHAPE, torch.bfloat16) is not None
    assert asked == ["failing"]


# -- models of which nothing is taken over


class HybridPool(FakePool):
    swa_kv_pool = object()


@pytest.mark.parametrize(
    ("extra", "reason"),
    [
        ({"use_mla_backend": True}, "latent attention"),
        ({"token_to_kv_pool": HybridPool()}, "pool of their own"),
        ({"token_to_kv_pool": FakePool(dtype=torch.float8_e4m3fn)}, "float8_e4m3fn"),
        (
            {
                "server_args": SimpleNamespace(
                    tp_size=1, enable_dp_attention=False, speculative_algorithm="EAGLE"
                )
            },
            "speculative",
        ),
    ],
)
def test_such_a_model_gets_sglangs_backend_and_a_word_why(
    extra: dict[str, Any],
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    made = sglang_makes(monkeypatch, FakeSGLangBackend)
    backend = attention_gpu.make_backend(runner(**extra))
    assert backend is made[0]
    assert type(backend) is FakeSGLangBackend
    assert reason in caplog.text
    # A decode step that would save much stays in its graph.
    assert runs_in_graph(backend, batch_of("decode", [1] * 64, [2_500] * 64, 2_000))


def sglang_makes(monkeypatch: pytest.MonkeyPatch, kind: Any) -> list[Any]:
    """SGLang's factories for the device, faked: what they made."""
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS

    made: list[Any] = []

    def factory(model_runner: Any) -> Any:
        made.append(kind(model_runner))
        return made[-1]

    for name in ("fa3", "flashinfer", "triton"):
        monkeypatch.setitem(ATTENTION_BACKENDS, name, factory)
    return made


def test_the_backend_is_made_by_sglangs_own_factory(monkeypatch: pytest.MonkeyPatch) -> None:
    """It alone knows the constructor, and the workspaces that PD multiplexing keeps apart."""
    made = sglang_makes(monkeypatch, FakeSGLangBackend)
    monkeypatch.setattr(attention_gpu, "warm_up", lambda planner, model_runner: None)
    backend = attention_gpu.make_backend(runner())
    assert backend is made[0]
    assert isinstance(backend, attention_gpu.BlendedSteps)
    batch = batch_of("decode", [1] * 64, [2_500] * 64, 2_000)
    assert not runs_in_graph(backend, batch)


@pytest.mark.parametrize(
    ("capability", "installed", "expected"),
    [
        ((9, 0), ("flashinfer", "sgl_kernel.flash_attn", "sgl_kernel.flash_ops"), "fa3"),
        ((9, 0), ("flashinfer",), "flashinfer"),  # a cut of sgl_kernel without it
        ((8, 0), ("flashinfer", "sgl_kernel.flash_attn", "sgl_kernel.flash_ops"), "flashinfer"),
        ((10, 0), ("flashinfer",), "flashinfer"),  # trtllm_mha wants larger pages
        ((8, 9), (), "triton"),
    ],
)
def test_the_parent_is_what_sglang_would_take(
    capability: tuple[int, int],
    installed: tuple[str, ...],
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(
        attention_gpu, "_has", lambda *modules: all(module in installed for module in modules)
    )
    assert attention_gpu.parent_name(runner()) == expected


def test_over_fa3_a_mixed_step_is_taken_only_where_decodes_share() -> None:
    backend = Backend(runner(), takes_mixed=False)
    for shared, taken in ((0, False), (100, True)):
        backend.init_forward_metadata(batch_of("mixed", [5, 1, 1], [110, 120, 130], shared))
        assert (backend.blend_step is not None) is taken


# -- plans of several shapes, and of SGLang's own


def test_each_shape_of_layers_has_a_plan_of_its_own() -> None:
    """A model whose layers differ in scale plans for one after the other, then runs both."""
    case, step = bfloat_case([40, 13, 200, 1], [40, 5, 1, 1], [0, 0, 0, 0])
    family = flashinfer_steps()
    shapes = [SHAPE, AttentionShape(heads=6, kv_heads=2, head_dim=64, scale=0.5)]
    runs = [family.plan(step, shape, torch.bfloat16) for shape in shapes]
    tensors = (case.query, case.key_pool, case.value_pool, case.slot_table)
    for shape, run in zip(shapes, runs, strict=True):
        assert run is not None
        output = case.poisoned_output()
        run(case.query, case.key_pool, case.value_pool, output)
        expected = reference.attention(*tensors, case.batch, shape)
        assert reference.relative_error(output, expected) < 2e-2


LAYER = {
    "layer_id": 0, "tp_q_head_num": 6, "tp_k_head_num": 2, "head_dim": 64, "qk_head_dim": 64,
    "v_head_dim": 64, "scaling": 0.125, "logit_cap": 0.0, "sliding_window_size": -1,
    "is_cross_attention": False, "attn_type": "decoder",
}  # fmt: skip


def test_sglang_plans_a_taken_step_only_when_a_layer_is_its_to_compute() -> None:
    backend = Backend(runner())
    batch = batch_of("mixed", [5, 1], [110, 120], 100)
    backend.init_forward_metadata(batch)
    q, k = torch.zeros(6, 6 * 64), torch.ones(6, 2 * 64)
    backend.forward_extend(q, k, k, SimpleNamespace(**LAYER), batch)
    assert backend.plans == []
    for _ in range(2):
        odd = SimpleNamespace(**{**LAYER, "v_head_dim": 32})
        assert backend.forward_extend(q, k, k, odd, batch) == "sglang"
    assert backend.plans == [batch]


def test_a_decode_step_is_looked_at_once_before_and_after_it_leaves_its_graph() -> None:
    backend = Backend(runner())
    looks: list[Any] = []
    look = backend._blend_look
    backend._blend_look = lambda batch: looks.append(batch) or look(batch)  # type: ignore[func-returns-value]
    batch = batch_of("decode", [1] * 64, [2_500] * 64, 2_000)
    assert not runs_in_graph(backend, batch)
    backend.init_forward_metadata(batch)
    assert looks == [batch]
    backend.init_forward_metadata(batch)  # The same object may come again with other contents.
    assert looks == [batch, batch]


# -- what is saved, and by whom


def nested_step(common: int = 100, group: int = 2_000, own: int = 500) -> Step:
    """64 decodes under one prompt, in 8 groups with more in common."""
    n = 64
    kv_lens = np.full(n, common + group + own)

    def slots(member: Any, position: Any) -> Any:
        in_group = 10_000 * (member // 8 + 1) + position
        alone = 10_000_000 + member * 10_000 + position
        return np.where(
            position < common, position, np.where(position < common + group, in_group, alone)
        )

    table = np.array([slots(np.full(3_000, i), np.arange(3_000)) for i in range(n)])
    batch = PagedBatch.of(list(range(n)), kv_lens, [1] * n)
    return Step(batch, shared_segments(slots, kv_lens), torch.from_numpy(table).int())


@pytest.mark.parametrize(("common", "group"), [(100, 2_000), (2_000, 100), (100, 0), (0, 500)])
def test_the_cascade_reads_what_it_says_and_takes_the_better_level(common: int, group: int) -> None:
    step = nested_step(common, group)
    levels = cascade_levels(step, cascade_groups(step))
    assert levels is not None
    members, shared, private = levels
    read = len(shared.kv_indices) + len(private.kv_indices)
    saved = flashinfer_steps().saved_tokens(step)
    assert saved == step.decode_tokens - read
    assert saved == max(63 * common, 56 * (common + group) if group else 0)
    assert sorted(members.tolist()) == list(range(64))
    assert sum(len(g.members) for g in cascade_groups(step)) == 64


def test_triton_is_asked_first_where_it_reads_much_less() -> None:
    kernels: list[Any] = [flashinfer_steps(), TritonSteps("cpu")]
    even = nested_step(100, 2_000)  # 117,600 saved against 118,300
    assert [k.name for k in by_savings(kernels, even)] == ["flashinfer", "triton"]
    deep = nested_step(1_500, 1_500)  # 168,000 against 178,500: an eighth of all reads is 24,000
    assert [k.name for k in by_savings(kernels, deep)] == ["flashinfer", "triton"]
    mixed = Step(deep.batch, deep.segments, deep.slot_table)
    mixed.batch.query_lens[0] = 5  # POD attention reads every prefix anew
    assert [k.name for k in by_savings(kernels, mixed)] == ["triton", "flashinfer"]
    assert by_savings([], deep) == []


# -- planning does not wait for the device


class PretendedGpu(TorchFunctionMode):
    """Runs what is meant for a GPU on the CPU, and notes what would have made the host wait."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self.copies = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if name == "pin_memory":
            args[0].is_pinned_here = True
            return args[0]
        if name == "to" and any(isinstance(a, torch.device) and a.type == "cuda" for a in args):
            self.copies += 1
            if not (kwargs.get("non_blocking") and getattr(args[0], "is_pinned_here", False)):
                self.waits.append("to")
            return args[0]
        if name in ("item", "cpu", "tolist", "nonzero", "__int__", "__bool__"):
            self.waits.append(name)
        if name == "repeat_interleave" and kwargs.get("output_size") is None:
            self.waits.append(name)
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = "cpu"
        return func(*args, **kwargs)


class NoWrapper:
    """FlashInfer's, as far as planning goes: it reads on the host what lies there."""

    def __init__(self, *_: Any) -> None: ...

    def plan(self, *args: Any, **_: Any) -> None:
        for given in args:
            for tensor in given if isinstance(given, list) else [given]:
                if isinstance(tensor, torch.Tensor) and len(tensor.shape) == 1:
                    assert tensor.dtype == torch.int32


def flashinfer_on_gpu() -> FlashInferSteps:
    return FlashInferSteps(
        SimpleNamespace(
            BatchPODWithPagedKVCacheWrapper=NoWrapper, MultiLevelCascadeAttentionWrapper=NoWrapper
        ),
        "cpu",
    )


class PretendedTable(torch.Tensor):
    """A slot table that says it lies on a GPU."""

    device = torch.device("cuda")  # type: ignore[assignment]


def planned_on_gpu(family: Any, step: Step, shape: AttentionShape) -> None:
    family.device = torch.device("cuda")
    on_gpu = Step(step.batch, step.segments, step.slot_table.as_subclass(PretendedTable))
    assert family.plan(on_gpu, shape, torch.bfloat16) is not None


@pytest.mark.parametrize("kind", ["mixed", "shared"])
@pytest.mark.parametrize("family", [flashinfer_on_gpu, functools.partial(TritonSteps, "cpu")])
def test_planning_copies_without_waiting(family: Any, kind: str) -> None:
    lens = {"mixed": ([40, 13, 200, 70], [40, 5, 1, 1]), "shared": ([90, 130, 71], [1, 1, 1])}
    _, step = bfloat_case(*lens[kind], [0] * 4 if kind == "mixed" else [64, 64, 64])
    made = family()
    with PretendedGpu() as mode:
        planned_on_gpu(made, step, SHAPE)
    assert mode.waits == []
    assert 1 <= mode.copies <= 12


# -- warm-up


def test_every_kind_of_kernel_is_run_before_the_server_is_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ran: list[tuple[str, bool, int]] = []

    class Family(FakeKernels):
        name = "family"

        def plan(self, step: Step, shape: AttentionShape, dtype: torch.dtype) -> Any:
            shared = max(len(s.members) for s in step.segments) if step.segments else 0
            return lambda *_: ran.append((self.name, step.is_mixed, shared * shape.group))

    monkeypatch.setattr(attention_warm_up, "_warm", set())
    planner = Planner([Family()])
    attention_warm_up.warm_up(planner, runner())
    # Mixed; a shared prefix of few packed rows and of many.
    assert [mixed for _, mixed, _ in ran] == [True, False, False]
    assert ran[1][2] <= 16 < ran[2][2]
    attention_warm_up.warm_up(planner, runner())
    assert len(ran) == 3


def test_the_warm_up_steps_are_ones_that_the_kernels_take() -> None:
    for step in attention_warm_up.steps_of(SHAPE, 500, "cpu"):
        for family in (flashinfer_steps(), TritonSteps("cpu")):
            assert family.plan(step, SHAPE, torch.bfloat16) is not None
