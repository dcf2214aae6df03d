"""BlendServe's settings: where they come from, which source wins, and what is refused."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from blendserve.config import ConfigError, Settings, load_settings, to_environment
from blendserve.planner import HARDWARE


@pytest.fixture(autouse=True)
def clean_environment() -> Iterator[None]:
    with mock.patch.dict(os.environ):
        for name in [name for name in os.environ if name.startswith("BLENDSERVE_")]:
            del os.environ[name]
        yield


@pytest.fixture
def toml(tmp_path: Path) -> Callable[[str], Path]:
    """Writes the config file and names it in the environment."""

    def write(text: str) -> Path:
        path = tmp_path / "settings.toml"
        path.write_text(text, encoding="utf-8")
        os.environ["BLENDSERVE_CONFIG"] = str(path)
        return path

    return write


# -- sources and precedence


def test_blendserve_is_off_unless_something_switches_it_on():
    assert load_settings().enabled is False


@pytest.mark.parametrize("value", ["1", "true", "True"])
def test_a_variable_switches_it_on(value):
    os.environ["BLENDSERVE_ENABLED"] = value
    assert load_settings().enabled is True


def test_a_config_file_sets_what_it_names_and_nothing_else(toml):
    toml('enabled = true\nhardware = "l40s"\nbatch_dir = "jobs"\nsample_fraction = 0.2\n')
    expected = Settings.model_construct(
        **{
            **Settings.model_construct().model_dump(),
            "enabled": True,
            "hardware": "l40s",
            "batch_dir": Path("jobs"),
            "sample_fraction": 0.2,
        }
    )
    assert load_settings() == expected


def test_an_empty_config_file_changes_nothing(toml):
    defaults = load_settings()
    toml("")
    assert load_settings() == defaults


def test_an_empty_config_variable_counts_as_unset():
    os.environ["BLENDSERVE_CONFIG"] = ""
    assert load_settings() == Settings.model_construct()


def test_arguments_win_over_variables_and_variables_over_the_file(toml):
    toml('hardware = "l40s"\nmax_batch_lines = 10\nsample_fraction = 0.5\n')
    os.environ["BLENDSERVE_HARDWARE"] = "cpu"
    os.environ["BLENDSERVE_MAX_BATCH_LINES"] = "20"
    loaded = load_settings(hardware="h100-80g-sxm")
    assert loaded.hardware == "h100-80g-sxm"
    assert loaded.max_batch_lines == 20
    assert loaded.sample_fraction == 0.5


def test_arguments_are_read_as_the_command_line_gives_them():
    loaded = load_settings(sample_fraction="0.25", max_batch_lines="7", batch_dir="jobs")
    assert (loaded.sample_fraction, loaded.max_batch_lines) == (0.25, 7)
    assert loaded.batch_dir == Path("jobs")


def test_settings_do_not_change_once_they_are_read():
    with pytest.raises(ValidationError, match="frozen"):
        load_settings().hardware = "cpu"  # type: ignore[misc]


def test_variables_of_the_same_prefix_that_are_no_settings_are_left_alone():
    os.environ["BLENDSERVE_CACHE"] = "models"
    os.environ["BLENDSERVE_DATA"] = "traces"
    assert load_settings() == Settings.model_construct()


# -- names that do not exist


@pytest.mark.parametrize(
    ("variable", "nearest"),
    [
        ("BLENDSERVE_HARDWEAR", "hardware"),
        ("BLENDSERVE_ENABLE", "enabled"),
        ("BLENDSERVE_BATCHDIR", "batch_dir"),
        ("BLENDSERVE_MAX_LINES", "max_batch_lines"),
    ],
)
def test_an_unknown_variable_is_refused_with_the_nearest_name(variable, nearest):
    os.environ[variable] = "1"
    with pytest.raises(ConfigError) as refusal:
        load_settings()
    assert f"environment variable {variable}: no such setting" in str(refusal.value)
    assert f"Did you mean {nearest!r}?" in str(refusal.value)


def test_an_unknown_key_in_the_file_is_refused_with_the_nearest_name(toml):
    path = toml('hardwear = "cpu"\n')
    with pytest.raises(ConfigError) as refusal:
        load_settings()
    assert f"setting 'hardwear' ({path}): no such setting" in str(refusal.value)
    assert "Did you mean 'hardware'?" in str(refusal.value)


def test_an_unknown_argument_is_refused_with_the_nearest_name(toml):
    toml('hardware = "cpu"\n')
    with pytest.raises(ConfigError) as refusal:
        load_settings(hardwear="cpu")
    assert "setting 'hardwear' (argument): no such setting" in str(refusal.value)
    assert "Did you mean 'hardware'?" in str(refusal.value)


def test_a_table_in_the_file_is_an_unknown_key(toml):
    toml("[planner]\nsample_fraction = 0.1\n")
    with pytest.raises(ConfigError, match="'planner'"):
        load_settings()


def test_a_name_like_no_other_is_refused_with_all_the_names():
    os.environ["BLENDSERVE_ZQX"] = "1"
    with pytest.raises(ConfigError) as refusal:
        load_settings()
    assert "Did you mean" not in str(refusal.value)
    assert all(name in str(refusal.value) for name in Settings.model_fields)


# -- values that cannot be used


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("enabled", "perhaps"),
        ("sample_fraction", "lots"),
        ("sample_fraction", "-0.1"),
        ("sample_fraction", "1.01"),
        ("sample_fraction", "nan"),
        ("sharing_preserved", "0"),
        ("max_batch_lines", "0"),
        ("max_batch_lines", "2.5"),
        ("max_file_bytes", "200MB"),
        ("hardware", ""),
        ("hardware", "h1000-sxm"),
    ],
)
def test_a_bad_value_is_refused_with_its_setting_and_itself(setting, value):
    os.environ[f"BLENDSERVE_{setting.upper()}"] = value
    with pytest.raises(ConfigError, match=f"{setting} = '{value}': "):
        load_settings()


def test_a_bad_value_in_the_file_is_refused_with_its_setting_and_itself(toml):
    toml("max_batch_lines = -4\n")
    with pytest.raises(ConfigError, match="max_batch_lines = -4: "):
        load_settings()


def test_a_bad_value_on_the_command_line_is_refused_with_its_setting_and_itself():
    with pytest.raises(ConfigError, match="sample_fraction = '7': "):
        load_settings(sample_fraction="7")


def test_hardware_that_is_not_in_the_planners_table_is_refused_with_what_is(toml):
    toml('hardware = "h100-81g-sxm"\n')
    with pytest.raises(ConfigError) as refusal:
        load_settings()
    assert all(name in str(refusal.value) for name in HARDWARE)
    assert "did you mean 'h100-80g-sxm'?" in str(refusal.value)


@pytest.mark.parametrize("name", ["auto", *HARDWARE])
def test_every_row_of_the_planners_table_may_be_named(name):
    os.environ["BLENDSERVE_HARDWARE"] = name
    assert load_settings().hardware == name


def test_all_bad_values_are_named_at_once():
    os.environ["BLENDSERVE_MAX_BATCH_LINES"] = "none"
    os.environ["BLENDSERVE_SAMPLE_FRACTION"] = "3"
    with pytest.raises(ConfigError, match=r"(?s)sample_fraction = '3'.*max_batch_lines = 'none'"):
        load_settings()


@pytest.mark.parametrize("name", ["missing.toml", "."])
def test_a_config_file_that_is_none_is_refused_by_its_name(tmp_path, name):
    os.environ["BLENDSERVE_CONFIG"] = str(tmp_path / name)
    with pytest.raises(ConfigError) as refusal:
        load_settings()
    assert f"BLENDSERVE_CONFIG names {tmp_path / name}, which is not a file" in str(refusal.value)


@pytest.mark.parametrize(
    "data",
    [
        b"enabled = [",
        b"enabled = true\nhardware cpu\n",
        b"hardware = 'cpu'\nhardware = 'l40s'\n",
        b"\xff\xfeh\0",
        b"hardware = '\xe9'\n",
    ],
)
def test_a_malformed_config_file_is_refused_by_its_name(toml, data):
    path = toml("")
    path.write_bytes(data)
    with pytest.raises(ConfigError) as refusal:
        load_settings()
    assert str(refusal.value).startswith(f"{path} is not a TOML file: ")


# -- handing the settings on

words = st.text(st.characters(codec="ascii", exclude_characters="\0"), max_size=20)


@given(
    enabled=st.booleans(),
    batch_dir=words.map(Path),
    hardware=st.sampled_from(["auto", *HARDWARE]),
    sample_fraction=st.floats(0, 1),
    sharing_preserved=st.floats(0, 1, exclude_min=True),
    max_batch_lines=st.integers(1, 10**12),
    max_file_bytes=st.integers(1, 10**15),
    feedback_address=words,
)
@settings(deadline=None, database=None)
def test_a_process_started_with_the_environment_reads_the_same_settings(**values):
    given_settings = load_settings(**values)
    with mock.patch.dict(os.environ, to_environment(given_settings)):
        assert load_settings() == given_settings


def test_the_environment_handed_on_wins_over_a_config_file(toml):
    toml('hardware = "l40s"\nenabled = false\n')
    os.environ.update(to_environment(load_settings(enabled=True, hardware="cpu")))
    assert load_settings().enabled is True
    assert load_settings().hardware == "cpu"


def test_the_folder_of_media_must_be_there(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="missing is no folder"):
        load_settings(media_root=str(tmp_path / "missing"))
    monkeypatch.chdir(tmp_path)
    assert load_settings(media_root=".").media_root == tmp_path.resolve()


def test_every_setting_is_handed_on(tmp_path):
    names = {f"BLENDSERVE_{name.upper()}" for name in Settings.model_fields}
    handed_on = to_environment(load_settings(trace_file="steps.jsonl", media_root=str(tmp_path)))
    assert set(handed_on) == names
    unset = to_environment(load_settings())
    assert not {"BLENDSERVE_TRACE_FILE", "BLENDSERVE_MEDIA_ROOT"} & set(unset), "unset stays unset"
