"""What a user is told of a server that did not start."""

from __future__ import annotations

from blendserve.cli.server_process import log_tail


def written(tmp_path, *lines):
    log = tmp_path / "server.log"
    log.write_text("\n".join(lines) + "\n")
    return log_tail(log)


def test_our_own_words_are_all_that_is_shown(tmp_path):
    said = written(tmp_path, "ValueError: x", "blendserve: no such model", "Traceback", "  File")
    assert said == "blendserve: no such model"


def test_the_first_error_stands_before_the_last_lines(tmp_path):
    lines = ["starting", "AssertionError: set this variable", *(f"line {k}" for k in range(50))]
    said = written(tmp_path, *lines, "RuntimeError: a scheduler died").splitlines()
    assert said[0] == "first error: AssertionError: set this variable"
    assert said[-1] == "RuntimeError: a scheduler died"
    assert len(said) == 16


def test_an_error_among_the_last_lines_is_not_said_twice(tmp_path):
    said = written(tmp_path, "starting", "torch.OutOfMemoryError: full")
    assert said.splitlines() == ["starting", "torch.OutOfMemoryError: full"]
