"""Inputs of run-batch as requests: tables, plain lists, folders, several files; their columns."""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest

from blendserve.cli import main
from blendserve.cli.batch_input import InputError
from blendserve.cli.job_input import job_input
from blendserve.cli.row_mapping import RowMapping, add_mapping_flags, read_mapping
from blendserve.cli.sources import expand

LINE = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": "x"}}
CSV = 'question,label,n\n"One, two?",a,1\n"Three\nlines",b,2\n'


def requests(
    *given: Path | str, mapping: RowMapping | None = None, carry: tuple[str, ...] = ()
) -> list[dict[str, Any]]:
    """What the inputs become, with the carried columns under "input"."""
    with (
        tempfile.TemporaryDirectory() as folder,
        job_input(
            expand([str(one) for one in given]),
            mapping or RowMapping(),
            carry,
            Path(folder),
            1 << 20,
        ) as made,
    ):
        data = made.path.read_bytes()
        if made.carried is not None:
            results = Path(folder) / "results"
            results.write_bytes(b"\n".join(line for line in data.splitlines() if line) + b"\n")
            with (Path(folder) / "joined").open("wb") as joined:
                made.carried.join(results, joined)
            data = (Path(folder) / "joined").read_bytes()
        return [json.loads(line) for line in data.splitlines() if line]


def place(number: int, *given: Path) -> str:
    with (
        tempfile.TemporaryDirectory() as folder,
        job_input(
            expand([str(one) for one in given]), RowMapping(), (), Path(folder), 1 << 20
        ) as made,
    ):
        return made.places(number)


def prompt(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def test_a_row_becomes_a_conversation_with_the_fields_of_all(tmp_path: Path) -> None:
    (tmp_path / "q.csv").write_text(CSV)
    mapping = RowMapping("question", system="Be brief.", body={"max_tokens": 5})
    first, second = requests(tmp_path / "q.csv", mapping=mapping)
    assert first == {
        "custom_id": "row-1",
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {
            "max_tokens": 5,
            "messages": [{"role": "system", "content": "Be brief."}, *prompt("One, two?")],
        },
    }
    assert second["body"]["messages"][1]["content"] == "Three\nlines"


@pytest.mark.parametrize(
    ("endpoint", "field"),
    [
        ("/v1/completions", "prompt"),
        ("/v1/embeddings", "input"),
        ("/v1/classify", "input"),
        ("/v1/responses", "input"),
    ],
)
def test_a_template_is_filled_with_columns_for_each_endpoint(
    tmp_path: Path, endpoint: str, field: str
) -> None:
    (tmp_path / "q.tsv").write_text("q\tlabel\nwhy\ta\n")
    mapping = RowMapping(template="{{{q}}} is {label}?", endpoint=endpoint)
    [line] = requests(tmp_path / "q.tsv", mapping=mapping)
    assert (line["url"], line["body"]) == (endpoint, {field: "{why} is a?"})


def test_a_plain_list_is_a_prompt_a_line(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("first\n\nthird\n")
    lines = requests(tmp_path / "p.txt")
    assert [line["body"]["messages"] for line in lines] == [prompt("first"), prompt("third")]
    assert place(3, tmp_path / "p.txt") == "line 3"


def test_json_lines_are_rows_where_a_column_is_named(tmp_path: Path) -> None:
    rows = [{"q": "a", "id": 7}, {"q": prompt("b"), "id": 8}, {"id": 9}]
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = requests(tmp_path / "r.jsonl", mapping=RowMapping("q", id_column="id"))
    assert [line["custom_id"] for line in lines] == ["7", "8", "9"]
    assert lines[0]["body"] == lines[1]["body"] | {"messages": prompt("a")}
    # To be answered with what is missing, while the others run.
    assert lines[2]["body"] == {}


def test_parts_are_read_by_name_and_each_line_has_its_place(tmp_path: Path) -> None:
    folder = tmp_path / "parts"
    folder.mkdir()
    (folder / "b.csv").write_text("prompt\nb1\nb2\n")
    # Without a line break at its end, and with a byte order mark.
    (folder / "a.jsonl").write_text("\ufeff\n" + json.dumps(LINE))
    (folder / "_SUCCESS").write_text("")
    for given in (folder, folder / "*.*"):
        lines = requests(given)
        assert [line["custom_id"] for line in lines] == ["a", "row-1", "row-2"]
        assert place(4, given) == f"{folder / 'b.csv'}, row 2"
        assert place(2, given) == f"{folder / 'a.jsonl'}, line 2"


def test_columns_are_carried_to_results(tmp_path: Path) -> None:
    (tmp_path / "q.csv").write_text(CSV)
    lines = requests(tmp_path / "q.csv", mapping=RowMapping("question"), carry=("label", "n"))
    assert [line["input"] for line in lines] == [{"label": "a", "n": "1"}, {"label": "b", "n": "2"}]


def test_a_batch_line_may_have_fields_to_carry(tmp_path: Path) -> None:
    lines = [{**LINE, "gold": 4}, {**LINE, "custom_id": "b"}]
    (tmp_path / "in.jsonl").write_text("\n" + "\n".join(map(json.dumps, lines)))
    found = requests(tmp_path / "in.jsonl", carry=("gold",))
    assert found == [{**LINE, "input": {"gold": 4}}, {**lines[1], "input": {"gold": None}}]


@pytest.mark.parametrize(
    ("name", "text", "mapping", "carry", "said"),
    [
        ("q.csv", CSV, {}, (), "which column is the prompt"),
        ("q.csv", CSV, {"prompt_column": "qestion"}, (), "no column 'qestion'; it has question,"),
        ("q.csv", CSV, {"template": "{x} {question}"}, (), "no column 'x'"),
        ("q.csv", CSV, {"prompt_column": "question"}, ("gold",), "no column 'gold'"),
        ("q.csv", "prompt\na,b\n", {}, (), "row 1 has 2 values for 1 columns"),
        ("q.csv", "prompt,prompt\na,b\n", {}, (), "name each column once"),
        ("q.csv", "", {}, (), "name each column once"),
        ("q.csv", 'prompt\n"open\n', {}, (), "line 2: unexpected end of data"),
        ("q.jsonl", '{"q": 1}\n{nope\n', {"prompt_column": "q"}, (), "line 2 is not JSON"),
        ("q.jsonl", '{"q": 1}\n[1]\n', {"prompt_column": "q"}, (), "line 2 is no JSON object"),
        (
            "q.jsonl",
            '{"a": 1}\n',
            {"prompt_column": "q"},
            (),
            "column 'q'; the first has a",
        ),
        ("q.jsonl", json.dumps(LINE), {}, ("gold",), "has a field gold to carry"),
    ],
)
def test_what_cannot_be_read_is_refused_with_its_place(
    tmp_path: Path, name: str, text: str, mapping: dict[str, str], carry: tuple[str, ...], said: str
) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=said) as refused:
        requests(tmp_path / name, mapping=RowMapping(**mapping), carry=carry)
    assert str(tmp_path / name) in str(refused.value)


def test_a_table_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    for name in ("q.csv", "q.txt"):
        (tmp_path / name).write_bytes(b"prompt\nna\xefve\n")
        with pytest.raises(InputError, match="not UTF-8"):
            requests(tmp_path / name)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["s3://b/k.jsonl"], r"aws s3 cp s3://b/k.jsonl - \| blendserve run-batch -i -"),
        (["https://example.org/a"], r"curl -fsSL https://example.org/a \|"),
        (["none-*.csv"], "no file matches none-"),
        (["-", "-"], "given twice"),
        (["missing"], "is not a file"),
    ],
)
def test_what_is_no_input_is_refused_with_the_way(given: list[str], said: str) -> None:
    with pytest.raises(InputError, match=said):
        expand(given)


