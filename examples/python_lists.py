"""Lists of prompts in, answers out, with no server to manage: `blendserve.generate` and `chat`.

    python examples/python_lists.py --state-dir ./answers

Started again with the same folder, it goes on where it ended, and then only reads.
"""

from __future__ import annotations

import argparse

import blendserve

COUNTRIES = ("France", "Spain", "Japan", "Kenya", "Chile", "Norway")


def main(model_path: str | None, state_dir: str | None) -> None:
    """Ask for six capitals, and print what comes back."""
    answers = blendserve.chat(
        [[{"role": "user", "content": f"What is the capital of {name}?"}] for name in COUNTRIES],
        {"max_tokens": 16, "temperature": 0},
        model_path=model_path,
        state_dir=state_dir,
    )
    for name, answer in zip(COUNTRIES, answers, strict=True):
        said = f"failed: {answer.error}" if answer.error else answer.text.strip()
        print(f"{name}: {said}  ({answer.usage.output_tokens} tokens)")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model-path", help="default: a small model")
    parser.add_argument("--state-dir", help="folder that keeps the answers")
    options = parser.parse_args()
    main(options.model_path, options.state_dir)
