"""Prefix sharing of the standard 5-shot MMLU prompts, which the paper gives as 86.46 %."""

import csv
import io
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest

from blendserve.planner import PrefixTree

DATA = Path(os.environ.get("BLENDSERVE_DATA") or Path(__file__).parents[3] / "shared" / "data")
ARCHIVE = DATA / "mmlu" / "mmlu.zip"
TOKENIZER = DATA / "smollm2_tokenizer" / "tokenizer.json"


def question(row, answer=""):
    choices = "".join(f"\n{letter}. {text}" for letter, text in zip("ABCD", row[1:5], strict=True))
    return f"{row[0]}{choices}\nAnswer:{answer}"


def test_mmlu_shares_what_is_known_of_it():
    for path in (ARCHIVE, TOKENIZER):
        if not path.is_file():
            pytest.skip(f"{path} is absent; set BLENDSERVE_DATA to the folder with the data")
    tokenizer = pytest.importorskip("tokenizers").Tokenizer.from_file(str(TOKENIZER))

    def encode(texts):
        return [np.array(e.ids, dtype=np.int32) for e in tokenizer.encode_batch_fast(texts)]

    ids = []
    with zipfile.ZipFile(ARCHIVE) as archive:
        for name in sorted(archive.namelist()):
            if not name.startswith("data/test/") or not name.endswith(".csv"):
                continue
            subject = name.removeprefix("data/test/").removesuffix("_test.csv")

            def rows(kind, subject=subject):
                text = archive.read(f"data/{kind}/{subject}_{kind}.csv").decode()
                return list(csv.reader(io.StringIO(text)))

            topic = subject.replace("_", " ")
            shots = f"The following are multiple choice questions (with answers) about {topic}.\n\n"
            shots += "".join(question(row, f" {row[5]}\n\n") for row in rows("dev")[:5])
            # Tokens do not cross the blank line, so the examples are tokenised once per subject.
            (prefix,) = encode([shots])
            ids += [
                np.concatenate((prefix, q)) for q in encode([question(r) for r in rows("test")])
            ]
    tree = PrefixTree.build(ids)
    assert tree.num_leaves == 14_042
    assert 100 * tree.sharing_ratio == pytest.approx(86.43, abs=0.1)
    assert tree.prompt_tokens / tree.num_leaves == pytest.approx(722.6, abs=1)
