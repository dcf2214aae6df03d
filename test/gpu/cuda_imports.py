"""SGLang's CUDA wheels with everything of ours, on a machine without a GPU.

    .venv-gpu/bin/python test/gpu/cuda_imports.py [--log FILE]       # or: make test-cuda-imports

First as such a machine is, then with a libcuda.so.1 that fails every call, so that the CUDA
libraries load: our modules are imported, SGLang's signatures compared, `serve --help` and tests of
kernels, scheduler and cache run.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NO_DEVICE, VERSION = 100, 13_000  # CUDA_ERROR_NO_DEVICE; what cuDriverGetVersion says
LIMIT_SECONDS = 1_500
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
REFUSED = "blendserve: --disaggregation-mode"
# (chip, what must be said, flags)
CHIPS = (
    ("a100", '"attention_backend": "flashinfer"', ("a100",)),
    ("h100", '"attention_backend": "fa3"', ("h100",)),
    ("h200", '"enable_mixed_chunk": true', ("h200",)),
    ("b200", '"attention_backend": "trtllm_mha"', ("b200",)),
    ("h100", '"attention_backend": "blend"', ("h100", "--attention-b", "blend")),
    ("h100", '"enable_mixed_chunk": false', ("h100", "--disable-mixed-chunk")),
    ("h100", REFUSED, ("h100", "--disaggregation-mode", "prefill")),
)
TESTS = (
    *("test/kernels/test_gpu_steps.py", "test/kernels/test_gpu_faults.py"),
    *("test/kernels/test_triton_compiles.py", "test/kernels/test_groups.py"),
    *("test/kernels/test_reference.py", "test/kernels/test_cpu_backend.py"),
    *("test/runtime/test_guard.py", "test/runtime/test_scheduler.py"),
    *("test/runtime/test_side_queues.py", "test/runtime/test_radix_cache.py"),
    *("test/runtime/test_multiplex.py", "test/runtime/test_prefix_paths.py"),
    *("test/runtime/test_step_counts.py", "test/runtime/test_device.py"),
    "test/runtime/test_arguments.py",
)


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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--log", type=Path)
    options = parser.parse_args()
    lines: list[str] = []
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        stub_driver(Path(folder))
        # A folder in the way of nothing: SGLang must not find settings of this machine.
        environment = {**os.environ, "BLENDSERVE_BATCH_DIR": folder}
        with_driver = {**environment, "LD_LIBRARY_PATH": folder}
        run = [sys.executable, "-m", "blendserve.cli.serve", "--help"]
        for name, command, env in (
            ("stub driver: guard", [sys.executable, "-c", GUARD], with_driver),
            ("stub driver: FlashInfer", [sys.executable, "-c", FLASHINFER], with_driver),
            *(
                (f"pretended {chip}: {expected}", [sys.executable, PRETENDED, *words], with_driver)
                for chip, expected, words in CHIPS
            ),
            ("stub driver: our modules", [sys.executable, "-c", EVERYTHING], with_driver),
            ("no driver: our modules", [sys.executable, "-c", EVERYTHING], environment),
            ("no driver: serve --help", run, environment),
            ("stub driver: serve --help", run, with_driver),
            ("stub driver: tests", [sys.executable, "-m", "pytest", "-q", *TESTS], with_driver),
        ):
            start = time.monotonic()
            done = subprocess.run(
                command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=LIMIT_SECONDS
            )
            if (
                name.startswith("pretended ")
                and name.split(": ")[1] not in done.stdout + done.stderr
            ):
                done.returncode = done.returncode or 1
            elif name.endswith(REFUSED):
                done.returncode = 0
            seconds = time.monotonic() - start
            lines.append(f"{name}: status {done.returncode}, {seconds:.0f} s")
            said = [line for line in done.stdout.splitlines() if line.strip()]
            shown = (
                said[-1:] if not done.returncode else [*said[-30:], *done.stderr.splitlines()[-30:]]
            )
            if command is not run or done.returncode:
                lines += [f"  {line}" for line in shown]
            print("\n".join(lines[-1 - len(shown) :]), flush=True)
            failed += bool(done.returncode)
            if options.log:
                options.log.write_text("\n".join(lines) + "\n")
    print(f"{failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
