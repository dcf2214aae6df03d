"""``blendserve engine``: one of the engines of a coordinator, on this machine.

It is the server of ``blendserve serve`` without a front: every flag of SGLang's works as there. It
has no files and no batches; whoever has the key may have any line run and read any prompt.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from blendserve.cli.cluster_flags import read_key
from blendserve.cli.server_process import TOKEN_VARIABLE
from blendserve.config import ConfigError, load_settings

_HELP = """\
usage: blendserve engine --cluster-key-file FILE --port PORT [--host HOST] [flags of `serve`]

Starts one engine for `blendserve serve --engine-urls`. It listens on 127.0.0.1 unless --host says
otherwise, and asks every request for the key in FILE, which goes over the wire in the clear: on a
network that others can listen to, put TLS in front of it (SGLang's --ssl-keyfile, --ssl-certfile)
or a tunnel.
"""


def main(argv: Sequence[str]) -> int:
    """Serve until stopped. 2 for a setting that cannot be used."""
    if "-h" in argv or "--help" in argv:
        print(_HELP, end="")
        return 0
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--cluster-key-file", default=None)
    parser.add_argument("--port", type=int, default=None)
    options, rest = parser.parse_known_args(list(argv))
    try:
        given = options.cluster_key_file
        settings = load_settings() if given is None else load_settings(cluster_key_file=given)
        key = read_key(settings.cluster_key_file)
        if options.port is None:
            raise ConfigError("give --port: the one that --engine-urls of the coordinator names")
    except ConfigError as error:
        print(f"blendserve engine: {error}", file=sys.stderr)
        return 2
    os.environ[TOKEN_VARIABLE] = key
    os.environ["BLENDSERVE_BEHIND_COORDINATOR"] = "True"
    from blendserve.cli.serve import run_engine

    return run_engine([*rest, "--port", str(options.port)])
