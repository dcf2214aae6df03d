"""Random cases for the Triton kernels, run and compared; exits with 1 at the first wrong one.

python test/kernels/triton_cases.py --first 0 --count 300
"""

from __future__ import annotations

import argparse
import os
from dataclasses import replace

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    # Read when Triton is imported.
    os.environ["TRITON_INTERPRET"] = "1"

from kernel_cases import Case, case_with_empty_prompts, random_case  # noqa: E402

from sgl_kernel_ext import gpu, reference  # noqa: E402
from sgl_kernel_ext.plan import make_plan  # noqa: E402

LIMITS = {"float32": 1e-5, "bfloat16": 2e-2, "float16": 2e-3}


def in_dtype(case: Case, dtype: torch.dtype) -> Case:
    return replace(
        case,
        query=case.query.to(dtype).to(DEVICE),
        key_pool=case.key_pool.to(dtype).to(DEVICE),
        value_pool=case.value_pool.to(dtype).to(DEVICE),
        slot_table=case.slot_table.to(DEVICE),
    )


def error(case: Case, workers: int, share: bool) -> float:
    tiling = gpu.tiling(case.shape)
    # So that small cases are cut as well.
    tiling = replace(tiling, min_split_tokens=16, query_tile=min(tiling.query_tile, 8))
    plan = make_plan(case.batch, case.shape, tiling, workers, case.lookup if share else None)
    tensors = (case.query, case.key_pool, case.value_pool, case.slot_table)
    output = case.poisoned_output()
    gpu.run(gpu.to_device(plan, case.shape, DEVICE), case.shape, *tensors, output)
    expected = reference.attention(*tensors, case.batch, case.shape)
    return reference.relative_error(output, expected)


def ran(case: Case) -> float:
    """0.0: a step without a query token has no error, once it is through."""
    plan = make_plan(case.batch, case.shape, gpu.tiling(case.shape), 2, case.lookup)
    tensors = (case.query, case.key_pool, case.value_pool, case.slot_table)
    on_device = gpu.to_device(plan, case.shape, DEVICE)
    gpu.run(on_device, case.shape, *tensors, case.poisoned_output())
    return 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--dtype", choices=LIMITS, default="float32")
    options = parser.parse_args()
    for query_lens in ([0, 1, 5], [0, 0]):
        case = in_dtype(case_with_empty_prompts(1, query_lens), getattr(torch, options.dtype))
        found = error(case, workers=2, share=True) if any(query_lens) else ran(case)
        if not found < LIMITS[options.dtype]:
            raise SystemExit(f"queries {query_lens}: relative error {found}")
    worst = 0.0
    for seed in range(options.first, options.first + options.count):
        case = in_dtype(random_case(seed, small=DEVICE == "cpu"), getattr(torch, options.dtype))
        found = error(case, workers=(1, 4)[seed % 2], share=seed % 4 > 0)
        if not found < LIMITS[options.dtype]:
            raise SystemExit(f"case {seed}: relative error {found}, {case.shape}, {case.batch}")
        worst = max(worst, found)
    print(f"{options.count} cases in {options.dtype} on {DEVICE}, worst relative error {worst:.2e}")


if __name__ == "__main__":
    main()
