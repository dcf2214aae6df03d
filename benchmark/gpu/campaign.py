"""Ten minutes of a GPU into figures: everything worth measuring, the most valuable first.

    python benchmark/gpu/campaign.py --out FOLDER [--minutes 10] [--packed FOLDER-OF-WHEELS]
    python benchmark/gpu/campaign.py --out FOLDER --dry-run        # on a CPU, under two minutes

Each step is a process of its own with its own time limit; it writes its rows as they come, so a
step that hangs or crashes costs only itself and keeps what it had. `campaign.json` says how each
step ended; `hardware.json` holds the measured ceilings and names the file of kernel times, for
`--hardware`. Nothing is downloaded: `--packed` installs the wheels that `pack.py` has put into a
folder.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
DISTRIBUTION = {
    "METADATA": "Metadata-Version: 2.1\nName: blendserve\nVersion: 0.1.0\n",
    "entry_points.txt": "[sglang.srt.plugins]\nblendserve = blendserve.runtime.plugin:activate\n"
    "[sglang.srt.platforms]\nblendserve_cpu = blendserve.runtime.cpu_platform:activate\n",
}
KERNELS = "kernels.npz"  # what the step `costs` leaves, beside hardware.json
_ENDING_SECONDS = 10.0
_DRY_STEP_SECONDS = 180.0


@dataclass(frozen=True)
class Step:
    """A command, and the seconds that it may take. Tuned steps try every candidate of a kernel."""

    name: str
    seconds: float
    command: tuple[str, ...]
    tuned: bool = False


def measurement(name: str, seconds: float, tuned: bool = False) -> Step:
    return Step(name, seconds, (str(HERE / "measurements.py"), name), tuned)


# Of end_to_end.py; the last is what may be lost for want of time.
SIDES = ("dfs", "blend", "fcfs")
STEPS = (
    measurement("runs", 60),
    measurement("ceilings", 30),
    measurement("decode", 75, tuned=True),
    measurement("blended", 75),
    measurement("shared", 60),
    measurement("graph", 40),
    measurement("copies", 30),
    measurement("interference", 40),
    Step("end-to-end", 240, (str(HERE / "end_to_end.py"), "--layers", "8", "--sides", *SIDES)),
    measurement("costs", 60),
    measurement("pod", 120),
)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--minutes", type=float, default=10.0, help="all steps together")
    parser.add_argument("--steps", nargs="+", choices=[step.name for step in STEPS])
    parser.add_argument("--packed", type=Path, help="folder that pack.py has filled")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes, on a CPU")
    options = parser.parse_args(argv)
    chosen = [step for step in STEPS if not options.steps or step.name in options.steps]
    if options.dry_run:
        # What a GPU needs says nothing of a CPU that may be busy with other things.
        chosen = [replace(step, seconds=_DRY_STEP_SECONDS) for step in chosen]
    with tempfile.TemporaryDirectory() as folder:
        environment = prepare(Path(folder), options.packed, options.dry_run)
        return run(chosen, options.out, environment, 60 * options.minutes)


def prepare(folder: Path, packed: Path | None, dry_run: bool) -> dict[str, str]:
    """The environment of the steps: our code as an installed distribution, and packed wheels."""
    described = folder / "site" / "blendserve-0.1.0.dist-info"
    described.mkdir(parents=True)
    for name, text in DISTRIBUTION.items():
        (described / name).write_text(text)
    places = [str(described.parent), str(ROOT / "python"), str(ROOT), str(HERE)]
    environment = {**os.environ}
    if packed is not None:
        wheels = folder / "wheels"
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps"]
        found = [str(path) for path in sorted(packed.glob("*.whl"))]
        subprocess.run([*command, "--no-compile", "--target", str(wheels), *found], check=True)
        places.append(str(wheels))
        if (packed / "flashinfer").is_dir():
            # Its kernels, compiled beforehand.
            environment["FLASHINFER_WORKSPACE_BASE"] = str(packed / "flashinfer")
    if dry_run:
        environment |= {"CAMPAIGN_DRY_RUN": "1", "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "2"}
    before = environment.get("PYTHONPATH")
    environment["PYTHONPATH"] = os.pathsep.join([*places, *([before] if before else [])])
    return environment


def run(steps: Sequence[Step], out: Path, environment: dict[str, str], seconds: float) -> int:
    """Run the steps one after the other; 0 if all went well.

    Args:
        out: folder for the rows of each step, its log, and campaign.json.
        seconds: for all; what does not fit is not begun.
    """
    out.mkdir(parents=True, exist_ok=True)
    summary: dict[str, Any] = {"steps": {}}
    begun = time.monotonic()
    for step in steps:
        left = seconds - (time.monotonic() - begun)
        if left < min(step.seconds, 15.0):
            ended: dict[str, Any] = {"status": "not begun: no time left"}
        else:
            print(f"== {step.name} (at most {min(step.seconds, left):.0f} s)", flush=True)
            ended = one(step, out, environment, min(step.seconds, left))
        summary["steps"][step.name] = ended
        summary.setdefault("device", described(out, environment))
        _write(out / "campaign.json", summary)
        print(f"   {ended['status']}", flush=True)
    ceilings = out / "ceilings.jsonl"
    if ceilings.exists():
        found = measured_hardware(ceilings, summary["device"])
        if (out / KERNELS).exists():
            found["hardware"]["kernels"] = KERNELS
        _write(out / "hardware.json", found)
    return 0 if all(e["status"] == "done" for e in summary["steps"].values()) else 1


def one(step: Step, out: Path, environment: dict[str, str], seconds: float) -> dict[str, Any]:
    """One step, in a process group of its own that does not outlive its limit."""
    environment = {**environment, "SGL_KERNEL_EXT_TUNE": str(int(step.tuned))}
    start = time.monotonic()
    log = out / f"{step.name}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, *step.command, "--out", str(out)],
            env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            code = process.wait(seconds)
            status = "done" if code == 0 else f"ended with status {code}"
        except subprocess.TimeoutExpired:
            status = f"stopped after {seconds:.0f} s"
        finally:
            # Also what a step has left behind.
            _end(process)
    rows = out / f"{step.name}.jsonl"
    count = len(rows.read_text().splitlines()) if rows.exists() else 0
    tail = log.read_text(errors="replace").splitlines()[-5:]
    taken = round(time.monotonic() - start, 1)
    return {"status": status, "seconds": taken, "rows": count, "last_words": tail}


def _end(process: subprocess.Popen[bytes]) -> None:
    for sign in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, sign)
        except ProcessLookupError:
            break
        try:
            process.wait(_ENDING_SECONDS)
        except subprocess.TimeoutExpired:
            continue
    process.wait()


def described(out: Path, environment: dict[str, str]) -> Any:
    """What is measured on, asked in a process of its own: this one must not hold the GPU."""
    asked = "import json, report; print(json.dumps(report.device_report()))"
    try:
        said = subprocess.run(
            [sys.executable, "-c", asked], env=environment, cwd=out, capture_output=True, text=True,
            timeout=60,
        )  # fmt: skip
        return json.loads(said.stdout.splitlines()[-1])
    except (subprocess.TimeoutExpired, IndexError, ValueError) as error:
        return {"error": f"{type(error).__name__}: {error}"}


def measured_hardware(ceilings: Path, device: Any) -> dict[str, Any]:
    """A file for --hardware: what this chip reached, in place of its datasheet."""
    row = json.loads(ceilings.read_text().splitlines()[-1])
    return {
        "hardware": {
            "name": f"{device.get('device', 'unknown')}, measured",
            "compute_flops": row["gemm_tflop_s"] * 1e12,
            "bandwidth_bytes": row["copy_gb_s"] * 1e9,
            "memory_bytes": device.get("memory_bytes", 80e9),
            "source": f"benchmark/gpu/campaign.py, {device.get('date', '')}",
        }
    }


def _write(path: Path, body: dict[str, Any]) -> None:
    """Whole or not at all: the machine may go away at any moment."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(body, indent=1) + "\n")
    part.replace(path)


if __name__ == "__main__":
    sys.exit(main())
