"""SGLang is refused, with a message that says why, where it is not what BlendServe extends."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blendserve import __version__
from blendserve.runtime import attention, guard, plugin
from blendserve.runtime.guard import UnsupportedSGLang

RANGE = (guard.OLDEST_SGLANG, guard.NEWEST_SGLANG)
ABORT = "fake_engine.Scheduler.abort_request"
FEEDBACK = "BLENDSERVE_FEEDBACK_ADDRESS"


class Scheduler:
    def abort_request(self, recv_req, *rest): ...


@pytest.fixture(autouse=True)
def fake_engine(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A module to compare with, so that the real one need not be imported."""
    module = ModuleType("fake_engine")
    module.Scheduler = Scheduler  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "fake_engine", module)
    return module


# -- version


@given(st.tuples(st.integers(0, 1), st.integers(3, 7), st.integers(0, 40)))
@settings(deadline=None, database=None)
def test_a_release_is_taken_exactly_if_it_lies_in_the_supported_range(release):
    version = ".".join(map(str, release))
    oldest, newest = (tuple(map(int, bound.split("."))) for bound in RANGE)
    if oldest <= release <= newest:
        guard.check_version(version)
    else:
        with pytest.raises(UnsupportedSGLang):
            guard.check_version(version)


@pytest.mark.parametrize("bound", RANGE)
@pytest.mark.parametrize("suffix", ["+cu130", ".post1", ".post2+cu126"])
def test_another_build_of_a_supported_release_is_taken(bound, suffix):
    guard.check_version(bound + suffix)


@pytest.mark.parametrize(
    "version",
    [
        *["0.5.9", "0.5.15", "0.5.24", "0.6.0", "1.0"],
        *["0.5.15.post1", "0.5.24+cu130"],  # other builds of unsupported releases
        *["0.5.16rc1", "0.5.20rc1", "0.5.20.dev3+g1234567", "0.5.23rc2", "0.5.24rc1"],
    ],
)
def test_the_refusal_names_the_installed_version_and_the_supported_range(version):
    with pytest.raises(UnsupportedSGLang) as refusal:
        guard.check_version(version)
    assert f"SGLang {version} is installed" in str(refusal.value)
    assert "{} to {}".format(*RANGE) in str(refusal.value)
    assert f"pip install sglang=={guard.NEWEST_SGLANG}" in str(refusal.value)


def test_a_version_outside_the_range_is_refused_even_if_every_signature_fits():
    with pytest.raises(UnsupportedSGLang, match=r"0\.5\.24 is installed"):
        guard.check_sglang({}, version="0.5.24")


