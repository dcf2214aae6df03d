"""BlendServe's own settings, in one place: environment variables and a TOML file.

SGLang's flags stay SGLang's. What BlendServe adds is read here once per process, from variables
``BLENDSERVE_<NAME>`` and, below them, from the TOML file that ``BLENDSERVE_CONFIG`` names. The
environment is also how the command line hands its choices to the processes that SGLang spawns.
"""

from __future__ import annotations

import difflib
import os
import tomllib
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, field_validator
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from blendserve.planner import hardware

ENV_PREFIX = "BLENDSERVE_"
CONFIG_FILE_VARIABLE = "BLENDSERVE_CONFIG"
# Variables of the same prefix that are not settings.
_OTHER_VARIABLES = {
    CONFIG_FILE_VARIABLE,
    *("BLENDSERVE_CACHE", "BLENDSERVE_DATA", "BLENDSERVE_ENGINE_TOKEN", "BLENDSERVE_PARENT_PID"),
}


class ConfigError(ValueError):
    """A setting that does not exist or has a value that cannot be used."""


class Settings(BaseSettings):
    """Every setting of BlendServe, with its default.

    Precedence: keyword arguments, then ``BLENDSERVE_*`` variables, then the TOML file.
    """

    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, frozen=True, extra="forbid")

    enabled: bool = Field(
        default=False,
        description="Serve blended: take over SGLang's scheduler and add the Batch API.",
    )
    batch_dir: Path = Field(
        default=Path("blendserve-batches"),
        description="Directory that holds files, batches and journals of the Batch API.",
    )
    hardware: str = Field(
        default="auto",
        description="Row of the planner's hardware table; 'auto' looks at the device.",
    )
    sample_fraction: float = Field(
        default=0.01, ge=0.0, le=1.0, description="Share of a job that runs first to learn lengths."
    )
    sharing_preserved: float = Field(
        default=0.99,
        gt=0.0,
        le=1.0,
        description="Share of the DFS order's prefix sharing that node splits must keep.",
    )
    max_batch_lines: int = Field(default=50_000, ge=1, description="Lines allowed in a batch file.")
    max_file_bytes: int = Field(
        default=200_000_000, ge=1, description="Bytes allowed in an uploaded file."
    )
    max_running_batches: int = Field(
        default=8, ge=1, description="Batches that run at once; further ones wait their turn."
    )
    max_open_batches: int = Field(
        default=50_000, ge=1, description="Batches of one tenant that have not ended."
    )
    online_share: float = Field(
        default=0.2,
        ge=0.0,
        lt=1.0,
        description="Share of KV memory and prefill that batch work leaves to online requests, "
        "while any come.",
    )
    trace_file: Path | None = Field(
        default=None, description="File for one JSON line per scheduler step; none by default."
    )
    allow_remote_urls: bool = Field(
        default=False, description="Let batch lines name http(s) media for the server to fetch."
    )
    media_root: Path | None = Field(
        default=None,
        description="Folder below which lines may name pictures by file: URLs; none by default.",
    )
    api_keys_file: str = Field(
        default="",
        description="File of API keys, lines `tenant key [admin]`; each tenant sees its own only.",
    )
    webhook_url: str = Field(
        default="", description="Address that is told of every batch that has ended."
    )
    webhook_hosts: str = Field(
        default="",
        description="Hosts (host or host:port), with commas between, that a batch's metadata may "
        "name in `blendserve_webhook_url` to be told of its end.",
    )
    webhook_secret_file: str = Field(
        default="", description="File with the secret, whsec_..., that webhooks are signed with."
    )
    allowed_hosts: str = Field(
        default="",
        description="Further host names, with commas between, under which a server without keys "
        "may be asked; `*` for any. Loopback names and IP addresses always are.",
    )
    engine_hang_seconds: float = Field(
        default=120.0,
        ge=0.0,
        description="Without a sign of life for so long the engine is restarted; 0 never.",
    )
    engine_silent_seconds: float = Field(
        default=20.0,
        gt=0.0,
        description="Of several engines, one that says nothing for so long is dropped; its lines "
        "run on the others.",
    )
    cluster_key_file: str = Field(
        default="",
        description="File with the key that a coordinator and its engines share, the same on "
        "every machine.",
    )
    behind_coordinator: bool = Field(
        default=False,
        description="Internal: this server is one of the engines of a coordinator.",
    )
    behind_front: bool = Field(
        default=False,
        description="Internal: this server is the engine of a front process that has the batches.",
    )
    feedback_address: str = Field(
        default="", description="Internal: where the scheduler reports to the front process."
    )

    @field_validator("hardware")
    @classmethod
    def _known_hardware(cls, name: str) -> str:
        if name != "auto":
            hardware(name)
        return name

    @field_validator("media_root")
    @classmethod
    def _folder_of_media(cls, folder: Path | None) -> Path | None:
        if folder is None:
            return None
        if not folder.is_dir():
            raise ValueError(f"{folder} is no folder; make it, or name another")
        return folder.resolve()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        path = os.environ.get(CONFIG_FILE_VARIABLE)
        if not path:
            return init_settings, env_settings
        if not Path(path).is_file():
            raise ConfigError(
                f"{CONFIG_FILE_VARIABLE} names {path}, which is not a file. "
                "Create it or unset the variable."
            )
        try:
            return init_settings, env_settings, TomlConfigSettingsSource(settings_cls, path)
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path} is not a TOML file: {error}") from error


def load_settings(**overrides: Any) -> Settings:
    """Read the settings.

    Raises:
        ConfigError: an unknown setting (with the nearest valid name) or an unusable value.
    """
    known = set(Settings.model_fields)
    for variable in os.environ:
        name = variable.removeprefix(ENV_PREFIX).lower()
        if variable.startswith(ENV_PREFIX) and variable not in _OTHER_VARIABLES:
            _require_known(name, known, f"environment variable {variable}")
    try:
        return Settings(**overrides)
    except ValidationError as error:
        problems = []
        for item in error.errors():
            name = ".".join(str(part) for part in item["loc"])
            if item["type"] == "extra_forbidden":
                where = "argument" if name in overrides else os.environ.get(CONFIG_FILE_VARIABLE)
                _require_known(name, known, f"setting {name!r} ({where})")
            problems.append(f"{name} = {item['input']!r}: {item['msg']}")
        raise ConfigError("BlendServe settings: " + "; ".join(problems)) from error


def to_environment(settings: Settings) -> dict[str, str]:
    """The settings as environment variables, for processes started from here."""
    values = settings.model_dump(mode="json")
    return {
        f"{ENV_PREFIX}{name.upper()}": str(value)
        for name, value in values.items()
        if value is not None
    }


def _require_known(name: str, known: set[str], where: str) -> None:
    if name in known:
        return
    near = difflib.get_close_matches(name, known, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ConfigError(f"{where}: no such setting.{hint} Known: {', '.join(sorted(known))}.")
