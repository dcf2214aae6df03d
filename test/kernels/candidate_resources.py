"""What each tune candidate of the Triton kernels takes on an architecture: compiled, not run.

    python test/kernels/candidate_resources.py [--arch 80 90 100] [--json FILE]

Uses the assembler that Triton brings; needs no GPU. Ends with 1 if a candidate does not fit, spills
over 1 KB, or, of the decode kernels, holds no second buffer of keys and values.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sgl_kernel_ext.batch import AttentionShape
from sgl_kernel_ext.gpu import kernels
from sgl_kernel_ext.gpu.attention import many_rows

# Bytes of shared memory that a program may have; CUDA C programming guide, compute capabilities.
SHARED_LIMIT = {80: 166_912, 90: 232_448, 100: 232_448}
REGISTERS, THREADS, RESERVED_SHARED = 65_536, 2_048, 1_024  # of a multiprocessor; per program
MAX_SPILL_BYTES = 1_024
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_TYPES = {
    **dict.fromkeys(("query", "key_pool", "value_pool", "output"), "*bf16"),
    **dict.fromkeys(("query_stride", "slot_stride", "window"), "i32"),
    **dict.fromkeys(("scale", "soft_cap"), "fp32"),
    **dict.fromkeys(("items", "rows", "slots", "merged_query", "merge_begin"), "*i32"),
    **dict.fromkeys(("partials", "partial_stats"), "*fp32"),
}
SHAPES = {
    64: AttentionShape(32, 8, 64, scale=0.125),
    128: AttentionShape(32, 8, 128, scale=0.1),
    256: AttentionShape(16, 8, 256, scale=0.1),
}


@dataclass(frozen=True)
class Resources:
    """One candidate, compiled for one architecture and head size."""

    kernel: str
    head_dim: int
    arch: int
    few_tile: int
    many_tile: int
    warps: int
    stages: int
    shared: int
    registers: int
    spill_bytes: int  # stored and loaded
    ctas: int  # on a multiprocessor, by shared memory, registers and threads

    def faults(self) -> list[str]:
        found = []
        if self.shared > SHARED_LIMIT[self.arch]:
            found.append(f"{self.shared} bytes of shared memory")
        if self.spill_bytes > MAX_SPILL_BYTES:
            found.append(f"{self.spill_bytes} bytes spilled")
        # Keys and values of a tile, twice.
        if self.kernel == "decode_only" and self.shared < 8 * self.few_tile * self.head_dim:
            found.append(f"{self.shared} bytes hold no second tile of keys and values")
        return found


def resources(kind: str, head_dim: int, arch: int, config: triton.Config) -> Resources:
    """Compile one candidate as a launch would: pointers and strides that 16 divides."""
    shape = SHAPES[head_dim]
    function = getattr(kernels, kind).fn
    constants = {
        "HEADS": shape.heads,
        "KV_HEADS": shape.kv_heads,
        "HEAD_DIM": head_dim,
        "WIDTH": head_dim,
        "UPCAST": False,
        "HAS_FEW": kind != "prefill_only",
        "HAS_MANY": kind != "decode_only",
        "MANY_ROWS": many_rows(shape),
        **config.kwargs,
    }
    names = list(function.arg_names)
    signature = {name: _TYPES.get(name, "constexpr") for name in names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if signature[name].startswith("*") or name in ("query_stride", "slot_stride")
    }
    values = {(names.index(name),): value for name, value in constants.items()}
    compiled = triton.compile(
        ASTSource(function, signature, values, aligned),
        target=GPUTarget("cuda", arch, 32),
        options={"num_warps": config.num_warps, "num_stages": config.num_stages},
    )
    shared = int(compiled.metadata.shared)
    registers, spill = _assemble(compiled.asm["ptx"], arch)
    threads = 32 * config.num_warps
    return Resources(
        kind, head_dim, arch, config.kwargs["FEW_TILE"], config.kwargs["MANY_TILE"],
        config.num_warps, config.num_stages, shared, registers, spill,
        min(
            SHARED_LIMIT[arch] // (shared + RESERVED_SHARED),
            REGISTERS // (registers * threads),
            THREADS // threads,
        ),
    )  # fmt: skip


def _assemble(ptx: str, arch: int) -> tuple[int, int]:
    """Registers and spilled bytes, as the assembler says."""
    tool = _TOOLS / ("ptxas-blackwell" if arch >= 100 else "ptxas")
    tool = tool if tool.exists() else _TOOLS / "ptxas"
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as source:
        source.write(ptx)
        source.flush()
        target = f"--gpu-name=sm_{arch}{'a' if arch >= 90 else ''}"
        command = [str(tool), "-v", target, source.name, "-o", "/dev/null"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    used = re.search(r"Used (\d+) registers", said)
    spill = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said)
    assert used is not None
    return int(used[1]), int(spill[1]) + int(spill[2]) if spill else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90, 100], choices=SHARED_LIMIT)
    parser.add_argument("--head-dim", type=int, nargs="+", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found = []
    for kind, dim, arch in itertools.product(kernels.KINDS, options.head_dim, options.arch):
        for config in kernels.candidates(kind, dim):
            found.append(resources(kind, dim, arch, config))
            print(json.dumps(asdict(found[-1])), *found[-1].faults(), flush=True)
    faulty = [row for row in found if row.faults()]
    print(f"{len(found)} candidates compiled, {len(faulty)} with faults")
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in found], indent=1) + "\n")
    return 1 if faulty else 0


if __name__ == "__main__":
    sys.exit(main())
