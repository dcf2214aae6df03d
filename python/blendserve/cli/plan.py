"""``blendserve plan``: what a job will cost and how it will be ordered, before any GPU runs."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from blendserve.cli.arguments import positive, price
from blendserve.cli.engine_flags import KNOWN, add_engine_flags, engine_of
from blendserve.cli.job_file import Encoder, JobFileError, read_job_file
from blendserve.cli.plan_costs import job_costs
from blendserve.cli.plan_report import (
    PREDICTED_WORLD,
    PlanError,
    Report,
    finite,
    quartiles,
    warnings,
)
from blendserve.planner import (
    MODEL_SPECS,
    HardwareError,
    Job,
    MediaRuns,
    ModelSpecError,
    PlannerConfig,
    make_plan,
    partition,
    predict,
)
from blendserve.planner.prediction import dual_scan_sequence


def main(argv: Sequence[str], leave_out: Callable[[int, str], None] | None = None) -> int:
    """Exit status: 0 planned, 1 the job or an output file is at fault, 2 wrong usage.

    leave_out: see `read_job_file`.
    """
    options = _parse(argv)
    try:
        _check_outputs(options)
        report = _report(options, leave_out)
        if options.order:
            _write_order(options.order, report, options.dp)
        if options.plot:
            from blendserve.cli.plan_plot import draw

            draw(options.plot, report)
    except (PlanError, JobFileError, OSError, ImportError) as error:
        print(f"blendserve plan: {error}", file=sys.stderr)
        return 1
    except (ModelSpecError, HardwareError) as error:
        print(f"blendserve plan: {error}", file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps(as_json(report), indent=2))
        for warning in warnings(report):
            print(f"warning: {warning}", file=sys.stderr)
    else:
        from blendserve.cli.plan_text import as_text

        print(as_text(report))
    return 0


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="blendserve plan",
        description="Plan a job without running it: sharing, density, predicted time, order.",
        epilog=KNOWN,
        allow_abbrev=False,
    )
    parser.add_argument(
        "-i",
        "--input",
        type=Path,
        required=True,
        help='OpenAI batch file, or lines {"id", "input_ids", "output_len"?}',
    )
    add_engine_flags(parser)
    parser.add_argument("--dp", type=positive, default=1, help="replicas (default: 1)")
    parser.add_argument(
        "--tokenizer",
        metavar="FOLDER|NAME",
        help="for lines with text; default: that of --model-spec",
    )
    default = PlannerConfig.sample_fraction
    parser.add_argument(
        "--sample-fraction",
        type=_fraction,
        default=default,
        metavar="F",
        help=f"share of the requests to run first for their output lengths (default: {default})",
    )
    parser.add_argument(
        "--price-per-hour", type=price, metavar="P", help="of one device: what will the job cost?"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw the tree and the run")
    parser.add_argument("--order", type=Path, metavar="JSONL", help="write the planned order")
    return parser.parse_args(list(argv))


def _fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0.0 <= value <= 1.0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number between 0 and 1")
    return value


def _check_outputs(options: argparse.Namespace) -> None:
    """Before minutes of work: the input may not be overwritten, the folders must be there."""
    outputs = [path for path in (options.plot, options.order) if path is not None]
    resolved = [path.resolve() for path in (options.input, *outputs)]
    if len(set(resolved)) < len(resolved):
        raise PlanError("-i, --plot and --order must be different files")
    for path in outputs:
        if path.is_dir():
            raise PlanError(f"{path} is a folder; give the name of a file in it")
        if not path.parent.is_dir():
            raise PlanError(f"the folder of {path} does not exist; make it first")
    if options.plot is not None and options.plot.suffix.lower() != ".png":
        raise PlanError(f"--plot {options.plot}: the picture is a PNG; give it a name in .png")


def _report(options: argparse.Namespace, leave_out: Callable[[int, str], None] | None) -> Report:
    try:
        cost_model, capacity = engine_of(options)
    except (ModelSpecError, HardwareError):
        raise
    except ValueError as error:
        raise PlanError(str(error)) from error
    context = cost_model.model.context_length
    job_file = read_job_file(options.input, context, lambda: _encoder(options), leave_out)
    if not job_file.ids:
        raise PlanError(
            f"{options.input}: none of its lines can be planned: {len(job_file.too_long)} are too "
            f"long for the {context} tokens of {cost_model.model.name}, {len(job_file.media)} have "
            f"media that cannot be counted {job_file.media_fault}".rstrip()
        )
    job = Job(
        token_ids=job_file.token_ids,
        max_output_tokens=np.array(job_file.max_output_tokens),
        known_output_tokens=np.array(job_file.known_output_tokens),
        media=MediaRuns(*np.array(job_file.runs, dtype=np.int64).reshape(-1, 3).T),
    )
    started = time.perf_counter()
    config = PlannerConfig(sample_fraction=options.sample_fraction)
    tree = job.build_tree().paged(options.page_size)
    plan = make_plan(job, cost_model, config, tree=tree)
    parts = partition(plan, options.dp, cost_model)
    plan_seconds = time.perf_counter() - started
    return Report(
        job=job_file,
        cost_model=cost_model,
        capacity_tokens=capacity,
        plan=plan,
        parts=parts,
        prediction=predict(plan, cost_model, capacity, parts.plans),
        plan_seconds=plan_seconds,
        devices=options.tp,
        price_per_hour=options.price_per_hour,
    )


def _encoder(options: argparse.Namespace) -> Encoder:
    from blendserve.cli.tokenizer import ModelTokenizer

    spec = options.model_spec
    name = options.tokenizer
    if name is None and spec.lower() == "smollm2-135m":
        name = "smollm2-135m"
    if name is None and spec.lower() not in MODEL_SPECS:
        name = spec
    if name is None:
        raise JobFileError(
            f"{options.input} holds text, and {spec} is known here by its sizes only: name a "
            "folder with the model's tokenizer.json with --tokenizer, or give token ids "
            '({"id", "input_ids"}) in place of text'
        )
    return ModelTokenizer(name)


def as_json(report: Report) -> dict[str, Any]:
    """The figures of a job, with fixed keys. A density without bound (no decoding) is null."""
    plan, prediction = report.plan, report.prediction
    return {
        "requests": len(plan.order),
        "prompt_tokens": plan.prompt_tokens,
        "unique_tokens": plan.unique_tokens,
        "sharing": {
            "best": plan.sharing_best,
            "random": prediction.sharing_random,
            "planned": prediction.sharing_planned,
        },
        "density": {
            "job": finite(plan.target_density),
            **{name: finite(value) for name, value in quartiles(plan).items()},
        },
        "predicted_seconds": {
            "fcfs": prediction.fcfs_seconds,
            "dfs": prediction.dfs_seconds,
            "blend": prediction.blend_seconds,
            "bound": prediction.bound_seconds,
        },
        "cost": dataclasses.asdict(job_costs(report)),
        "predicted_world": PREDICTED_WORLD,
        "costs": report.cost_model.step_costs.source,
        "plan_seconds": report.plan_seconds,
    }


def _write_order(path: Path, report: Report, replicas: int) -> None:
    """One line per request, in planned order: side is the scanner that will take it. With several
    replicas, theirs one after the other, each with its own ranks."""
    job, output = report.job, report.plan.estimated_output_tokens
    with path.open("w", encoding="utf-8") as stream:
        for replica, plan in enumerate(report.parts.plans):
            order, from_left = dual_scan_sequence(plan)
            left = set(order[from_left].tolist())
            for rank, request in enumerate(plan.order.tolist()):
                line: dict[str, Any] = {
                    "id": job.ids[request],
                    "rank": rank,
                    "side": "left" if request in left else "right",
                    "estimated_output_len": round(float(output[request]), 1),
                }
                if replicas > 1:
                    line["replica"] = replica
                stream.write(json.dumps(line) + "\n")
