"""SGLang's CUDA wheels with everything of ours, on a machine without a GPU.

    .venv-gpu/bin/python test/gpu/cuda_imports.py [--log FILE]       # or: make test-cuda-imports

First as such a machine is, then with a libcuda.so.1 that fails every call, so that the CUDA
libraries load: our modules are imported, SGLang's signatures compared, our flags resolved for
pretended GPUs, and the tests of `runtime` and of the kernels run.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blendserve.cli import doctor

ROOT = Path(__file__).resolve().parents[2]
NO_DEVICE, VERSION = 100, 13_000  # CUDA_ERROR_NO_DEVICE; what cuDriverGetVersion says
LIMIT_SECONDS = 3_600
EVERYTHING = """
import importlib, pkgutil
import blendserve, sgl_kernel_ext
from blendserve.runtime import cpu_platform
cpu_platform.activate()
names = [m.name for package in (blendserve, sgl_kernel_ext)
         for m in pkgutil.walk_packages(package.__path__, package.__name__ + ".")]
failed = []
for name in names:
    if name == "sgl_kernel_ext.cpu._attention":
        continue  # A library with a C interface.
    try:
        importlib.import_module(name)
    except BaseException as error:
        failed.append(f"{name}: {type(error).__name__}: {error}")
print(len(names), "modules imported,", len(failed), "failed")
print("\\n".join(failed))
raise SystemExit(bool(failed))
"""
GUARD = """
from blendserve.runtime import cpu_platform, guard
cpu_platform.activate()
found = guard.differences({**guard.EXPECTED_SIGNATURES, **guard.HTTP_SIGNATURES})
print(len(found), "differences")
print("\\n".join(found))
raise SystemExit(bool(found))
"""
FLASHINFER = """
import inspect, flashinfer
pod = inspect.signature(flashinfer.BatchPODWithPagedKVCacheWrapper.plan).parameters
assert {"num_qo_heads", "num_kv_heads", "head_dim", "page_size", "q_data_type", "kv_data_type",
        "sm_scale"} <= set(pod), list(pod)
