"""A BlendServe server as a backend of SGLang's frontend language."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from typing import Any

import sglang.lang.interpreter as interpreter
from sglang.lang.backend.runtime_endpoint import RuntimeEndpoint

from blendserve.frontend.held import running_program
from blendserve.frontend.program_run import RESTART_SECONDS, RETRY_SECONDS, ProgramRun

# Of ``custom_params``; as the server names it (runtime/tickets.py, which needs more than a client).
TICKET_PARAM = "blend_ticket"


class Endpoint(RuntimeEndpoint):  # type: ignore[misc]
    """SGLang's `RuntimeEndpoint`, whose `run_batch` is planned by the server as one job.

    Args:
        url: of `blendserve serve`.
        api_key: if the server asks for one.
        verify: file of certificates to trust.
        chat_template_name: SGLang's; None: found by the model's name.
        window_seconds: in which a `run_batch` should end. It goes before other jobs if it may not,
            as a batch does at the end of its completion window. None: no haste.

    Raises:
        RuntimeError, URLError: no server answers there.
    """

    def __init__(
        self,
        url: str,
        api_key: str | None = None,
        verify: str | None = None,
        chat_template_name: str | None = None,
        *,
        window_seconds: float | None = None,
    ) -> None:
        if window_seconds is not None and not 0 < window_seconds < math.inf:
            raise ValueError(f"window_seconds is {window_seconds}; give a number above 0, or None.")
        super().__init__(url.rstrip("/"), api_key, verify, chat_template_name)
        self.window_seconds = window_seconds
        _schedule_batches()

    def _add_images(self, s: Any, data: dict[str, Any]) -> None:
        """The last thing before any request of a program is sent: here it waits for its turn."""
        super()._add_images(s, data)
        program = running_program.get()
        if program is None or program.endpoint is not self:
            return
        ticket = program.go_ahead(data)
        if ticket is not None:
            params = {**data["sampling_params"], "custom_params": {TICKET_PARAM: ticket}}
            data["sampling_params"] = params

    def generate(self, s: Any, sampling_params: Any) -> tuple[Any, Any]:
        """SGLang's, but half an answer is an error: the server aborts what a cancelled job has."""
        # A copy each time: SGLang's changes what it is given.
        again = super().generate
        text, meta = _patiently(lambda: again(s, copy.deepcopy(sampling_params)))
        for one in meta if isinstance(meta, list) else [meta]:
            reason = one.get("finish_reason") or {}
            if isinstance(reason, dict) and reason.get("type") == "abort":
                said = reason.get("message") or "the job was cancelled or lost its connection"
                raise RuntimeError(f"The server aborted this request: {said}.")
        return text, meta

    def select(self, *args: Any, **kwargs: Any) -> Any:
        again = super().select
        return _patiently(lambda: again(*args, **kwargs))

    def commit_lazy_operations(self, s: Any) -> None:
        again = super().commit_lazy_operations
        _patiently(lambda: again(s))


def _patiently(ask: Callable[[], Any]) -> Any:
    """What is asked, again for as long as the engine is being restarted: batches wait, too."""
    deadline = time.monotonic() + RESTART_SECONDS
    while True:
        try:
            return ask()
        except RuntimeError as error:
            said = error.args[0] if error.args else None
            fault = said.get("error") if isinstance(said, dict) else None
            code = fault.get("code") if isinstance(fault, dict) else None
            if code != "engine_unavailable" or time.monotonic() >= deadline:
                raise
        time.sleep(RETRY_SECONDS)


def _schedule_batches() -> None:
    """`SglFunction.run_batch` comes here for backends of ours; for others nothing changes."""
    original = interpreter.run_program_batch
    if not getattr(original, "blendserve", False):
        interpreter.run_program_batch = _batches_of_ours(original)


def _batches_of_ours(original: Callable[..., Any]) -> Callable[..., Any]:
    def run_program_batch(
        program: Any,
        backend: Any,
        batch_arguments: Any,
        default_sampling_para: Any,
        num_threads: int | str,
        progress_bar: bool,
        generator_style: bool = False,
    ) -> Any:
        endpoint = getattr(backend, "endpoint", backend)
        # One thread asks for one program after the other, in the order given.
        if not isinstance(endpoint, Endpoint) or num_threads == 1 or len(batch_arguments) == 1:
            return original(
                program,
                backend,
                batch_arguments,
                default_sampling_para,
                num_threads,
                progress_bar,
                generator_style=generator_style,
            )
        run = ProgramRun(
            program, endpoint, batch_arguments, default_sampling_para, num_threads, progress_bar
        )
        return run.in_waves() if generator_style else run.all()

    run_program_batch.blendserve = True  # type: ignore[attr-defined]
    return run_program_batch