def test_nothing_in_a_folder_is_passed_over(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no input"):
        expand([str(tmp_path)])
    (tmp_path / "a.jsonl").write_text("")
    (tmp_path / "README.md").write_text("")
    with pytest.raises(InputError, match=r"holds README.md, which is no input"):
        expand([str(tmp_path)])


def flags(*argv: str) -> RowMapping:
    parser = argparse.ArgumentParser()
    add_mapping_flags(parser)
    return read_mapping(parser.parse_args(argv))


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--template", "no column"], "names no column"),
        (["--template", "{a"], "Columns stand in braces"),
        (["--template", "{a:>3}"], "and nothing else there"),
        (["--template", "{}"], "and nothing else there"),
        (["--template", "@/nowhere"], "No such file"),
        (["--body", "[1]"], "must be a JSON object"),
        (["--body", "{max_tokens: 1}"], "is not JSON"),
        (["--endpoint", "/v1/score"], "write lines of it as a batch file"),
        (["--endpoint", "/chat/completions"], "Did you mean '/v1/chat/completions'"),
        (["--template", "{a}", "--prompt-column", "a"], "not both"),
    ],
)
def test_flags_that_say_nothing_clear_are_refused(argv: list[str], said: str) -> None:
    with pytest.raises(InputError, match=said):
        flags(*argv)


def test_a_template_may_stand_in_a_file(tmp_path: Path) -> None:
    (tmp_path / "t").write_text("Say {word}.")
    assert flags("--template", f"@{tmp_path / 't'}").template == "Say {word}."


def test_parquet_and_saved_data_sets_are_tables(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = pa.table(
        {
            "messages": [
                [{"role": "user", "content": "a", "name": None}],
                [{"role": "user", "content": "b", "name": "B"}],
            ],
            "gold": [1, None],
        }
    )
    parquet.write_table(table, tmp_path / "t.parquet")
    folder = tmp_path / "saved"
    folder.mkdir()
    for number, part in enumerate((table.slice(0, 1), table.slice(1))):
        with pa.ipc.new_stream(folder / f"data-{number}.arrow", table.schema) as stream:
            stream.write_table(part)
    files = [{"filename": f"data-{number}.arrow"} for number in (0, 1)]
    (folder / "state.json").write_text(json.dumps({"_data_files": files}))
    for given in (tmp_path / "t.parquet", folder):
        first, second = requests(given, carry=("gold",))
        assert first["body"]["messages"] == prompt("a")
        assert second["body"]["messages"] == [{"role": "user", "content": "b", "name": "B"}]
        assert [first["input"], second["input"]] == [{"gold": 1}, {"gold": None}]


def test_a_data_set_of_splits_and_a_damaged_table_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    (tmp_path / "d" / "train").mkdir(parents=True)
    (tmp_path / "d" / "train" / "state.json").write_text("{}")
    (tmp_path / "d" / "dataset_dict.json").write_text("{}")
    with pytest.raises(InputError, match=r"several splits \(train\); give one"):
        expand([str(tmp_path / "d")])
    with pytest.raises(InputError, match="no data set that can be read"):
        requests(tmp_path / "d" / "train")
    (tmp_path / "t.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(InputError, match="no Parquet file"):
        requests(tmp_path / "t.parquet")


def test_input_of_another_kind_on_stdin_is_told_the_flag(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rows").write_text("prompt\nhello\n")
    assert main(["run-batch", "-i", str(tmp_path / "rows"), "-o", str(tmp_path / "out.jsonl")]) == 2
    assert "needs --format csv, tsv, parquet or txt" in capsys.readouterr().err
