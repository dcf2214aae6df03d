"""One row: one engine over one job, in a process of its own that the caller may end.

    python row.py ENGINE JOB DTYPE KV_TOKENS ORDER LINES RESULT_FILE

LINES is how many of the job's lines are run; 0 for all.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path

from engines import ENGINES, Setting
from jobs import JOBS, presorted
from peak_memory import PeakMemory


def main(name: str, job: str, dtype: str, kv_tokens: str, order: str, lines: str, to: str) -> None:
    engine = ENGINES[name]
    given = JOBS[job]()[: int(lines) or None]
    if order == "sorted" or engine.presorted:
        given = presorted(given)
    with tempfile.TemporaryDirectory(prefix="blendserve-peers-") as folder:
        setting = Setting(given, dtype, int(kv_tokens), Path(folder))
        with PeakMemory(os.getpid()) as memory:
            result = engine.run(setting)
    result["peak_bytes"] = memory.peak_bytes
    result["input"] = "sorted" if order == "sorted" or engine.presorted else order
    Path(to).write_text(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
