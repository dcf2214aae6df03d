"""FlashInfer's own planner, compiled, asked for the workspace of thousands of steps: it is never
more than `plan_bytes` says.

    python test/gpu/flashinfer_workspace.py [--data FOLDER/flashinfer/data] [--log FILE]

Needs nvcc and the headers of the flashinfer-python wheel, and no GPU: a stand-in for the CUDA
runtime says how many multiprocessors there are. `make test-flashinfer-workspace`
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from sgl_kernel_ext.batch import AttentionShape
from sgl_kernel_ext.gpu.flashinfer_steps import plan_bytes

HERE = Path(__file__).parent / "flashinfer_plan"
INCLUDES = ("include", "cccl/libcudacxx/include", "cccl/cub", "cccl/thrust")
MODELS = {
    "Llama-3.1-8B": (32, 8, 128), "Qwen2.5-7B": (28, 4, 128), "Llama-70B": (64, 8, 128),
    "Llama-70B, 4 ranks": (16, 2, 128), "heads of 256": (16, 8, 256), "heads of 64": (32, 8, 64),
    "no groups": (32, 32, 128),
}  # fmt: skip
# Multiprocessors, and the compute capability with which the planner asks.
CHIPS = {108: 80, 132: 90, 148: 90}
COLOCATED_UP_TO = 1_536  # query tokens up to which POD takes the decodes' CTAs off its own
CHUNKS = (28, 64, 120, 128, 250, 384, 512, 768, 1000, 1500, 2048, 4000)
PREFIXES = (0, 500, 2000, 4000, 16000)
DECODES, DECODE_LENGTHS = (1, 4, 8, 16, 32, 64, 128, 256), (60, 130, 600, 2048, 8000)
GROUPS, MEMBERS = (1, 2, 8, 40), (2, 8, 25, 64, 256)
SHARED, OWN = (64, 500, 2048, 8000, 32000), (1, 100, 600, 2000)


def build(data: Path, folder: Path) -> None:
    command = ["nvcc", "-std=c++17", "-O1", "-cudart", "shared"]
    command += [f"-I{data / include}" for include in INCLUDES]
    subprocess.run([*command, str(HERE / "plan.cu"), "-o", str(folder / "plan")], check=True)
    stub = ["cc", "-shared", "-fPIC", str(HERE / "cudart_stub.c"), "-o", str(folder / "stub.so")]
    subprocess.run(stub, check=True)


class Planner:
    """One process of the compiled planner, for one number of multiprocessors."""

    def __init__(self, folder: Path, multiprocessors: int) -> None:
        self._process = subprocess.Popen(
            [str(folder / "plan")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={
                **os.environ,
                "SMS": str(multiprocessors),
                "CC": str(CHIPS[multiprocessors]),
                "LD_PRELOAD": str(folder / "stub.so"),
            },
        )

    def __call__(
        self, shape: tuple[int, int, int], query: list[int], kv: list[int], colocated: int = 0
    ) -> tuple[int, int]:
        """(float workspace bytes, padded batch size)"""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        rows = [*shape, colocated, len(query)], query, kv
        self._process.stdin.write("\n".join(" ".join(map(str, row)) for row in rows) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline().split()
        if len(answer) < 3:
            sys.exit("the planner ended; is the CUDA runtime's library on the path?")
        return int(answer[0]), int(answer[2])


def worst(plan: Planner, shape: tuple[int, int, int]) -> tuple[int, int]:
    """(most bytes that a plan asks for, steps)"""
    most = steps = 0
    for chunk, prefix, decodes, length in itertools.product(
        CHUNKS, PREFIXES, DECODES, DECODE_LENGTHS
    ):
        decode, padded = plan(shape, [1] * decodes, [length] * decodes)
        colocated = padded if chunk <= COLOCATED_UP_TO else 0
        prefill, _ = plan(shape, [chunk], [chunk + prefix], colocated)
        most, steps = max(most, decode, prefill), steps + 1
    for groups, members, shared, own in itertools.product(GROUPS, MEMBERS, SHARED, OWN):
        upper, _ = plan(shape, [members] * groups, [shared] * groups)
        lower, _ = plan(shape, [1] * (members * groups), [own] * (members * groups))
        most, steps = max(most, upper, lower), steps + 1
    return most, steps


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    found = importlib.util.find_spec("flashinfer")
    installed = Path(found.origin).parent / "data" if found and found.origin else None
    parser.add_argument("--data", type=Path, default=installed, required=installed is None)
    parser.add_argument("--log", type=Path)
    options = parser.parse_args()
    lines, over = [], 0
    with tempfile.TemporaryDirectory() as folder:
        build(options.data, Path(folder))
        for (model, shape), chip in itertools.product(MODELS.items(), CHIPS):
            most, steps = worst(Planner(Path(folder), chip), shape)
            bound = plan_bytes(AttentionShape(*shape, scale=1.0), chip)
            over += most > bound
            lines.append(f"{model}, {chip} multiprocessors: {most} of {bound} in {steps} steps")
            print(lines[-1], flush=True)
    lines.append(f"{over} over")
    print(lines[-1])
    if options.log:
        options.log.write_text("\n".join(lines) + "\n")
    return 1 if over else 0


if __name__ == "__main__":
    sys.exit(main())
