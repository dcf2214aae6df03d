"""``blendserve doctor``: what this machine is, what `serve` would use on it and why.

Looks at the driver, the packages and the tools, then has SGLang resolve the flags in a process of
its own, without loading weights. Ends with 1 where serving would fail.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.console import Console

_PACKAGES = ("torch", "triton", "sglang", "sglang-kernel", "flashinfer-python", "transformers")
_RESOLVE = ("-m", "blendserve.cli.doctor", "--resolve")
_RESOLVE_SECONDS = 600
MARK = "blendserve-doctor: "


@dataclass(frozen=True)
class Finding:
    """One line of the report: `fails` is what `serve` would end with."""

    name: str
    text: str
    fails: bool = False


def main(argv: Sequence[str]) -> int:
    """Exit status: 0 if `serve` with these flags would start, else 1."""
    if list(argv[:1]) == ["--resolve"]:
        return resolve(argv[1:])
    parser = argparse.ArgumentParser(
        prog="blendserve doctor",
        description="Say what this machine is, and what `serve` would use on it and why.",
        epilog="Flags of `blendserve serve` may follow: they are looked at as it would.",
        allow_abbrev=False,
    )
    parser.add_argument("--json", action="store_true", help="the findings as JSON")
    options, flags = parser.parse_known_args(list(argv))
    findings = list(examine(flags))
    failing = sum(finding.fails for finding in findings)
    if options.json:
        print(json.dumps([vars(finding) for finding in findings], indent=1))
    else:
        console = Console()
        for finding in findings:
            console.print(
                f"{'FAILS' if finding.fails else 'ok':5} {finding.name:12} {finding.text}",
                highlight=False, markup=False, soft_wrap=True,
            )  # fmt: skip
        verdict = f"`blendserve serve` would fail: {failing} of the above" if failing else (
            "`blendserve serve` would start with these flags"
        )  # fmt: skip
        console.print(verdict, highlight=False, markup=False)
    return 1 if failing else 0


def examine(flags: Sequence[str]) -> Iterator[Finding]:
    """Everything that is looked at, in order."""
    yield Finding("machine", f"{platform.platform()}, Python {platform.python_version()}")
    yield packages()
    if _missing():
        # All else is asked of them.
        return
    yield from device()
    yield from tools()
    yield from resolution(flags)


def packages() -> Finding:
    """Installed versions, and whether SGLang is one that BlendServe supports."""
    from blendserve.runtime import guard

    versions = []
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions.append(f"{name} {importlib.metadata.version(name)}")
    try:
        guard.check_version(guard.installed_sglang())
    except guard.UnsupportedSGLang as error:
        return Finding("packages", f"{', '.join(versions)}: {error}", fails=True)
    if _missing():
        text = f"{', '.join(versions)}: {' and '.join(_missing())} cannot be found; install again"
        return Finding("packages", text, fails=True)
    return Finding("packages", ", ".join(versions))


def _missing() -> list[str]:
    return [name for name in ("sglang", "torch") if importlib.util.find_spec(name) is None]


def device() -> Iterator[Finding]:
    """Driver and GPU, and the figures that jobs are planned with."""
    import torch

    from blendserve.planner import HardwareError
    from blendserve.runtime.cpu_platform import needs_cpu_engine
    from blendserve.runtime.device import choose_hardware, first_gpu

    built = torch.version.cuda
    driver, supports = driver_versions()
    gpu = first_gpu()
    # A GPU is there and cannot be used: the CPU engine would start in its place, unasked.
    unusable = gpu is not None and needs_cpu_engine() and not _cpu_asked()
    text = f"NVIDIA {driver}, for CUDA up to {supports}" if driver else "no NVIDIA driver"
    text += f"; this PyTorch is built for {f'CUDA {built}' if built else 'CPUs'}"
    if unusable:
        text += ", and cannot use the GPU: update the driver, or install as `make setup-gpu` does"
    yield Finding("driver", text, fails=unusable)
    if gpu is not None:
        yield Finding(
            "device",
            f"{gpu.name}, compute capability {gpu.capability[0]}.{gpu.capability[1]}, "
            f"{gpu.memory_bytes / 1e9:.0f} GB; {visible_gpus()} usable by PyTorch",
        )
    elif not needs_cpu_engine():
        yield Finding("device", "an accelerator that is not NVIDIA's: not tested")
    else:
        yield Finding("device", f"CPU, {os.cpu_count()} cores: the CPU engine serves")
    try:
        row = choose_hardware(os.environ.get("BLENDSERVE_HARDWARE", "auto"))
    except HardwareError as error:
        yield Finding("figures", str(error), fails=True)
    else:
        yield Finding(
            "figures",
            f"{row.name}: {row.compute_flops / 1e12:.3g} TFLOP/s, "
            f"{row.bandwidth_bytes / 1e9:.0f} GB/s ({row.source})",
        )


def _cpu_asked() -> bool:
    return os.environ.get("SGLANG_USE_CPU_ENGINE") == "1"


def visible_gpus() -> int:
    """GPUs that this process may use."""
    import torch

    return torch.cuda.device_count()


def driver_versions() -> tuple[str, str]:
    """The driver's version and the newest CUDA it runs; empty without a driver."""
    try:
        import pynvml as nvml  # type: ignore[import-untyped, unused-ignore]

        nvml.nvmlInit()
        number = nvml.nvmlSystemGetCudaDriverVersion_v2()
        return nvml.nvmlSystemGetDriverVersion(), f"{number // 1000}.{number % 1000 // 10}"
    except Exception:  # The library is missing, or has no driver to ask: an exception per code.
        return "", ""


