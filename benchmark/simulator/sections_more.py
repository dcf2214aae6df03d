"""Sections of the page: other grids, replicas, sampling, ablation, models, costs."""

from __future__ import annotations

import json
from statistics import mean

from page import (
    NAMES,
    PAPER_COSTS,
    PAPER_DP,
    PAPER_GRIDS,
    RESULTS,
    TRACES,
    Run,
    one,
    pyplot,
    ratio,
    save,
    table,
)

from blendserve.planner import INTERFERENCE, CostModel
from blendserve.simulator.workloads import REFERENCE


def section_grids(runs: list[Run]) -> str:
    rows = []
    for trace in ("azure-code", "sharegpt", "wildchat"):
        ours, paper, shares = [], [], []
        for run in runs:
            if run["policy"] != "blend" or run["overlap"] != "interference":
                continue
            if not run["workload"].startswith(trace + ":"):
                continue
            dfs = one(runs, workload=run["workload"], policy="dfs")
            blended = one(runs, workload=run["workload"], policy="blend-paper")
            if dfs is None or blended is None:
                continue
            ours.append(ratio(run, dfs))
            paper.append(ratio(blended, dfs))
            shares.append(run["share_of_bound"])
        if ours:
            rows.append(
                [
                    trace + (" (synthetic)" if trace == "wildchat" else ""),
                    str(len(ours)),
                    f"{min(ours):.3f} to {max(ours):.3f}",
                    f"{mean(ours):.3f}",
                    f"{mean(paper):.3f}",
                    f"{100 * (mean(ours) - mean(paper)):+.1f} points",
                    f"{mean(shares):.1%}",
                    PAPER_GRIDS[trace],
                ]
            )
    if not rows:
        return ""
    head = ["trace + MMLU + OpenVid", "points", "ours / NanoFlow-DFS", "mean"]
    head += ["paper's blend / NanoFlow-DFS", "ours above it", "ours, of optimum", "paper"]
    return "## Azure, ShareGPT and WildChat grids\n\n" + table(head, rows)


def section_dp(runs: list[Run], main: list[Run]) -> str:
    rows = []
    for name in TRACES:
        first = one(main, workload=name, policy="blend")
        if first is None:
            continue
        found = {1: first} | {k: one(runs, workload=name, replicas=k) for k in (2, 4)}
        cells = [f"{run['throughput']:,.0f}" if run else "-" for run in found.values()]
        four = found[4]
        gain = f"{four['throughput'] / first['throughput']:.3f}" if four else "-"
        paper = PAPER_DP[name]
        reported = " / ".join(f"{value:,}" for value in paper)
        rows.append([name, *cells, gain, reported, f"{paper[2] / paper[0]:.3f}"])
    head = ["trace", "DP 1", "DP 2", "DP 4", "4 / 1", "paper: DP 1 / 2 / 4", "paper: 4 / 1"]
    return "## Data parallel, tokens/s\n\n" + table(head, rows)


def section_sampling(runs: list[Run]) -> str:
    rows = []
    for name in TRACES:
        cells = [name]
        for overlap in ("interference", "ideal"):
            sampled = one(runs, workload=name, policy="blend", overlap=overlap)
            known = one(runs, workload=name, policy="blend", overlap=overlap, sampling=1.0)
            if sampled is None or known is None:
                break
            cells += [
                f"{sampled['throughput']:,.0f}",
                f"{known['throughput']:,.0f}",
                f"{sampled['throughput'] / known['throughput'] - 1:+.1%}",
            ]
        else:
            rows.append(cells)
    head = ["trace", "1 % sampled", "all known", "difference"]
    head += ["ideal: 1 % sampled", "all known", "difference"]
    return (
        "## Lengths from a 1 % sample against known ones, tokens/s\n\nThe paper: comparable.\n\n"
        + table(head, rows)
    )


