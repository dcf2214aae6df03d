"""Frontend programs as a job of a real server: the same texts, and a plan."""

from __future__ import annotations

import runpy
import threading
from pathlib import Path
from typing import Any

import httpx
import sglang as sgl
from conftest import MODEL_NAME, Server
from jobs import finish, mixed_requests, submit

from blendserve.frontend import Endpoint

EXAMPLES = Path(__file__).parents[2] / "examples"
GREEDY = {"temperature": 0}


@sgl.function
def everything(s: Any, subject: str) -> None:
    """fork, select, regex, and a branch on an answer."""
    s += "Some thoughts about many things, one after the other, and what follows from them.\n"
    s += subject + ".\n"
    branches = s.fork(2)
    for branch, opening in zip(branches, ("One good thing is", "One bad thing is"), strict=True):
        branch += opening + sgl.gen("side", max_tokens=6)
    branches.join()
    s += "Good:" + s["side"][0] + " Bad:" + s["side"][1] + "\nIn all it is "
    s += sgl.select("kind", choices=["fine", "poor", "odd"])
    s += ", in points: " + sgl.gen("points", max_tokens=4, regex="[1-9][0-9]")
    if s["kind"] == "fine" or int(s["points"]) > 50:
        s += ", which is much:" + sgl.gen("more", max_tokens=5)
    else:
        s += ", which is little." + sgl.gen("less", max_tokens=3)


def test_the_example_runs_planned(blend: Server) -> None:
    program = runpy.run_path(str(EXAMPLES / "frontend_program.py"))
    assert program["main"](blend.url, planned=True) == 0


def test_programs_say_the_same_planned_and_not_beside_a_batch(blend: Server) -> None:
    given = [{"subject": f"The {k}th thing of {k % 4} sorts"} for k in range(12)]

    def texts(backend: Any) -> list[str]:
        states = everything.run_batch(
            [dict(one) for one in given], **GREEDY, backend=backend, num_threads=6
        )
        assert [state.error() for state in states] == [None] * len(given)
        return [state.text() for state in states]

    unplanned = texts(sgl.RuntimeEndpoint(blend.url))
    before = _taken(blend)
    lines = [one for one in mixed_requests(MODEL_NAME) if "messages" in one["body"]][:12]
    ended: list[str] = []
    batch = submit(blend.client, lines, "/v1/chat/completions")
    beside = threading.Thread(target=lambda: ended.append(finish(blend.client, batch).status))
    beside.start()
    assert texts(Endpoint(blend.url)) == unplanned
    beside.join(120)
    assert ended == ["completed"]
    # Of each program at least two thoughts, three choices, points and an end came with a plan.
    assert _taken(blend) - before >= 12 + 7 * len(given)
    status = httpx.get(f"{blend.url}/blendserve/status", timeout=60).json()
    assert [job for job in status["jobs"] if "programs" in job] == []


def _taken(server: Server) -> int:
    """Planned requests that the scheduler has admitted so far."""
    status = httpx.get(f"{server.url}/blendserve/status", timeout=60).json()
    return sum(sum(one["taken"].values()) for one in status["schedulers"])