def tools() -> Iterator[Finding]:
    """What is compiled at run time, and by what."""
    from blendserve.runtime.cpu_platform import needs_cpu_engine
    from sgl_kernel_ext import cpu

    if needs_cpu_engine():
        reason = cpu.unavailable_reason()
        yield Finding("kernels", f"SGLang's CPU attention, because {reason}" if reason else "ours")
        return
    prebuilt = importlib.util.find_spec("flashinfer_jit_cache") is not None
    for tool, why in (
        ("nvcc", "FlashInfer compiles kernels at first use: install the CUDA toolkit, version 13"),
        ("ninja", "FlashInfer builds with it: pip install ninja"),
    ):
        found = shutil.which(tool) or _in_toolkit(tool)
        yield Finding(tool, found or f"not found. {why}", fails=not (found or prebuilt))
    flashinfer = importlib.util.find_spec("flashinfer") is not None
    yield Finding(
        "kernels",
        "SGLang's; ours, for steps that gain, with --attention-backend blend: "
        + ("FlashInfer's POD and cascade, Triton behind them" if flashinfer else "Triton"),
    )


def _in_toolkit(tool: str) -> str | None:
    homes = (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda")
    places = (os.path.join(home, "bin", tool) for home in homes if home)
    return next((place for place in places if os.access(place, os.X_OK)), None)


def resolution(flags: Sequence[str]) -> Iterator[Finding]:
    """What SGLang makes of the flags here, in a process that is thrown away."""
    done = subprocess.run(
        [sys.executable, *_RESOLVE, *flags],
        capture_output=True, text=True, timeout=_RESOLVE_SECONDS, check=False,
    )  # fmt: skip
    said = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    if done.returncode or not said:
        lines = [line for line in done.stderr.strip().splitlines() if line.strip()]
        yield Finding("flags", lines[-1] if lines else f"status {done.returncode}", fails=True)
        return
    shown = json.loads(said[-1][len(MARK) :])
    here = shown.pop("ranks") // shown.pop("nnodes")
    if str(shown["device"]).startswith("cuda") and here > (there := visible_gpus()):
        yield Finding("ranks", f"{here} GPUs are asked for on this node, {there} are usable", True)
    yield Finding("flags", ", ".join(f"{name} {value}" for name, value in shown.items()))
    for name, why in reasons(shown):
        yield Finding(name, why)


def resolve(argv: Sequence[str]) -> int:
    """In the process of `resolution`: print SGLang's resolved settings, or why there are none."""
    from blendserve.cli.serve import engine_flags, expected_errors

    try:
        flags, parser = engine_flags(argv, behind_front=False)
    except expected_errors() as error:
        print(error, file=sys.stderr)
        return 1
    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import prepare_server_args

    from blendserve.runtime import arguments

    load_plugins()
    parser.parse_args(flags)
    settings = prepare_server_args(flags)
    getattr(settings, "resolve_once", lambda: None)()
    settings.check_server_args()
    seen = arguments.resolved(settings)
    shown = {name: getattr(seen, name, None) for name in arguments.SHOWN}
    replicas = 1 if seen.enable_dp_attention else seen.dp_size
    shown["ranks"], shown["nnodes"] = seen.tp_size * seen.pp_size * replicas, seen.nnodes
    shown["prefill_graphs"], shown["decode_graphs"] = arguments.graph_backends(seen)
    shown["decode_graphs_up_to"] = arguments.most_graphed_decodes(seen)
    print(MARK + json.dumps(shown, default=str), flush=True)
    return 0


def reasons(shown: dict[str, object]) -> Iterator[tuple[str, str]]:
    """Why the settings that matter most to a job are what they are."""
    on_gpu = str(shown["device"]).startswith("cuda")
    apart = "prefill and decode have steps of their own"
    yield (
        "steps",
        "prefill and decode share steps: one is bound by compute, the other by memory"
        if shown["enable_mixed_chunk"]
        else (apart if on_gpu else f"{apart}: a CPU has no idle units to overlap them on"),
    )
    yield (
        "overlap",
        "off: steps run in the scheduler itself, there is nothing to overlap"
        if shown["disable_overlap_schedule"]
        else "on: the next step is scheduled while the GPU computes this one",
    )
    yield (
        "cache",
        "ours: evicts what the plan needs last"
        if shown["radix_cache_backend"] == "blendserve"
        else f"SGLang's {shown['radix_cache_backend'] or 'own'}: least recently used",
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
