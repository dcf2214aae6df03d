"""Programs in SGLang's own frontend language, run against a BlendServe server.

The programs know nothing of BlendServe: they run against a stock SGLang server, too. They show
gen, a regex-constrained gen, select, fork and join, and run_batch over fifty inputs, and what comes
back is checked. With --planned the fifty are one job, which the server plans; that takes one line
in `main`.

    python examples/frontend_program.py --url http://127.0.0.1:30000 --planned
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections import Counter
from typing import Any

import sglang as sgl

DATE = r"(19|20)[0-9]{2}-(0[1-9]|1[0-2])-(0[1-9]|[12][0-9]|3[01])"
KINDS = ["fruit", "animal", "tool"]
WORDS = """
apple hammer otter pear chisel badger plum saw heron cherry pliers weasel mango drill salmon
apricot spanner donkey fig rasp beetle quince anvil falcon peach wrench rabbit lemon file goat
melon mallet lizard grape axe pigeon orange shovel hedgehog banana screwdriver frog kiwi rake
horse raspberry clamp sparrow lime trowel
"""
THINGS = WORDS.split()


@sgl.function
def capital(s: Any, country: str) -> None:
    """Plain generation up to the end of the line."""
    s += "The capital of Spain is Madrid.\nThe capital of Japan is Tokyo.\nThe capital of "
    s += country
    s += " is" + sgl.gen("answer", max_tokens=6, stop=[".", "\n"])


@sgl.function
def launch_date(s: Any, mission: str) -> None:
    """Generation that a regular expression holds to the form of a date."""
    s += "Dates are written YYYY-MM-DD.\nFirst person on the Moon: 1969-07-20\n"
    s += mission
    s += ": " + sgl.gen("date", max_tokens=16, regex=DATE)


@sgl.function
def both_sides(s: Any, subject: str) -> None:
    """Two branches that share a prefix, written at the same time and brought together again."""
    s += "Some thoughts about "
    s += subject
    s += ".\n"
    branches = s.fork(2)
    for branch, opening in zip(branches, ("One good thing is", "One bad thing is"), strict=True):
        branch += opening + sgl.gen("side", max_tokens=8, stop="\n")
    branches.join()  # s["side"] is now the list of what both branches wrote
    good, bad = s["side"]
    s += "Good:" + good + "\nBad:" + bad + "\nAll in all,"
    s += sgl.gen("verdict", max_tokens=8, stop="\n")


@sgl.function
def sort_thing(s: Any, thing: str) -> None:
    """A choice between fixed answers, then a few words of free text."""
    s += (
        "Every word belongs to one kind: fruit, animal or tool.\n"
        "strawberry: fruit, because it grows on a plant.\n"
        "elephant: animal, because it is alive and walks.\n"
        "scissors: tool, because people cut paper with it.\n"
        "pineapple: fruit, because it is sweet and juicy.\n"
        "tiger: animal, because it hunts in the forest.\n"
    )
    s += thing
    s += ": " + sgl.select("kind", choices=KINDS)
    s += ", because" + sgl.gen("reason", max_tokens=8, stop=[".", "\n"])


def run_single_programs() -> list[str]:
    """Run one program after the other; return what is malformed."""
    problems = []

    answer = capital.run(country="France", temperature=0)["answer"]
    print(f"gen         capital of France: {answer.strip()}")
    if not answer.strip():
        problems.append("gen returned no text")

    date = launch_date.run(mission="First satellite in orbit", temperature=0)["date"]
    print(f"regex       first satellite: {date}")
    if not re.fullmatch(DATE, date):
        problems.append(f"{date!r} does not match {DATE}")

    state = both_sides.run(subject="rain", temperature=0)
    for name, text in zip(("good", "bad"), state["side"], strict=True):
        print(f"fork/join   {name}:{text}")
        if f"{name.capitalize()}:{text}\n" not in state.text():
            problems.append(f"the joined text lacks the {name} branch")
    if not state["verdict"].strip():
        problems.append("nothing was generated after the join")
    return problems


def run_many() -> list[str]:
    """Run one program on all fifty inputs at once; return what is malformed."""
    began = time.monotonic()
    states = sort_thing.run_batch(
        [{"thing": thing} for thing in THINGS], temperature=0, num_threads=16
    )
    seconds = time.monotonic() - began
    problems = []
    kinds: Counter[str] = Counter()
    for thing, state in zip(THINGS, states, strict=True):
        if state.error() is not None:
            problems.append(f"{thing}: {state.error()}")
            continue
        kinds[state["kind"]] += 1
        if state["kind"] not in KINDS:
            problems.append(f"{thing}: {state['kind']!r} is none of {KINDS}")
        if not state.text().endswith(f"{thing}: {state['kind']}, because{state['reason']}"):
            problems.append(f"{thing}: the parts of the text are out of order")
    counts = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
    print(f"run_batch   {len(states)} inputs in {seconds:.1f} s: {counts}")
    for thing, state in list(zip(THINGS, states, strict=True))[:3]:
        if state.error() is None:
            print(f"            {thing}: {state['kind']}, because{state['reason']}")
    return problems


def main(url: str, planned: bool = False) -> int:
    """Run all programs against the server at `url`; return the exit status, 0 if all is well."""
    if planned:
        from blendserve.frontend import Endpoint

        sgl.set_default_backend(Endpoint(url))
    else:
        sgl.set_default_backend(sgl.RuntimeEndpoint(url))
    problems = run_single_programs() + run_many()
    for problem in problems:
        print(f"malformed: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--url", default="http://127.0.0.1:30000", help="the server's address")
    parser.add_argument("--planned", action="store_true", help="run_batch as a planned job")
    options = parser.parse_args()
    sys.exit(main(options.url, options.planned))
