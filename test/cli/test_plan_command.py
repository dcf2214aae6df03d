"""``blendserve plan``: its figures, its files, and what it says to wrong input."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from blendserve.cli import main
from blendserve.cli.job_file import JobFileError, UncountableMedia, read_job_file

ON_A100 = ["--model-spec", "llama-3.1-8b", "--hardware", "a100-80g-sxm"]


class Words:
    """A tokenizer of one token per word, and one per role."""

    def text(self, text):
        return [sum(map(ord, word)) for word in text.split()]

    def chat(self, messages, tools):
        return [t for m in messages for t in (7, *self.text(m["content"]))]

    def media(self, messages, tools):
        """Three tokens for a picture, and its address for its patches."""
        urls = [part["image_url"]["url"] for m in messages for part in m["content"]]
        if not all(urls):
            raise UncountableMedia("no picture at all")
        ids = np.full(3 * len(urls), 1_000_000, dtype=np.int32)
        return ids, [(3 * k + 3, len(url)) for k, url in enumerate(urls)]


def read(tmp_path: Path, *entries, context_length=100):
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return read_job_file(path, context_length, Words)


def body_line(name, url, **body):
    return {"custom_id": name, "method": "POST", "url": url, "body": {"model": "m", **body}}


@pytest.fixture
def token_file(tmp_path):
    """60 questions behind a long prefix, 12 long answers."""
    rng = np.random.default_rng(0)
    prefix = rng.integers(0, 1000, 500).tolist()
    with (tmp_path / "in.jsonl").open("w") as stream:
        for k in range(60):
            line = {"id": f"q{k}", "input_ids": [*prefix, k, k + 1], "output_len": 2}
            stream.write(json.dumps(line) + "\n")
        for k in range(12):
            ids = rng.integers(0, 1000, 50).tolist()
            stream.write(json.dumps({"id": f"v{k}", "input_ids": ids, "output_len": 2000}) + "\n")
    return tmp_path / "in.jsonl"


def plan(capsys, *args):
    status = main(["plan", *map(str, args)])
    said = capsys.readouterr()
    return status, said.out, said.err


# -- the report


def test_json_is_one_object_with_the_promised_keys(capsys, token_file):
    status, out, _ = plan(capsys, "-i", token_file, *ON_A100, "--json")
    found = json.loads(out)
    assert status == 0
    assert list(found) == [
        "requests",
        "prompt_tokens",
        "unique_tokens",
        "sharing",
        "density",
        "predicted_seconds",
        "cost",
        "predicted_world",
        "costs",
        "plan_seconds",
    ]
    assert list(found["sharing"]) == ["best", "random", "planned"]
    assert list(found["density"]) == ["job", "p25", "p50", "p75"]
    assert list(found["predicted_seconds"]) == ["fcfs", "dfs", "blend", "bound"]
    assert found["requests"] == 72
    assert found["prompt_tokens"] == 60 * 502 + 12 * 50
    assert found["unique_tokens"] == 500 + 60 * 2 + 12 * 50
    assert found["sharing"]["best"] == pytest.approx(59 * 500 / (60 * 502 + 12 * 50))
    seconds = found["predicted_seconds"]
    assert seconds["bound"] <= seconds["blend"] * (1 + 1e-9)


def test_scoring_alone_has_no_density_and_the_json_is_still_json(capsys, tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text('{"id": "a", "input_ids": [1, 2], "output_len": 0}\n')
    status, out, _ = plan(capsys, "-i", path, *ON_A100, "--json")
    found = json.loads(out, parse_constant=pytest.fail)
    assert status == 0
    assert set(found["density"].values()) == {None}
    assert plan(capsys, "-i", path, *ON_A100)[0] == 0


def test_the_text_says_what_a_user_asks_before_the_run(capsys, token_file):
    status, out, _ = plan(capsys, "-i", token_file, *ON_A100, "--dp", 2, "--kv-tokens", 20_000)
    assert status == 0
    for words in (
        "llama-3.1-8b on a100-80g-sxm, 20,000 tokens of KV cache per replica",
        "requests             72\n",
        "output tokens        24,120\n",
        "best               96.0%",
        "random order",
        "quartiles",
        "FCFS",
        "bound",
        "replicas: times within",
        "500 tokens in 60 requests, saves 29,500 (96.0%), such as 'q0'",
        "warning: 12 will dominate the tail",
        "planned in",
    ):
        assert words in out


def test_the_order_names_every_request_once_with_its_side(capsys, token_file, tmp_path):
    order = tmp_path / "order.jsonl"
    assert plan(capsys, "-i", token_file, *ON_A100, "--order", order)[0] == 0
    lines = [json.loads(line) for line in order.read_text().splitlines()]
    assert [line["rank"] for line in lines] == list(range(72))
    assert all(list(x) == ["id", "rank", "side", "estimated_output_len"] for x in lines)
    assert sorted(x["id"] for x in lines) == sorted(
        f"{k}{i}" for k, n in (("q", 60), ("v", 12)) for i in range(n)
    )
    sides = [line["side"] for line in lines]
    assert sides == sorted(sides)  # left, then right
    assert set(sides) == {"left", "right"}
    assert lines[0]["id"].startswith("q")
    assert (lines[-1]["id"][0], lines[-1]["estimated_output_len"]) == ("v", 2000.0)


def test_the_order_of_replicas_ranks_each_apart(capsys, token_file, tmp_path):
    order = tmp_path / "order.jsonl"
    assert plan(capsys, "-i", token_file, *ON_A100, "--order", order, "--dp", 3)[0] == 0
    lines = [json.loads(line) for line in order.read_text().splitlines()]
    assert len({line["id"] for line in lines}) == 72
    for replica in range(3):
        ranks = [line["rank"] for line in lines if line["replica"] == replica]
        assert ranks == list(range(len(ranks)))
        assert ranks


def test_the_plot_is_a_picture(capsys, token_file, tmp_path):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "plan.png"
    assert plan(capsys, "-i", token_file, *ON_A100, "--plot", picture, "--dp", 2)[0] == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size > 10_000


def test_token_ids_are_planned_without_an_engine(token_file):
    watch = (
        "import sys; from blendserve.cli import main\n"
        f"status = main(['plan', '-i', {str(token_file)!r}, *{ON_A100!r}, '--json'])\n"
        "bad = {'torch', 'sglang', 'transformers', 'matplotlib'} & sys.modules.keys()\n"
        "print(status, bad, file=sys.stderr)"
    )
    ended = subprocess.run(
        [sys.executable, "-c", watch], capture_output=True, text=True, timeout=60, check=True
    )
    assert ended.stderr.splitlines()[-1] == "0 set()"


def test_unknown_lengths_are_said_to_be_assumed(capsys, tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps({"id": k, "input_ids": [k]}) + "\n" for k in range(40)))
    status, out, _ = plan(capsys, "-i", path, *ON_A100)
    assert status == 0
    assert "(estimated for 40 of 40 requests)" in out
    assert "40 output lengths are unknown: 8 requests run first as a sample" in out


def test_lines_that_cannot_run_are_left_out_and_named(capsys, tmp_path):
    path = tmp_path / "in.jsonl"
    long = {"id": "long", "input_ids": [1] * 8192}
    path.write_text(f'{{"id": "a", "input_ids": [1]}}\n{json.dumps(long)}\n')
    spec = ["--model-spec", "smollm2-135m", "--hardware", "cpu"]
    status, out, err = plan(capsys, "-i", path, *spec, "--json")
    assert (status, json.loads(out)["requests"]) == (0, 1)
    assert (
        "1 request left out: they leave no room for an answer in 8192 tokens of context "
        "(first: 'long', line 2)"
    ) in err
    path.write_text(json.dumps(long))
    status, _, err = plan(capsys, "-i", path, *spec)
    assert status == 1
    assert "none of its lines can be planned: 1 are too long" in err


# -- the lines of a file


def test_token_lines(tmp_path):
    job = read(
        tmp_path,
        {"id": "a", "input_ids": [1, 2], "output_len": 5},
        {"id": 7, "input_ids": []},
        {"id": "c", "input_ids": [3] * 90, "output_len": 50},
    )
    assert job.ids == ["a", "7", "c"]
    assert [ids.tolist() for ids in job.token_ids] == [[1, 2], [], [3] * 90]
    assert job.max_output_tokens == [5, 100, 10]
    assert job.known_output_tokens == [5, -1, 10]


def test_batch_lines(tmp_path):
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "why"}]},
    ]
    job = read(
        tmp_path,
        body_line("chat", "/v1/chat/completions", messages=messages, max_tokens=9, n=2),
        body_line("text", "/v1/completions", prompt="one two"),
        body_line("ids", "/v1/completions", prompt=[5, 6], max_tokens=4, ignore_eos=True),
        body_line("many", "/v1/completions", prompt=["x", "y z"], max_tokens=1),
        body_line("embed", "/v1/embeddings", input="a b c"),
        body_line("reply", "/v1/responses", input="hi", instructions="go", max_output_tokens=3),
    )
    assert job.ids == ["chat", "chat", "text", "ids", "many", "many", "embed", "reply"]
    assert [len(ids) for ids in job.token_ids] == [5, 5, 2, 2, 1, 2, 3, 4]
    assert job.max_output_tokens == [9, 9, 16, 4, 1, 1, 0, 3]
    assert job.known_output_tokens == [-1, -1, -1, 4, -1, -1, 0, -1]
    assert job.lines == [1, 1, 2, 3, 4, 4, 5, 6]


def picture_line(name, *urls):
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    messages = [{"role": "user", "content": parts}]
    return body_line(name, "/v1/chat/completions", messages=messages, max_tokens=5)


def test_pictures_are_counted_and_their_places_kept(tmp_path):
    job = read(
        tmp_path, body_line("t", "/v1/completions", prompt="a b"), picture_line("m", "x", "yy")
    )
    assert [len(ids) for ids in job.token_ids] == [2, 6]
    assert job.runs == [(1, 3, 1), (1, 6, 2)]
    assert job.media == []


def test_a_picture_that_cannot_be_counted_is_left_out_and_named(tmp_path):
    job = read(tmp_path, picture_line("m", ""))
    assert (job.ids, job.media) == ([], [("m", 1)])
    assert job.media_fault == "no picture at all"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("nonsense", "not valid JSON"),
        ("[1]", "JSON, but not an object. Write one JSON object per line"),
        ('{"custom_id": "x"}', "no request; a line must be"),
        ('{"id": "x", "input_ids": [1], "output_length": 3}', "did you mean 'output_len'?"),
        ('{"input_ids": [1]}', "id is missing; give every line a string"),
        ('{"id": "x", "input_ids": "hello"}', "input_ids is 'hello'; it must be a list of whole"),
        ('{"id": "x", "input_ids": [1.5]}', "something else than whole numbers"),
        ('{"id": "x", "input_ids": ["a"]}', "something else than whole numbers"),
        ('{"id": "x", "input_ids": [[1], [2, 3]]}', "unequal lengths"),
        ('{"id": "x", "input_ids": [-1]}', "out of range"),
        ('{"id": "x", "input_ids": [99999999999]}', "out of range"),
        ('{"id": "x", "input_ids": [99999999999999999999]}', "whole numbers"),
        ('{"id": "x", "input_ids": [1], "output_len": -1}', "output_len is -1; it must be a whole"),
        ('{"id": "x", "input_ids": [1], "output_len": true}', "output_len is True"),
        ('{"id": "a", "input_ids": [1]}', "the id 'a' is that of line 1 already"),
        (json.dumps(body_line("x", "/v1/images", prompt="p")), "url is '/v1/images'; it must be"),
        (json.dumps(body_line("x", "/v1/completions")), "prompt is missing"),
        (json.dumps(body_line("x", "/v1/completions", prompt=3)), "prompt is 3; it must be a text"),
        (json.dumps(body_line("x", "/v1/chat/completions", messages=[])), "messages is []"),
        (
            json.dumps(body_line("x", "/v1/chat/completions", messages=["hi"])),
            "every message needs a role",
        ),
        (
            json.dumps(body_line("x", "/v1/completions", prompt="p", max_tokens="9")),
            "max_tokens is '9'; it must be a whole number from 0",
        ),
        ('{"custom_id": "x", "url": "/v1/completions", "body": 1}', "body is 1; it must be"),
    ],
)
def test_a_bad_line_is_named_with_its_fault_and_remedy(tmp_path, line, said):
    path = tmp_path / "in.jsonl"
    path.write_text(f'{{"id": "a", "input_ids": [1]}}\n\n{line}\n')
    with pytest.raises(JobFileError) as error:
        read_job_file(path, 100, Words)
    assert str(error.value).startswith(f"{path}, line 3: ")
    assert said in str(error.value)


def test_a_template_that_refuses_names_the_line(tmp_path):
    class Strict(Words):
        def chat(self, messages, tools):
            raise RuntimeError("roles must alternate")

    path = tmp_path / "in.jsonl"
    messages = [{"role": "user", "content": "x"}]
    path.write_text(json.dumps(body_line("x", "/v1/chat/completions", messages=messages)))
    with pytest.raises(JobFileError, match=r"line 1: the chat template refuses messages: roles"):
        read_job_file(path, 100, Strict)


# -- wrong usage


def test_wrong_input_is_refused_with_a_remedy(capsys, tmp_path, token_file):
    empty, text = tmp_path / "empty.jsonl", tmp_path / "text.jsonl"
    empty.write_text("\n")
    text.write_text(json.dumps(body_line("x", "/v1/completions", prompt="hello")))
    missing = tmp_path / "missing"
    for args, status, said in (
        (["-i", missing, *ON_A100], 1, f"{missing}: No such file or directory; give the path"),
        (["-i", tmp_path, *ON_A100], 1, f"{tmp_path}: Is a directory; give the path"),
        (["-i", empty, *ON_A100], 1, f"{empty} has no requests"),
        (["-i", text, *ON_A100], 1, "known here by its sizes only: name a folder with"),
        (["-i", text, *ON_A100, "--tokenizer", tmp_path], 1, "has no tokenizer.json"),
        (["-i", token_file, "--model-spec", missing, "--hardware", "l40s"], 2, "no such file"),
        (["-i", token_file, *ON_A100[:3], "a100-80g-sxn"], 2, "did you mean 'a100-80g-sxm'?"),
        (["-i", token_file, *ON_A100[:3], "x.json"], 2, "x.json: No such file or directory"),
        (["-i", token_file, "--model-spec", "llama-3.1-70b", *ON_A100[2:]], 1, "--tp"),
        (["-i", token_file, *ON_A100, "--order", token_file], 1, "must be different files"),
        (["-i", token_file, *ON_A100, "--order", tmp_path], 1, "is a folder"),
        (["-i", token_file, *ON_A100, "--order", missing / "x"], 1, "does not exist; make it"),
        (["-i", token_file, *ON_A100, "--plot", tmp_path / "x.svg"], 1, "a name in .png"),
    ):
        found, out, err = plan(capsys, *args)
        assert (found, out) == (status, ""), args
        assert err.startswith("blendserve plan: ")
        assert said in err


def test_measured_ceilings_change_what_is_predicted(capsys, token_file, tmp_path):
    figures = tmp_path / "measured.json"
    found = []
    for flops in (2.5e14, 2.5e13):
        figures.write_text(f'{{"base": "a100", "compute_flops": {flops}, "source": "a test"}}')
        status, out, _ = plan(capsys, "-i", token_file, *ON_A100[:3], figures, "--json")
        assert status == 0
        found.append(json.loads(out)["density"]["job"])
    # Norms and activations wait for the memory, which is the same.
    assert 8 < found[1] / found[0] < 10


def test_a_quantised_cache_halves_the_memory_traffic(capsys, token_file):
    plain = json.loads(plan(capsys, "-i", token_file, *ON_A100, "--json")[1])
    fp8 = ["--kv-cache-dtype", "fp8_e4m3"]
    small = json.loads(plan(capsys, "-i", token_file, *ON_A100, *fp8, "--json")[1])
    assert small["density"]["job"] == pytest.approx(2 * plain["density"]["job"])


@pytest.mark.parametrize("args", [["--dp", "0"], ["--sample-fraction", "2"], ["--jsn"], []])
def test_wrong_flags_are_refused(capsys, token_file, args):
    with pytest.raises(SystemExit) as end:
        main(["plan", "-i", str(token_file), *ON_A100[: 4 if args else 2], *args])
    assert end.value.code == 2


def test_text_is_tokenised_with_a_folder_of_ones_own(capsys, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    folder = tmp_path / "model"
    folder.mkdir()
    made = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"[UNK]": 0, "a": 1, "b": 2}, unk_token="[UNK]")
    )
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.save(str(folder / "tokenizer.json"))
    path = tmp_path / "in.jsonl"
    path.write_text(json.dumps(body_line("x", "/v1/completions", prompt="a b a b")))
    status, out, _ = plan(capsys, "-i", path, *ON_A100, "--tokenizer", folder, "--json")
    assert (status, json.loads(out)["prompt_tokens"]) == (0, 4)
    (folder / "tokenizer.json").write_text("{}")
    status, _, err = plan(capsys, "-i", path, *ON_A100, "--tokenizer", folder)
    assert status == 1
    assert "is no tokenizer" in err


# -- what it costs


def test_costs_are_device_time_money_and_where_they_go(capsys, token_file):
    status, out, _ = plan(
        capsys, "-i", token_file, *ON_A100, "--tp", "2", "--json", "--price-per-hour", "3"
    )
    assert status == 0
    found = json.loads(out)
    cost, seconds = found["cost"], found["predicted_seconds"]
    assert cost["devices"] == 2
    assert cost["device_seconds"] == pytest.approx(2 * seconds["blend"])
    assert cost["price"] == pytest.approx(3 * cost["device_seconds"] / 3600)
    assert seconds["bound"] <= seconds["blend"]
    assert sum(part["share"] for part in cost["stretches"]) == pytest.approx(1)
    # The long answers stand in the last twelve lines, and are nearly all of the work.
    assert cost["stretches"][-1]["last_line"] == 72
    assert sum(part["share"] for part in cost["stretches"][-2:]) > 0.9
    assert {dear["id"][0] for dear in cost["dearest"]} == {"v"}
    assert cost["prompts"] < 0.2
    assert cost["last"] == [], "all long answers end together"


def test_text_says_money_only_with_a_price(capsys, token_file):
    _, out, _ = plan(capsys, "-i", token_file, *ON_A100)
    assert "device time" in out
    assert "an hour" not in out
    _, out, _ = plan(capsys, "-i", token_file, *ON_A100, "--price-per-hour", "1e6", "--dp", "2")
    assert "of 2 devices together, which costs " in out
    assert "nobody has measured" not in out


def test_prices_are_numbers_and_a_guess_is_called_one(capsys, token_file):
    for wrong in ("free", "-1", "nan", "inf"):
        with pytest.raises(SystemExit):
            plan(capsys, "-i", token_file, *ON_A100, "--price-per-hour", wrong)
        assert "is no price" in capsys.readouterr().err
    _, out, _ = plan(
        capsys, "-i", token_file, "--model-spec", "llama-3.1-8b", "--hardware", "cpu",
        "--kv-tokens", "9999",
    )  # fmt: skip
    assert "nobody has measured 'cpu'" in out
    assert "blendserve calibrate" in out


def test_prompts_alone_have_no_tail(capsys, tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text(json.dumps({"id": "a", "input_ids": [1, 2, 3], "output_len": 0}) + "\n")
    status, out, _ = plan(capsys, "-i", path, *ON_A100)
    assert status == 0
    assert "prompts            100%" in out