def test_without_sglang_the_message_says_how_to_install_it(monkeypatch):
    def nothing_installed(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", nothing_installed)
    with pytest.raises(UnsupportedSGLang, match=r"not installed.*make setup"):
        guard.check_sglang({})


# -- signatures


def test_an_equal_signature_fits():
    assert guard.differences({ABORT: ("self", "recv_req", "rest")}) == []


def test_a_changed_signature_is_named_with_actual_and_expected_parameters():
    assert guard.differences({ABORT: ("self", "request")}) == [
        f"{ABORT} takes (self, recv_req, rest), expected (self, request)"
    ]


def test_a_further_parameter_is_a_difference_unless_dots_allow_it():
    (difference,) = guard.differences({ABORT: ("self", "recv_req")})
    assert "takes (self, recv_req, rest), expected (self, recv_req)" in difference
    assert guard.differences({ABORT: ("self", "recv_req", "...")}) == []


def test_dots_allow_no_other_name_before_them():
    (difference,) = guard.differences({ABORT: ("self", "request", "...")})
    assert "takes (self, recv_req, rest), expected (self, request, ...)" in difference


def test_a_decorated_function_is_compared_by_what_it_wraps(fake_engine, monkeypatch):
    def wrapper(*args, **kwargs): ...

    wrapper.__wrapped__ = Scheduler.abort_request
    monkeypatch.setattr(fake_engine, "Scheduler", SimpleNamespace(abort_request=wrapper))
    assert guard.differences({ABORT: ("self", "recv_req", "rest")}) == []


@pytest.mark.parametrize(
    "path", ["fake_engine.Scheduler.gone", "fake_engine.Gone.abort_request", "gone_engine.run"]
)
def test_a_missing_function_is_named(path):
    (difference,) = guard.differences({path: ("self",)})
    assert difference.startswith(f"{path} is missing")


@pytest.mark.parametrize(
    ("source", "cause"),
    [
        ("raise ImportError('libcuda.so.1: cannot open shared object file')", "libcuda.so.1"),
        ("import a_package_that_is_not_there", "a_package_that_is_not_there"),
        ("raise OSError('undefined symbol: cuInit')", "undefined symbol"),
    ],
)
def test_a_module_that_cannot_be_imported_is_told_with_its_own_error(
    tmp_path, monkeypatch, source, cause
):
    """Not as a difference of SGLang's: the driver may be missing."""
    package = tmp_path / "broken_engine"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "scheduler.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("broken_engine", "broken_engine.scheduler"):
        sys.modules.pop(name, None)
    with pytest.raises(UnsupportedSGLang) as refusal:
        guard.check_sglang({"broken_engine.scheduler.Scheduler.run": ("self",)}, version="0.5.20")
    message = str(refusal.value)
    assert "broken_engine.scheduler cannot be imported here" in message
    assert cause in message
    assert "nvidia-smi" in message
    assert "Reinstall" not in message


def test_a_refusal_lists_every_difference_and_how_to_go_on():
    expected = {ABORT: ("self",), "fake_engine.Scheduler.gone": ("self",)}
    with pytest.raises(UnsupportedSGLang) as refusal:
        guard.check_sglang(expected, version="0.5.20")
    message = str(refusal.value)
    assert "SGLang 0.5.20 is in BlendServe's supported range ({} to {})".format(*RANGE) in message
    assert f"{ABORT} takes (self, recv_req, rest), expected (self)" in message
    assert "fake_engine.Scheduler.gone is missing" in message
    assert "BLENDSERVE_ENABLED=0" in message


CHECK_REAL_SGLANG = """
from blendserve.runtime import cpu_platform, guard, plugin

cpu_platform.activate()
plugin.activate()
guard.check_sglang({**guard.EXPECTED_SIGNATURES, **guard.HTTP_SIGNATURES})

from sglang.srt.managers.scheduler import Scheduler

assert Scheduler.__module__ == "sglang.srt.managers.scheduler", "switched off, yet replaced"
Scheduler.abort_request = lambda self, request: None
del Scheduler.get_new_batch_prefill
for difference in guard.differences(guard.EXPECTED_SIGNATURES):
    print(difference)
"""


def test_the_installed_sglang_passes_until_one_of_its_functions_is_changed():
    own = {name: value for name, value in os.environ.items() if "BLENDSERVE" not in name}
    ended = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CHECK_REAL_SGLANG],
        env={**own, "BLENDSERVE_ENABLED": "0"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    scheduler = "sglang.srt.managers.scheduler.Scheduler"
    missing, changed = ended.stdout.splitlines()
    assert missing.startswith(f"{scheduler}.get_new_batch_prefill is missing")
    assert changed == (
        f"{scheduler}.abort_request takes (self, request), expected (self, recv_req)"
    )


# -- the scheduler's handshake


def test_a_scheduler_that_names_our_version_is_live():
    guard.check_scheduler_live({"max_total_num_tokens": 4096, "blendserve": __version__})


@pytest.mark.parametrize("info", [{}, {"max_total_num_tokens": 4096}, {"blendserve": None}])
def test_a_handshake_without_our_field_is_refused(info):
    with pytest.raises(UnsupportedSGLang, match="without BlendServe's scheduler") as refusal:
        guard.check_scheduler_live(info)
    assert "SGLANG_PLUGINS" in str(refusal.value)
    assert "BLENDSERVE_ENABLED=0" in str(refusal.value)


# -- what the plugin makes of it


class Registered:
    """What `activate` checked and registered."""

    def __init__(self) -> None:
        self.checked: list[object] = []
        self.front_process: list[bool] = []


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[Registered]:
    """An SGLang in which everything fits, and a clean environment."""
    seen = Registered()
    monkeypatch.setattr(guard, "check_sglang", seen.checked.append)
    monkeypatch.setattr(plugin, "_register", seen.front_process.append)
    with mock.patch.dict(os.environ):
        for name in [name for name in os.environ if name.startswith("BLENDSERVE_")]:
            del os.environ[name]
        yield seen


def test_sglang_finds_the_plugin_by_its_entry_point():
    (entry,) = importlib.metadata.entry_points(group="sglang.srt.plugins", name="blendserve")
    assert entry.value == "blendserve.runtime.plugin:activate"


@pytest.mark.parametrize("enabled", [None, "0", "false"])
def test_a_plugin_that_is_not_switched_on_checks_and_changes_nothing(registered, enabled):
    if enabled is not None:
        os.environ["BLENDSERVE_ENABLED"] = enabled
    before = dict(os.environ)
    plugin.activate()
    assert registered.checked == []
    assert registered.front_process == []
    assert dict(os.environ) == before


def test_the_front_process_is_checked_for_scheduler_and_routes(registered):
    os.environ["BLENDSERVE_ENABLED"] = "1"
    plugin.activate()
    assert registered.checked == [guard.EXPECTED_SIGNATURES, guard.HTTP_SIGNATURES]
    assert registered.front_process == [True]


def test_a_spawned_process_gets_the_scheduler_only(registered, monkeypatch):
    os.environ["BLENDSERVE_ENABLED"] = "1"
    monkeypatch.setattr(plugin.multiprocessing, "parent_process", object)
    plugin.activate()
    assert registered.checked == [guard.EXPECTED_SIGNATURES]
    assert registered.front_process == [False]


def test_the_front_process_chooses_a_feedback_address_and_the_others_keep_it(registered):
    os.environ["BLENDSERVE_ENABLED"] = "1"
    plugin.activate()
    chosen = os.environ[FEEDBACK]
    assert chosen.startswith("ipc://")
    plugin.activate()
    assert os.environ[FEEDBACK] == chosen
    del os.environ[FEEDBACK]
    plugin.activate()
    assert os.environ[FEEDBACK] != chosen


def test_an_unsupported_sglang_ends_the_process_with_the_message(registered, monkeypatch):
    def refuse(expected):
        raise UnsupportedSGLang("SGLang 9.9 is installed; BlendServe supports others")

    monkeypatch.setattr(guard, "check_sglang", refuse)
    os.environ["BLENDSERVE_ENABLED"] = "1"
    with pytest.raises(SystemExit) as end:
        plugin.activate()
    assert end.value.code == "blendserve: SGLang 9.9 is installed; BlendServe supports others"
    assert registered.front_process == []
    assert FEEDBACK not in os.environ


@pytest.mark.parametrize(
    ("variable", "value", "named"),
    [
        ("BLENDSERVE_ENABLED", "maybe", "enabled = 'maybe'"),
        ("BLENDSERVE_SAMPLE_FRACTION", "2", "sample_fraction = '2'"),
        ("BLENDSERVE_ENABLE", "1", "Did you mean 'enabled'?"),
        ("BLENDSERVE_HARDWARE", "h100-81g-sxm", "did you mean 'h100-80g-sxm'?"),
        ("BLENDSERVE_CONFIG", "no-such.toml", "no-such.toml, which is not a file"),
    ],
)
def test_a_bad_setting_ends_the_process_with_the_message(registered, variable, value, named):
    os.environ[variable] = value
    with pytest.raises(SystemExit) as end:
        plugin.activate()
    assert str(end.value.code).startswith("blendserve: ")
    assert named in str(end.value.code)
    assert registered.front_process == []


def test_a_malformed_config_file_ends_the_process_with_the_message(registered, tmp_path):
    path = tmp_path / "settings.toml"
    path.write_text("enabled = [")
    os.environ["BLENDSERVE_CONFIG"] = str(path)
    with pytest.raises(SystemExit) as end:
        plugin.activate()
    assert str(end.value.code).startswith(f"blendserve: {path} is not a TOML file: ")
    assert registered.front_process == []


def test_a_hook_that_has_no_place_in_sglang_ends_the_process(registered, monkeypatch):
    os.environ["BLENDSERVE_ENABLED"] = "1"
    monkeypatch.setattr(attention, "_LAST_SLOT_FUNCTIONS", ("sglang.gone", "sglang.gone_too"))
    monkeypatch.setattr(plugin, "_register", lambda in_front_process: attention._keep_triton_off())
    with pytest.raises(SystemExit, match=r"neither of sglang\.gone, sglang\.gone_too is in this"):
        plugin.activate()