def section_ablation(runs: list[Run]) -> str:
    rows = []
    for off in ([], ["online"], ["paced"], ["distribution"], ["foresight"]):
        cells = []
        for name in TRACES:
            run = one(runs, workload=name, policy="blend", off=off)
            if run is None:
                break
            kept = run["sharing"] / run["sharing_best"]
            cells.append(f"{run['share_of_bound']:.1%} ({kept:.1%}, {run['retractions']:,})")
        else:
            rows.append([" ".join(off) or "nothing", *cells])
    if not rows:
        return ""
    return (
        "## What each addition is worth\n\nShare of the practical optimum with one addition "
        "switched off (in brackets: sharing kept, retractions); 80,000 requests, "
        "[what they are](simulator.md).\n\n" + table(["off", *TRACES], rows)
    )


def section_models(runs: list[Run]) -> str:
    rows = []
    for model in dict.fromkeys(run["model"] for run in runs):
        gains, shares = [], []
        for name in TRACES:
            ours = one(runs, workload=name, policy="blend", model=model)
            dfs = one(runs, workload=name, policy="dfs", model=model)
            if ours is None or dfs is None:
                break
            gains.append(ratio(ours, dfs))
            shares.append(ours["share_of_bound"])
        else:
            rows.append(
                [
                    model,
                    *(f"{gain:.3f}" for gain in gains),
                    f"{mean(gains):.3f}",
                    f"{mean(shares):.1%}",
                ]
            )
    if not rows:
        return ""
    head = ["model", *TRACES, "mean", "of the optimum"]
    return (
        "## Other models: ours over NanoFlow-DFS\n\nOn one A100, those of 67B to 72B on eight "
        "(tensor parallel, communication not counted); 40,000 requests. The paper: 70B 1.186 and "
        "90.8 % of the optimum; the others 1.152 on average, up to 1.244, and 89.9 %.\n\n"
        + table(head, rows)
    )


def section_reasoning(runs: list[Run]) -> str:
    rows = []
    for policy in ("dfs", "blend-paper", "blend"):
        run = one(runs, workload="reasoning", policy=policy)
        if run is not None:
            rows.append(
                [
                    NAMES[policy],
                    f"{run['throughput']:,.0f}",
                    f"{run['share_of_bound']:.1%}",
                    f"{run['sharing'] / run['sharing_best']:.1%}",
                    f"{run['retractions']:,}",
                ]
            )
    if not rows:
        return ""
    head = ["policy", "tokens/s", "of the optimum", "sharing kept", "retractions"]
    return (
        "## Reasoning\n\nNot in the paper: long chains of thought in place of video (synthetic, "
        "log-normal outputs with mean 6,000 and sigma 1) with Azure's conversations and MMLU, "
        "density 1.1, sharing 25 %.\n\n" + table(head, rows)
    )


def section_costs() -> str:
    """Per layer, as the paper's figures are of the order of a layer's."""
    costs = CostModel.attained(REFERENCE.model, REFERENCE.hardware).step_costs
    layers = REFERENCE.model.num_layers
    rows = []
    for batch, (gemm, measured_gemm, attention, measured_attention) in PAPER_COSTS.items():
        own_gemm = (costs.token_seconds(batch) + costs.sampled_seconds(batch)) / layers * 1e3
        own_attention = costs.decode_seconds(batch, batch * 1_024) / layers * 1e3
        rows.append(
            [
                str(batch),
                f"{own_gemm:.3f}",
                f"{gemm:.3f}",
                f"{measured_gemm:.3f}",
                f"{own_attention:.3f}",
                f"{attention:.3f}",
                f"{measured_attention:.3f}",
            ]
        )
    head = ["batch", "GEMM: ours", "paper's model", "paper measured"]
    head += ["attention: ours", "paper's model", "paper measured"]
    return (
        "## The cost model: ms per layer, sequences of 1,024 tokens\n\n"
        + table(head, rows)
        + "\nOurs are kernels as SGLang 0.5.10 runs them (small operators included), the paper's "
        "those of NanoFlow, whose decode attention attains four fifths of the bandwidth.\n"
    )


def plot_interference() -> str:
    figure, axes = pyplot.subplots(figsize=(4.2, 3), layout="constrained")
    shares, speeds = zip(*INTERFERENCE, strict=True)
    axes.plot([0, *shares, 1], [0, *speeds, 1], marker="o", markersize=3, color="#1f5fa8")
    axes.plot([0, 1], [0, 1], color="#999999", linewidth=0.8)
    axes.set_xlabel("share of the GPU for decode attention")
    axes.set_ylabel("its speed")
    return save(figure, "interference")


