"""``run-batch --shard`` and ``merge``: a file in parts, on machines that do not know each other."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from run_process import Run, ids, jsonl, lines

from blendserve.cli import main
from blendserve.cli.batch_input import InputError
from blendserve.cli.merge import merge
from blendserve.cli.shard import Shard, read_shard, shard_file

MAX_BYTES = 1 << 20


@pytest.mark.parametrize(
    ("text", "environment", "shard"),
    [
        ("0/1", {}, Shard(0, 1)),
        ("7/8", {}, Shard(7, 8)),
        ("auto", {"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "8"}, Shard(3, 8)),
        (
            "auto",
            {
                "SLURM_ARRAY_TASK_ID": "14",
                "SLURM_ARRAY_TASK_MIN": "10",
                "SLURM_ARRAY_TASK_STEP": "2",
                "SLURM_ARRAY_TASK_COUNT": "4",
            },
            Shard(2, 4),
        ),
        ("auto", {"JOB_COMPLETION_INDEX": "2", "JOB_COMPLETIONS": "5"}, Shard(2, 5)),
        ("auto/6", {"JOB_COMPLETION_INDEX": "5"}, Shard(5, 6)),
    ],
)
def test_which_part_is_meant(text, environment, shard):
    assert read_shard(text, environment) == shard


@pytest.mark.parametrize(
    ("text", "environment", "says"),
    [
        ("3", {}, "give INDEX/COUNT"),
        ("8/8", {}, "they count from 0"),
        ("0/0", {}, "they count from 0"),
        ("auto", {}, "SLURM_ARRAY_TASK_ID"),
        ("auto", {"JOB_COMPLETION_INDEX": "1"}, "JOB_COMPLETIONS is not"),
        ("auto", {"SLURM_ARRAY_TASK_ID": "x"}, "'x', which is no number"),
        ("auto/2", {"JOB_COMPLETION_INDEX": "2"}, "they count from 0"),
    ],
)
def test_what_is_no_part_is_refused_with_the_remedy(text, environment, says):
    with pytest.raises(InputError, match=says):
        read_shard(text, environment)


@pytest.fixture
def job(tmp_path):
    """Families of chats, shuffled by their numbers."""
    entries = lines(120)
    for number, entry in enumerate(entries):
        system = {"role": "system", "content": f"{number % 6} " + "be brief " * 30}
        entry["body"]["messages"].insert(0, system)
        entry["body"]["max_tokens"] = 2
    (tmp_path / "in.jsonl").write_bytes(jsonl(entries))
    return tmp_path / "in.jsonl"


def names(path):
    return [json.loads(line)["custom_id"] for line in path.read_text().splitlines()]


@pytest.mark.parametrize("count", [1, 4, 7])
def test_each_line_is_in_one_part_as_it_stands_and_families_stay_together(job, tmp_path, count):
    whole = job.read_bytes().splitlines()
    found = []
    torn = 0
    for index in range(count):
        with shard_file(job, Shard(index, count), tmp_path, MAX_BYTES) as (path, number):
            part = path.read_bytes().splitlines()
        assert len(part) == number
        found += part
        torn += len({json.loads(line)["body"]["messages"][0]["content"] for line in part})
    assert Counter(found) == Counter(whole)
    # Six families, and in each part one or two that another has, too.
    assert torn <= 6 + 2 * count


def result(name, status=200):
    return {"id": "x", "custom_id": name, "response": {"status_code": status, "body": {}}}


def parts_of(job, tmp_path, count, failing=()):
    """The results of all parts, as run-batch leaves them."""
    for index in range(count):
        shard = Shard(index, count)
        with shard_file(job, shard, tmp_path, MAX_BYTES) as (path, _):
            mine = names(path)
        good = [result(name) for name in mine if name not in failing]
        bad = [result(name, 400) for name in mine if name in failing]
        shard.place(tmp_path / "out.jsonl").write_bytes(jsonl(good))
        if bad:
            shard.place(tmp_path / "out.errors.jsonl").write_bytes(jsonl(bad))
    return tmp_path / "out.jsonl", tmp_path / "out.errors.jsonl"


def merged(job, output, *more):
    return main(["merge", "-i", str(job), "-o", str(output), *more])


def test_all_parts_make_one_file(job, tmp_path):
    output, errors = parts_of(job, tmp_path, 3, failing={"r5", "r77"})
    assert merged(job, output) == 1
    assert sorted(ids(output) + ids(errors)) == sorted(names(job))
    assert sorted(ids(errors)) == ["r5", "r77"]
    assert merged(job, output) == 2  # It is there.
    assert merged(job, output, "--overwrite") == 1


def test_without_errors_there_is_no_file_of_them(job, tmp_path):
    output, errors = parts_of(job, tmp_path, 3)
    assert merged(job, output) == 0
    assert not errors.exists()


def test_a_part_that_has_not_ended_is_waited_for_and_named(job, tmp_path, capsys):
    output, _ = parts_of(job, tmp_path, 3)
    Shard(1, 3).place(output).unlink()
    assert merged(job, output) == 3
    assert "Of 3 parts, 1 have not ended. Nothing is written" in capsys.readouterr().err
    assert not output.exists()


def test_a_part_that_lacks_a_line_is_told(job, tmp_path, capsys):
    output, _ = parts_of(job, tmp_path, 2)
    part = Shard(0, 2).place(output)
    first, _, rest = part.read_bytes().partition(b"\n")
    part.write_bytes(rest)
    assert merged(job, output) == 3
    assert f"1 lines have no result yet, as {json.loads(first)['custom_id']!r}" in (
        capsys.readouterr().err
    )


def test_a_line_that_two_parts_have_is_refused(job, tmp_path, capsys):
    output, errors = parts_of(job, tmp_path, 2)
    line = Shard(0, 2).place(output).read_bytes().splitlines()[0]
    Shard(1, 2).place(errors).write_bytes(line + b"\n")
    assert merged(job, output) == 2
    assert "has a result in" in capsys.readouterr().err
    assert not output.exists()


def test_a_line_of_another_input_is_refused(job, tmp_path, capsys):
    output, _ = parts_of(job, tmp_path, 2)
    with Shard(0, 2).place(output).open("ab") as file:
        file.write(jsonl([result("stranger")]))
    assert merged(job, output) == 2
    assert "'stranger', which the input does not have" in capsys.readouterr().err


def test_a_torn_part_is_refused(job, tmp_path, capsys):
    output, _ = parts_of(job, tmp_path, 2)
    part = Shard(0, 2).place(output)
    part.write_bytes(part.read_bytes()[:-5])
    assert merged(job, output) == 2
    assert "is no result of a run" in capsys.readouterr().err


def test_parts_of_two_divisions_are_refused(job, tmp_path, capsys):
    output, _ = parts_of(job, tmp_path, 2)
    parts_of(job, tmp_path, 3)
    assert merged(job, output) == 2
    assert "parts of 2 and 3; remove those of the other run" in capsys.readouterr().err


def test_no_parts_at_all(job, tmp_path):
    with pytest.raises(InputError, match=r"no parts like .*out\.shard-0-of-2\.jsonl"):
        merge(str(job), tmp_path / "out.jsonl", tmp_path / "out.errors.jsonl")


def test_two_runs_and_a_merge(tmp_path):
    entries = lines(30, {4: "error 4"})
    source = tmp_path / "in.jsonl"
    source.write_bytes(jsonl(entries))
    state = tmp_path / "local"
    state.mkdir()
    codes = []
    for task in ("0", "1"):
        run = Run(
            tmp_path,
            *("-i", str(source), "--shard", "auto", "--state", str(state)),
            environment={"SLURM_ARRAY_TASK_ID": task, "SLURM_ARRAY_TASK_COUNT": "2"},
        )
        codes.append(run.end())
        assert f"Part {task}/2" in run.said
    assert set(codes) <= {0, 1}
    output = tmp_path / "out.jsonl"
    assert merged(source, output) == max(codes)
    errors = tmp_path / "out.errors.jsonl"
    found = ids(output) + (ids(errors) if errors.exists() else [])
    assert sorted(found) == sorted(entry["custom_id"] for entry in entries)
    assert list(state.iterdir()) == []


def test_a_part_without_lines_ends_with_an_empty_output(tmp_path):
    (tmp_path / "in.jsonl").write_bytes(jsonl(lines(1)))
    argv = ["run-batch", "-i", str(tmp_path / "in.jsonl"), "-o", str(tmp_path / "out.jsonl")]
    ends = [Shard(index, 2).place(tmp_path / "out.jsonl") for index in range(2)]
    for index in range(2):
        with shard_file(tmp_path / "in.jsonl", Shard(index, 2), tmp_path, MAX_BYTES) as (_, count):
            if not count:
                more = ["--shard", f"{index}/2", "--served-model-name", "fake-model"]
                assert main([*argv, *more]) == 0
                assert ends[index].read_bytes() == b""
                return
    raise AssertionError("one of the two must be empty")
