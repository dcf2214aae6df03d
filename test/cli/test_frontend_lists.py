"""`blendserve.generate` and `chat`, with a run-batch that answers at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import blendserve
from blendserve.frontend import lists
from blendserve.frontend.flags import as_flags


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[list[dict[str, Any]]]:
    """The bodies of each run; a prompt with "bad" in it is an error."""
    seen: list[list[dict[str, Any]]] = []

    def run(self: Any) -> None:
        lines = [json.loads(line) for line in self._input.open()]
        seen.append([line["body"] for line in lines])
        answers, errors = [], []
        for line in reversed(lines):
            said = line["body"].get("prompt") or line["body"]["messages"][-1]["content"]
            if "bad" in said:
                error = {"error": {"message": "bad prompt"}}
                errors.append({**line, "response": {"status_code": 400, "body": error}})
                continue
            is_chat = "messages" in line["body"]
            content = {"message": {"content": said.upper()}} if is_chat else {"text": said.upper()}
            body = {
                "choices": [{**content, "finish_reason": "stop"}] * line["body"].get("n", 1),
                "usage": {"prompt_tokens": 3, "completion_tokens": 2},
            }
            answers.append({**line, "response": {"status_code": 200, "body": body}})
        for path, written in ((self._output, answers), (self._errors, errors)):
            if written:
                path.write_text("".join(json.dumps(line) + "\n" for line in written))

    monkeypatch.setattr(lists._ListJob, "run", run)
    return seen


def test_answers_come_in_the_order_of_the_prompts(runs: list[Any]) -> None:
    answers = blendserve.generate(["one", "bad two", "three"], {"max_new_tokens": 5, "n": 2})
    assert [answer.texts for answer in answers] == [("ONE", "ONE"), (), ("THREE", "THREE")]
    assert answers[0].usage.output_tokens == 2
    assert answers[1].error == "bad prompt"
    with pytest.raises(lists.GenerateFailed, match="bad prompt"):
        _ = answers[1].text
    assert runs == [[{"prompt": p, "max_tokens": 5, "n": 2} for p in ("one", "bad two", "three")]]


def test_conversations_have_parameters_of_their_own(runs: list[Any]) -> None:
    talk = [[{"role": "user", "content": word}] for word in ("a", "b")]
    answers = blendserve.chat(talk, [{"max_tokens": 1}, {"max_tokens": 2}])
    assert [answer.text for answer in answers] == ["A", "B"]
    assert [body["max_tokens"] for body in runs[0]] == [1, 2]
    with pytest.raises(ValueError, match="1 sampling_params for 2 prompts"):
        blendserve.chat(talk, [{}])
    assert blendserve.chat([]) == []


def test_a_parameter_that_does_not_exist_names_the_nearest(runs: list[Any]) -> None:
    with pytest.raises(ValueError, match="Did you mean 'temperature'"):
        blendserve.generate(["a"], {"temprature": 0})
    assert runs == []


def test_what_is_answered_is_only_read(runs: list[Any], tmp_path: Path) -> None:
    state = tmp_path / "state"
    first = blendserve.generate(["a", "bad"], {"n": 1}, state_dir=state, tp_size=1)
    assert blendserve.generate(["a", "bad"], {"n": 1}, state_dir=state, tp_size=1) == first
    assert len(runs) == 1
    with pytest.raises(ValueError, match="a call with other prompts"):
        blendserve.generate(["a", "c"], {"n": 1}, state_dir=state, tp_size=1)
    with pytest.raises(ValueError, match="the same prompts on another engine"):
        blendserve.generate(["a", "bad"], {"n": 1}, state_dir=state)
    # Of a run that has not ended there is state beside the output: it is run again.
    (state / "answers.jsonl.blendserve").mkdir()
    assert blendserve.generate(["a", "bad"], {"n": 1}, state_dir=state, tp_size=1) == first
    assert len(runs) == 2


def test_flags_are_those_of_serve() -> None:
    given = {"tp_size": 2, "enable_metrics": True, "lora_paths": ["a", "b"], "dtype": None}
    assert as_flags(given) == ["--tp-size", "2", "--enable-metrics", "--lora-paths", "a", "b"]
    with pytest.raises(ValueError, match="leave enable_metrics out"):
        as_flags({"enable_metrics": False})