def section_effort(runs: list[Run]) -> str:
    """CPU time and memory of the largest runs."""
    rows = []
    for policy in dict.fromkeys(run["policy"] for run in runs):
        found = [run for run in runs if run["policy"] == policy]
        cpu = max(run["cpu_seconds"] + run["prepare_cpu_seconds"] for run in found)
        rows.append(
            [
                NAMES[policy],
                f"{max(run['requests'] for run in found):,}",
                f"{cpu:.0f}",
                f"{max(run['peak_gib'] for run in found):.2f}",
            ]
        )
    head = ["policy", "requests", "CPU seconds, workload and tree included", "peak GiB"]
    return (
        "## What a simulation takes\n\nThe four traces, the worst of them; all overlap models in "
        "one run, one core.\n\n" + table(head, rows)
    )


def section_real_engine() -> str:
    path = RESULTS / "real-engine.json"
    if not path.is_file():
        return ""
    found = json.loads(path.read_text())
    fit, jobs = found["calibration"], found["jobs"]
    rows = []
    for at, job in jobs.items():
        ratios = job["ratio"]
        rows += [
            [
                f"{at}: {job['blend']['requests']} requests, {job['pool_tokens']:,} tokens",
                name,
                f"{job[key]['seconds']:.1f}",
                f"{job['predicted'][key]['seconds']:.1f} ({job['errors'][key]:+.1%})",
                f"{job[key]['cached_tokens']:,}",
                f"{job['predicted'][key]['cached_tokens']:,}",
            ]
            for key, name in (("fcfs", "SGLang's FCFS, LRU"), ("blend", "blended"))
        ]
        predicted = f"{ratios['predicted']:.3f} ({ratios['error']:+.1%})"
        rows.append(["", "ratio", f"{ratios['measured']:.3f}", predicted, "", ""])
    head = [
        "job, KV memory",
        "policy",
        "seconds measured",
        "predicted",
        "prompt tokens found in the cache",
    ]
    return (
        "## The real engine, predicted\n\n"
        f"Measured and simulated: {found['model']} on a CPU ({found['device']}), the same "
        "attention for both policies. Terms of a step are fitted on the "
        f"{fit['steps']} steps of a job of {fit['requests']} requests in {fit['pool_tokens']:,} "
        f"tokens of KV memory, blended ({fit['variance_explained']:.0%} of the variance: "
        f"{1e3 * fit['token_seconds']:.2f} ms a token, {1e3 * fit['weight_seconds']:.0f} ms at "
        f"least, {1e6 * fit['context_seconds']:.0f} us per token of context, "
        f"{1e6 * fit['pair_seconds']:.2f} us per pair of prefill attention). They predict "
        f"{'another job' if len(jobs) == 1 else f'{len(jobs)} other jobs'}, errors in brackets.\n\n"
        + table([*head, "predicted"], rows)
    )


def section_ruled_out() -> str:
    found = json.loads((RESULTS / "ruled-out.json").read_text())
    rows = [
        [row["change"], f"{row['dfs']:.1%}", f"{row['blend_paper']:.1%}", f"{row['gap']:.3f}"]
        for row in found["rows"]
    ]
    best = max(found["rows"], key=lambda row: float(row["gap"]))
    lowest = min(found["rows"], key=lambda row: float(row["dfs"]))
    return (
        "## What was ruled out\n\nThe paper's NanoFlow-DFS is at 71.7 % of the optimum, its blend "
        f"1.2084 times as fast. One change each, `interference`, {found['requests']:,} requests, "
        "means of the four traces; in jobs of that size the tail of a few videos keeps all shares "
        f"low. None explains the gap: at most {best['gap']:.3f} times ({best['change']}), and what "
        f"costs DFS most ({lowest['change']}) costs blend nearly as much. "
        f"`{found['command']}`, commit {found['commit']}.\n\n"
        + table(["changed", "NanoFlow-DFS", "blend as in the paper", "paper's blend / DFS"], rows)
    )
