"""``blendserve simulate``: how long a job takes under several policies, on a modelled engine."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from blendserve.cli.arguments import positive
from blendserve.cli.engine_flags import KNOWN, add_engine_flags, engine_of
from blendserve.cli.job_file import JobFileError
from blendserve.cli.workload_file import read_workload
from blendserve.planner import (
    CostModel,
    HardwareError,
    ModelSpecError,
)
from blendserve.simulator.engine import EngineStuck
from blendserve.simulator.simulate import Policy, Result, Setting, Simulation
from blendserve.simulator.step_time import Overlap
from blendserve.simulator.workloads import WORKLOADS, UnknownWorkloadError, Workload, build

_KEYS = (
    "policy",
    "overlap",
    "requests",
    "tokens",
    "seconds",
    "throughput",
    "bound_seconds",
    "share_of_bound",
    "sharing",
    "sharing_best",
    "retractions",
    "steps",
)
_DEFAULT_POLICIES = (Policy.DFS, Policy.BLEND)
_TRACE_POINTS = 400


class SimulateError(RuntimeError):
    """Nothing can be simulated; the message says what to do."""


def main(argv: Sequence[str]) -> int:
    """Exit status: 0 simulated, 1 the job or an output file is at fault, 2 wrong usage."""
    options = _parse(argv)
    try:
        results = _simulate(options)
        if options.plot:
            _draw(options.plot, options.workload, results)
    except (SimulateError, JobFileError, EngineStuck, OSError, ImportError) as error:
        print(f"blendserve simulate: {error}", file=sys.stderr)
        return 1
    except (ModelSpecError, HardwareError, UnknownWorkloadError) as error:
        print(f"blendserve simulate: {error}", file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps([as_json(result) for result in results], indent=2))
    else:
        print(as_text(results))
    return 0


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="blendserve simulate",
        description="Simulate a job on a modelled engine, under one policy after the other.",
        epilog=f"Workloads by name: {', '.join(WORKLOADS)}, or COMPUTE[+MEMORY]:DENSITY:SHARING. "
        f"Policies: {', '.join(Policy)}. {KNOWN}",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--workload",
        required=True,
        metavar="NAME|FILE",
        help='a name, lines {"id", "input_ids", "output_len"}, or a .csv of lengths',
    )
    parser.add_argument("--requests", type=positive, default=40_000, help="of a named workload")
    add_engine_flags(parser)
    parser.add_argument(
        "--policy",
        type=_policies,
        default=list(_DEFAULT_POLICIES),
        metavar="NAME[,NAME...]",
        help=f"policies, or all (default: {','.join(_DEFAULT_POLICIES)})",
    )
    parser.add_argument(
        "--overlap",
        choices=list(Overlap),
        type=Overlap,
        default=Overlap.INTERFERENCE,
        help="how compute and memory operators share the device (default: interference)",
    )
    parser.add_argument(
        "--shared-decode",
        action="store_true",
        help="decode attention reads prefixes that running requests share once a step for all",
    )
    parser.add_argument("--dp", type=positive, default=1, help="replicas, for the policy blend")
    parser.add_argument(
        "--sampling",
        type=_fraction,
        default=0.01,
        metavar="F",
        help="share of the requests sampled for their output lengths; 1: all are known",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the workload and the sample")
    parser.add_argument("--json", action="store_true", help="print one JSON list")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw throughput and the runs")
    options = parser.parse_args(list(argv))
    if options.dp > 1 and options.policy != [Policy.BLEND]:
        parser.error("--dp is simulated for the policy blend only: give --policy blend")
    return options


def _fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0.0 < value <= 1.0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0 and at most 1")
    return value


def _policies(text: str) -> list[Policy]:
    if text == "all":
        return list(Policy)
    try:
        return [Policy(name) for name in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{error}; use {', '.join(Policy)} or all") from error


def _simulate(options: argparse.Namespace) -> list[Result]:
    if options.plot is not None:
        if options.plot.suffix.lower() != ".png":
            raise SimulateError(f"--plot {options.plot}: the picture is a PNG; name it so")
        if not options.plot.parent.is_dir():
            raise SimulateError(f"the folder of {options.plot} does not exist; make it first")
    try:
        cost_model, capacity = engine_of(options)
    except (ModelSpecError, HardwareError):
        raise
    except ValueError as error:
        raise SimulateError(str(error)) from error
    for caveat in cost_model.model.caveats:
        print(f"warning: {caveat}", file=sys.stderr)
    simulation = Simulation(_workload(options, cost_model), options.page_size)
    steps = len(simulation.workload) * 8 // _TRACE_POINTS if options.plot else 0
    results = []
    for policy in options.policy:
        setting = Setting(
            cost_model=cost_model,
            policy=policy,
            overlaps=(options.overlap,),
            sampling=options.sampling,
            replicas=options.dp,
            capacity=capacity,
            shared_decode=options.shared_decode,
            seed=options.seed,
            trace_every=max(steps, 1) if options.plot else 0,
        )
        results += simulation.run(setting)
    return results


def _workload(options: argparse.Namespace, cost_model: CostModel) -> Workload:
    path = Path(options.workload)
    if path.is_file():
        return read_workload(path, cost_model.model.context_length)
    if ":" not in options.workload and (path.suffix or len(path.parts) > 1):
        raise SimulateError(f"{path}: no such file; give the path of a .jsonl or .csv, or a name")
    try:
        return build(options.workload, options.requests, options.seed)
    except UnknownWorkloadError:
        raise
    except ValueError as error:
        raise SimulateError(str(error)) from error


def as_json(result: Result) -> dict[str, Any]:
    """The figures of one policy, with fixed keys."""
    found = asdict(result)
    return {key: found[key] for key in _KEYS}


def as_text(results: Sequence[Result]) -> str:
    """A table, one policy a line."""
    first = results[0]
    lines = [
        f"{first.requests:,} requests, {first.tokens:,} tokens, overlap {first.overlap}; no run "
        f"takes less than {first.bound_seconds:,.0f} s",
        "",
        f"{'policy':14} {'seconds':>10} {'tokens/s':>10} {'of bound':>9} {'sharing':>8} "
        f"{'of best':>8} {'retracted':>9}",
    ]
    for result in results:
        best = result.sharing / result.sharing_best if result.sharing_best else 1.0
        lines.append(
            f"{result.policy:14} {result.seconds:10,.1f} {result.throughput:10,.0f} "
            f"{result.share_of_bound:9.1%} {result.sharing:8.1%} {best:8.1%} "
            f"{result.retractions:9,}" + (f"  {result.detail}" if result.detail else "")
        )
    return "\n".join(lines)


def _draw(path: Path, name: str, results: Sequence[Result]) -> None:
    try:
        import matplotlib
    except ImportError as error:
        raise SimulateError("--plot needs the package matplotlib; install it") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    axes[0].barh([r.policy for r in results], [r.share_of_bound for r in results], color="#4878a8")
    axes[0].axvline(1.0, color="black", linewidth=0.8)
    axes[0].set_xlabel("throughput / bound")
    axes[0].invert_yaxis()
    for result in results:
        seconds = [point[0] for point in result.trace]
        part = [point[1] / (point[1] + point[2]) for point in result.trace]
        axes[1].plot(seconds, part, linewidth=0.8, label=result.policy)
    axes[1].set_xlabel("seconds")
    axes[1].set_ylabel("compute / (compute + memory) of a step")
    axes[1].legend(fontsize="small")
    figure.suptitle(f"{name}, overlap {results[0].overlap}")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
