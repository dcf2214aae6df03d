"""Packs what campaign.py needs beside an image that has PyTorch, Triton and transformers already.

    python benchmark/gpu/pack.py FOLDER

SGLang and its dependencies as wheels for CPython 3.12, downloaded here because the GPU's machine
reaches no registry; sglang-kernel is cut down to what a Hopper GPU runs without FlashAttention-3
(1.1 GB of it), and xgrammar is left out (45 MB). Ends with 1 if wheels and tree exceed 60 MB. The
release is the newest that is made for the image's PyTorch 2.11.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable
from pathlib import Path

LIMIT_BYTES = 60 * 10**6
PYTHON = "3.12"
ROOT = Path(__file__).resolve().parents[2]
# Wheels that are cut down, and what is left out of them: FlashAttention-3, sparse attention, MLA
# and Blackwell; diffusion models and the gRPC server; examples and bindings of CUTLASS.
CUT = {
    "sglang-kernel==0.4.5": ("flash_ops", "infllm_ops", "flashmla_ops", "sm100/"),
    "sglang==0.5.16": ("sglang/multimodal_gen/", "sglang/srt/grpc/_core", "sglang/test/"),
    "flashinfer-python==0.6.14": (
        *("cutlass/examples/", "cutlass/python/", "cutlass/tools/", "cccl/python/"),
        *("cutlass/test/", "cutlass/docs/", "cutlass/media/"),
    ),
}
WHEELS = (
    *("apache-tvm-ffi==0.1.11", "openai==2.6.1"),
    *("fastapi==0.141.0", "starlette==1.3.1", "uvicorn==0.52.0", "annotated-doc==0.0.7"),
    *("pydantic==2.13.4", "pydantic-core==2.46.4", "annotated-types", "typing-inspection"),
    *("pydantic-settings", "python-dotenv", "orjson", "pybase64", "msgspec", "pyzmq", "dill"),
    *("compressed-tensors==0.18.0", "gguf==0.19.0", "partial-json-parser", "setproctitle"),
    *("python-multipart", "distro", "jiter", "sniffio", "loguru", "jsonschema", "referencing"),
    *("rpds-py", "jsonschema-specifications", "soundfile", "cffi", "pycparser", "nvidia-ml-py"),
    *("ipython", "traitlets", "decorator", "prompt_toolkit", "wcwidth", "stack_data"),
    *("asttokens", "executing", "pure_eval", "matplotlib-inline", "pexpect", "ptyprocess"),
    "ipython-pygments-lexers",
)
_GLIBC = (39, 38, 36, 35, 34, 31, 28, 27, 26, 24, 17)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    download(WHEELS, folder)
    with tempfile.TemporaryDirectory() as work:
        for number, (requirement, left_out) in enumerate(CUT.items()):
            download([requirement], Path(work) / str(number))
            for wheel in (Path(work) / str(number)).glob("*.whl"):
                cut_down(wheel, folder / wheel.name, left_out)
    wheels = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    tree = tracked_bytes()
    print(f"{wheels / 1e6:.1f} MB of wheels in {folder}, {tree / 1e6:.1f} MB of tree")
    return 0 if wheels + tree <= LIMIT_BYTES else 1


def download(requirements: Iterable[str], folder: Path) -> None:
    """Wheels of these, without their dependencies, for the GPU's machine."""
    platforms = [f"manylinux_2_{minor}_x86_64" for minor in _GLIBC]
    platforms += ["manylinux2014_x86_64", "manylinux1_x86_64"]
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:"]
    command += ["--python-version", PYTHON, "--implementation", "cp", "-d", str(folder)]
    for platform in platforms:
        command += ["--platform", platform]
    subprocess.run([*command, *requirements], check=True)


def cut_down(wheel: Path, target: Path, left_out: Iterable[str]) -> None:
    """Copy a wheel without the files whose names hold one of these parts."""
    with (
        zipfile.ZipFile(wheel) as source,
        zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as out,
    ):
        for entry in source.infolist():
            if not any(part in entry.filename for part in left_out):
                out.writestr(entry, source.read(entry.filename))


def tracked_bytes() -> int:
    """Size of the tree that travels with the wheels."""
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True, text=True
    ).stdout.split("\0")
    return sum((ROOT / name).stat().st_size for name in listed if name and (ROOT / name).exists())


if __name__ == "__main__":
    sys.exit(main())
