"""The stand-ins that let SGLang run without an accelerator, and when they are put in place."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from types import ModuleType
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blendserve.runtime import cpu_platform

REPLACED = ("sgl_kernel", "torchvision")
VARIABLES = (
    *("SGLANG_USE_CPU_ENGINE", "TORCHDYNAMO_DISABLE", "OMP_NUM_THREADS"),
    *("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"),
)


@pytest.fixture(autouse=True)
def plain_machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An x86-64 machine without an accelerator, on which nothing was decided yet."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.xpu, "is_available", lambda: False)
    monkeypatch.delattr(torch, "npu", raising=False)
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    with mock.patch.dict(os.environ):
        for variable in VARIABLES:
            os.environ.pop(variable, None)
        loaded = {name: sys.modules.pop(name, None) for name in REPLACED}
        yield
    for name, module in loaded.items():
        sys.modules.pop(name, None)
        if module is not None:
            sys.modules[name] = module


# -- when the stand-ins are needed


@pytest.mark.parametrize("machine", ["x86_64", "AMD64", "aarch64", "arm64"])
def test_a_machine_without_accelerator_needs_the_cpu_engine(monkeypatch, machine):
    monkeypatch.setattr(platform, "machine", lambda: machine)
    assert cpu_platform.needs_cpu_engine()


def test_a_processor_that_sglang_does_not_know_cannot_use_it(monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    assert not cpu_platform.needs_cpu_engine()


@pytest.mark.parametrize("device", ["cuda", "xpu"])
def test_an_accelerator_makes_it_needless(monkeypatch, device):
    monkeypatch.setattr(getattr(torch, device), "is_available", lambda: True)
    assert not cpu_platform.needs_cpu_engine()


def test_an_npu_makes_it_needless(monkeypatch):
    monkeypatch.setattr(torch, "npu", object(), raising=False)
    assert not cpu_platform.needs_cpu_engine()


@pytest.mark.parametrize(("choice", "needed"), [("1", True), ("0", False), ("", False)])
def test_beside_an_accelerator_it_is_the_users_choice(monkeypatch, choice, needed):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    os.environ["SGLANG_USE_CPU_ENGINE"] = choice
    assert cpu_platform.needs_cpu_engine() is needed


# -- putting them in place


def test_sglang_finds_the_platform_by_its_entry_point():
    (entry,) = importlib.metadata.entry_points(group="sglang.srt.platforms", name="blendserve_cpu")
    assert entry.value == "blendserve.runtime.cpu_platform:activate"


def test_with_cuda_nothing_is_changed(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    environment, modules = dict(os.environ), dict(sys.modules)
    assert cpu_platform.activate() is None
    assert dict(os.environ) == environment
    assert sys.modules == modules


def test_without_cuda_sglang_keeps_its_own_cpu_platform(monkeypatch):
    installed = []
    monkeypatch.setattr(cpu_platform, "_install_sgl_kernel", lambda: installed.append("kernel"))
    monkeypatch.setattr(cpu_platform, "_install_torchvision", lambda: installed.append("vision"))
    assert cpu_platform.activate() is None
    assert installed == ["kernel", "vision"]
    assert os.environ["SGLANG_USE_CPU_ENGINE"] == "1"
    assert os.environ["TORCHDYNAMO_DISABLE"] == "1"
    assert int(os.environ["OMP_NUM_THREADS"]) == os.cpu_count()


def test_variables_that_the_user_set_are_kept(monkeypatch):
    monkeypatch.setattr(cpu_platform, "_install_sgl_kernel", lambda: None)
    monkeypatch.setattr(cpu_platform, "_install_torchvision", lambda: None)
    os.environ["TORCHDYNAMO_DISABLE"] = "0"
    os.environ["OMP_NUM_THREADS"] = "7"
    cpu_platform.activate()
    assert (os.environ["TORCHDYNAMO_DISABLE"], os.environ["OMP_NUM_THREADS"]) == ("0", "7")


@pytest.mark.parametrize(
    ("given", "spins"),
    [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, None)],
)
def test_openmp_threads_sleep_soon_unless_the_user_says_how_they_wait(monkeypatch, given, spins):
    monkeypatch.setattr(cpu_platform, "_install_sgl_kernel", lambda: None)
    monkeypatch.setattr(cpu_platform, "_install_torchvision", lambda: None)
    os.environ.update(given)
    cpu_platform.activate()
    assert os.environ.get("GOMP_SPINCOUNT") == spins


@pytest.mark.parametrize("name", REPLACED)
def test_a_package_that_is_there_is_left_alone(name):
    real = sys.modules[name] = ModuleType(name)
    getattr(cpu_platform, f"_install_{name}")()
    assert sys.modules[name] is real
    assert vars(real).keys() == vars(ModuleType(name)).keys()


PLAIN_AND_PREPARED = """
import transformers
transformers.LlamaConfig  # Loaded here, beside whatever is installed.
from blendserve.runtime import cpu_platform
cpu_platform.activate()
from torchvision.transforms import v2
print(v2.__file__)
"""


def test_transformers_works_without_our_help_and_torchvision_with_it():
    """Programs of the environment that know nothing of us import transformers, too."""
    ended = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PLAIN_AND_PREPARED],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert "torchvision" in ended.stdout


PREPARED_STARTS_PLAIN = """
import os, subprocess, sys
from blendserve.runtime import cpu_platform
cpu_platform.activate()
env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
command = [sys.executable, "-c", "import transformers; transformers.LlamaConfig"]
sys.exit(subprocess.run(command, env=env, timeout=60).returncode)
"""


def test_a_plain_process_with_the_path_of_a_prepared_one_imports_transformers():
    """`multiprocessing` hands `sys.path` to its children, too."""
    ended = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PREPARED_STARTS_PLAIN],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """`sgl_kernel` as it is where no wheel of it can be had."""
    monkeypatch.setattr(cpu_platform, "_is_installed", lambda name: False)
    cpu_platform._install_sgl_kernel()
    return importlib.import_module("sgl_kernel")


def test_a_cuda_build_that_the_driver_is_missing_for_is_stood_in_for(tmp_path, monkeypatch):
    """After an installation for a GPU, on a machine without one."""
    package = tmp_path / "sgl_kernel"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('libcuda.so.1: no such file')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "sgl_kernel", raising=False)
    cpu_platform._install_sgl_kernel()
    kernel = importlib.import_module("sgl_kernel").assign_req_to_token_pool_cpu
    assert kernel is cpu_platform.assign_req_to_token_pool_cpu


@pytest.mark.parametrize("name", cpu_platform._UNSUPPORTED_KERNELS)
def test_a_kernel_that_is_absent_says_so_when_called(stand_in, name):
    with pytest.raises(NotImplementedError, match=rf"sgl_kernel\.{name} is not available"):
        getattr(stand_in, name)(torch.zeros(1), out=None)


def test_the_stand_in_has_the_one_kernel_that_is_needed(stand_in):
    kernel = stand_in.assign_req_to_token_pool_cpu
    assert kernel is cpu_platform.assign_req_to_token_pool_cpu


def test_the_stand_in_does_not_make_sglang_think_of_amx(request):
    before = hasattr(torch.ops.sgl_kernel, "convert_weight_packed")
    request.getfixturevalue("stand_in")
    assert hasattr(torch.ops.sgl_kernel, "convert_weight_packed") == before


# -- the one kernel


def assign_by_hand(rows, table, starts, ends, slots):
    """What the kernel says it does, slot by slot."""
    remaining = iter(slots)
    for row, start, end in zip(rows, starts, ends, strict=True):
        for column in range(start, end):
            table[row][column] = next(remaining)


@st.composite
def assignments(draw):
    pool_len = draw(st.integers(1, 12))
    requests = draw(st.integers(0, 8))
    rows = draw(st.permutations(range(requests + 2)))[:requests]
    spans = [
        sorted(draw(st.tuples(st.integers(0, pool_len), st.integers(0, pool_len))))
        for _ in range(requests)
    ]
    spare = draw(st.integers(0, 3))  # the slots may be padded at their end
    return pool_len, rows, [start for start, _ in spans], [end for _, end in spans], spare


@settings(deadline=None, database=None)
@given(
    assignments(),
    st.sampled_from([torch.int32, torch.int64]),
    st.sampled_from([torch.int32, torch.int64]),
)
def test_new_slots_go_to_the_rows_of_their_requests_and_nothing_else_changes(
    assignment, index_dtype, slot_dtype
):
    pool_len, rows, starts, ends, spare = assignment
    count = sum(ends) - sum(starts)
    slots = list(range(100, 100 + count + spare))
    table = torch.arange(-1, -1 - (len(rows) + 2) * pool_len, -1, dtype=torch.int32)
    table = table.reshape(len(rows) + 2, pool_len)
    expected = table.tolist()
    assign_by_hand(rows, expected, starts, ends, slots)

    cpu_platform.assign_req_to_token_pool_cpu(
        torch.tensor(rows, dtype=index_dtype),
        table,
        torch.tensor(starts, dtype=index_dtype),
        torch.tensor(ends, dtype=index_dtype),
        torch.tensor(slots, dtype=slot_dtype),
        pool_len,
    )

    assert table.tolist() == expected
    assert table.dtype == torch.int32