cascade = inspect.signature(flashinfer.MultiLevelCascadeAttentionWrapper.plan).parameters
assert {"causal", "sm_scale", "logits_soft_cap", "q_data_type", "kv_data_type"} <= set(cascade)
print("FlashInfer", flashinfer.__version__, "takes our arguments")
"""
PRETENDED = str(ROOT / "test" / "gpu" / "pretended_gpu.py")
ON_EVERY_GPU = {"enable_mixed_chunk": True, "disable_overlap_schedule": False,
                "radix_cache_backend": "blendserve", "decode_graphs": "full"}  # fmt: skip
# Words for pretended_gpu.py, and the settings that come of them: docs/kernels.md says the same.
RESOLVED: tuple[tuple[str, dict[str, Any]], ...] = (
    ("a100 llama", {"attention_backend": "flashinfer", "chunked_prefill_size": 8192,
                    "prefill_graphs": "breakable", "decode_graphs_up_to": 256}),
    ("a100 mla", {"attention_backend": "triton", "prefill_graphs": "breakable"}),
    ("h100 llama", {"attention_backend": "fa3", "chunked_prefill_size": 8192, "page_size": 1,
                    "prefill_graphs": "breakable", "decode_graphs_up_to": 256}),
    ("h100 mla", {"attention_backend": "fa3", "prefill_graphs": "breakable"}),
    ("b200 llama", {"attention_backend": "trtllm_mha", "chunked_prefill_size": 16384,
                    "page_size": 64, "decode_graphs_up_to": 512}),
    ("b200 mla", {"attention_backend": "flashinfer", "decode_graphs_up_to": 512}),
    ("h100 llama --attention-b blend", {"attention_backend": "blend", "page_size": 1}),
    ("h200 llama --tp 4 --disable-mixed-chunk", {"attention_backend": "fa3", "tp_size": 4,
                                          "enable_mixed_chunk": False, "decode_graphs_up_to": 512}),
)  # fmt: skip
REFUSED = (("h100 llama --disaggregation-mode prefill", "blendserve: --disaggregation-mode"),)
TESTS = ("test/kernels", "test/runtime", "test/cli/test_doctor.py", "test/cli/test_stock_flags.py")


def stub_driver(folder: Path) -> None:
    """A libcuda.so.1 with the symbols that sgl_kernel's libraries ask for. Needs nm and cc."""
    found = importlib.util.find_spec("sgl_kernel")
    if found is None or found.origin is None:
        sys.exit("sgl_kernel is not installed: run this in the environment of `make setup-gpu`")
    names: set[str] = set()
    for library in Path(found.origin).parent.rglob("*.so"):
        listing = ["nm", "-D", "--undefined-only", str(library)]
        said = subprocess.run(listing, capture_output=True, text=True, check=True).stdout
        names |= set(re.findall(r" U (cu[A-Z]\w*)$", said, re.MULTILINE))
    toolkit = re.compile(r"cu(blas|dnn|fft|rand|solver|sparse)")
    names = {name for name in names if not toolkit.match(name)} - {"cuInit", "cuDriverGetVersion"}
    lines = [
        f"int cuInit(unsigned flags) {{ return {NO_DEVICE}; }}",
        f"int cuDriverGetVersion(int* version) {{ *version = {VERSION}; return 0; }}",
        *(f"int {name}(void) {{ return {NO_DEVICE}; }}" for name in sorted(names)),
    ]
    source = folder / "stub.c"
    source.write_text("\n".join(lines) + "\n")
    target = str(folder / "libcuda.so.1")
    command = ["cc", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", str(source), "-o", target]
    subprocess.run(command, check=True)


@dataclass(frozen=True)
class Check:
    """A command. said: what its output must hold. refuses: it must not end with 0. settings: what
    `blendserve doctor` must find in its own process."""

    name: str
    command: tuple[str, ...]
    driver: bool = True
    said: str = ""
    refuses: bool = False
    settings: dict[str, Any] | None = None


def checks() -> Iterator[Check]:
    served = ("-m", "blendserve.cli.serve", "--help")
    yield Check("stub driver: guard", ("-c", GUARD), said="0 differences")
    yield Check("stub driver: FlashInfer", ("-c", FLASHINFER), said="takes our arguments")
    yield Check("stub driver: our modules", ("-c", EVERYTHING), said="0 failed")
    yield Check("no driver: our modules", ("-c", EVERYTHING), driver=False, said="0 failed")
    yield Check("stub driver: serve --help", served, said="--disable-mixed-chunk")
    yield Check("no driver: serve --help", served, driver=False, said="--disable-mixed-chunk")
    for words, settings in RESOLVED:
        command = (PRETENDED, *words.split())
        yield Check(f"pretended {words}", command, settings={**ON_EVERY_GPU, **settings})
    for words, said in REFUSED:
        yield Check(f"pretended {words}", (PRETENDED, *words.split()), said=said, refuses=True)
    yield Check("stub driver: tests", ("-m", "pytest", *TESTS), said=" passed")


def faults(check: Check, status: int, said: str) -> list[str]:
    """What of a command's end and output is not as it must be."""
    found = []
    if bool(status) is not check.refuses:
        found.append(f"it ended with {status}")
    if check.said not in said:
        found.append(f"it did not say {check.said!r}")
    if check.settings is not None:
        lines = [line for line in said.splitlines() if line.startswith(doctor.MARK)]
        seen = json.loads(lines[-1][len(doctor.MARK) :]) if lines else {}
        for name, wanted in check.settings.items():
            if seen.get(name) != wanted:
                found.append(f"{name} is {seen.get(name)!r}, not {wanted!r}")
    return found


def shown(check: Check, said: str) -> str:
    """What the log keeps of a check that went well: nothing of this machine."""
    if check.settings is not None:
        return ", ".join(f"{name} {value}" for name, value in check.settings.items())
    return next(line for line in reversed(said.splitlines()) if check.said in line).strip()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--log", type=Path)
    parser.add_argument("--only", default="", help="checks whose names hold this")
    options = parser.parse_args()
    lines: list[str] = []
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        stub_driver(Path(folder))
        # A folder in the way of nothing: SGLang must not find settings of this machine.
        environment = {**os.environ, "BLENDSERVE_BATCH_DIR": folder}
        with_driver = {**environment, "LD_LIBRARY_PATH": folder}
        for check in checks():
            if options.only not in check.name:
                continue
            start = time.monotonic()
            try:
                done = subprocess.run(
                    [sys.executable, *check.command], cwd=ROOT, timeout=LIMIT_SECONDS, text=True,
                    env=with_driver if check.driver else environment, capture_output=True,
                )  # fmt: skip
                said = done.stdout + done.stderr
                wrong = faults(check, done.returncode, said)
            except subprocess.TimeoutExpired:
                said, wrong = "", [f"it did not end in {LIMIT_SECONDS} s"]
            ended = "FAILED" if wrong else "ok"
            lines.append(f"{check.name}: {ended}, {time.monotonic() - start:.0f} s")
            lines += [f"  {text}" for text in wrong or [shown(check, said)]]
            print("\n".join(lines[-1 - len(wrong or [said]) :]), flush=True)
            if wrong:
                print(said[-6_000:])
            failed += bool(wrong)
    lines.append(f"{failed} failed")
    print(lines[-1])
    if options.log:
        options.log.write_text("\n".join(lines) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
