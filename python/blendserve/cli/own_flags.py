"""BlendServe's own flags of `serve` and `run-batch`, and a parser that names the nearest one."""

from __future__ import annotations

import argparse
import difflib
from typing import NoReturn

from blendserve.config import Settings

# Settings that have a flag; the others are set through the environment or a config file.
SETTING_FLAGS = (
    *("batch_dir", "hardware", "sample_fraction", "max_batch_lines", "max_file_bytes"),
    *(
        "max_running_batches",
        "max_open_batches",
        "api_keys_file",
        "engine_hang_seconds",
        "engine_silent_seconds",
        "allow_remote_urls",
        "media_root",
        "allowed_hosts",
        *("webhook_url", "webhook_hosts", "webhook_secret_file"),
        "cluster_key_file",
    ),
)


class Parser(argparse.ArgumentParser):
    """An unknown flag is an error that names the nearest valid one."""

    def error(self, message: str) -> NoReturn:
        marker = "unrecognized arguments: "
        if message.startswith(marker):
            unknown = next(
                (word for word in message[len(marker) :].split() if word.startswith("-")), None
            )
            if unknown:
                known = [flag for flag in self._option_string_actions if flag.startswith("--")]
                near = difflib.get_close_matches(unknown.split("=")[0], known, n=1)
                message = f"unknown flag {unknown}" + (f"; did you mean {near[0]}?" if near else "")
        super().error(message)


def add_setting_flags(parser: argparse.ArgumentParser) -> None:
    """Add BlendServe's own flags, with the settings' descriptions and defaults."""
    group = parser.add_argument_group("blendserve")
    for name in SETTING_FLAGS:
        field = Settings.model_fields[name]
        group.add_argument(
            f"--{name.replace('_', '-')}",
            default=None,
            help=f"{field.description} Default: {field.default}.",
        )


def add_own_flags(parser: argparse.ArgumentParser) -> None:
    """Add all of BlendServe's own flags."""
    add_setting_flags(parser)
    parser.add_argument(
        "--disable-mixed-chunk",
        action="store_true",
        help="Compute prefill and decode in steps of their own, as SGLang does by default.",
    )
