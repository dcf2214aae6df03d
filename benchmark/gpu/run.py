"""Everything that needs a GPU, in the order in which it is worth knowing.

    python benchmark/gpu/run.py

Three scripts, each under 8 minutes and each writing its own file to benchmark/results/.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPTS = ("ceilings.py", "attention.py", "end_to_end.py")


def main() -> None:
    for script in SCRIPTS:
        print(f"== {script}", flush=True)
        subprocess.run([sys.executable, str(Path(__file__).with_name(script))], check=True)


if __name__ == "__main__":
    main()
