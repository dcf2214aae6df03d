"""SGLang's scheduler in this process, ours in its place if asked; its model answers at once.

There can be one in a process, because SGLang sets up its process groups once.
"""

from __future__ import annotations

import functools
import inspect
import json
import tempfile
import traceback
from array import array
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest

from blendserve.runtime import cpu_platform

cpu_platform.activate()

import sglang.srt.managers.scheduler as scheduler_module  # noqa: E402
import torch  # noqa: E402
from sglang.srt.managers.io_struct import AbortReq, TokenizedGenerateReqInput  # noqa: E402
from sglang.srt.managers.utils import GenerationBatchResult  # noqa: E402
from sglang.srt.sampling.sampling_params import SamplingParams  # noqa: E402
from sglang.srt.server_args import PortArgs, prepare_server_args  # noqa: E402

from blendserve.planner import StepPace  # noqa: E402
from blendserve.policy import Steps  # noqa: E402
from blendserve.runtime.plan_tag import PlanTag  # noqa: E402

KV_TOKENS, CHUNK = 4_000, 256
EOS, OTHER = 2, 5
FIRST_TOKEN, VOCABULARY = 10, 1000
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 65_536,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": EOS,
    "torch_dtype": "float32",
}


class BareScheduler:
    """One scheduler, driven step by step.

    Whether it is BlendServe's is decided by BLENDSERVE_ENABLED, as in a server.

    Args:
        flags: SGLang's, beside those that a scheduler without a model needs.

    Attributes:
        live: SGLang's scheduler.
        finished: output tokens of every request that has ended, by id; aborted ones included.
    """

    def __init__(self, *flags: str) -> None:
        self.finished: dict[str, int] = {}
        self._length: dict[str, int] = {}
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "config.json").write_text(json.dumps(CONFIG))
            given = "--load-format dummy --skip-tokenizer-init --device cpu --dtype float32"
            given += " --mem-fraction-static 0.1 --disable-overlap-schedule"
            arguments = ["--model-path", folder, *given.split(), *flags]
            self.live = _start(prepare_server_args(arguments))
        live = self.live
        live.tp_worker.forward_batch_generation = self._forward
        live.ipc_channels.send_to_tokenizer.send_output = lambda *args, **kwargs: None
        live.ipc_channels.send_to_detokenizer.send_output = self._collect

    def submit(
        self,
        rid: str,
        prompt: Sequence[int],
        length: int,
        limit: int | None = None,
        tag: PlanTag | None = None,
        extra_key: str | None = None,
    ) -> None:
        """A request arrives that will produce so many tokens, and says that it wants no more than
        `limit`; without one its length is known to all."""
        params = SamplingParams(
            max_new_tokens=limit or length,
            ignore_eos=limit is None,
            temperature=0.0,
            custom_params=tag.to_params() if tag is not None else None,
        )
        params.normalize(None)
        self._length[rid] = length
        self.live.handle_generate_request(
            TokenizedGenerateReqInput(
                rid=rid,
                input_text=None,
                input_ids=array("q", prompt),
                input_embeds=None,
                mm_inputs=None,
                token_type_ids=None,
                sampling_params=params,
                return_logprob=False,
                logprob_start_len=-1,
                top_logprobs_num=0,
                token_ids_logprob=None,
                stream=False,
                extra_key=extra_key,
            )
        )

    def abort(self, rid: str) -> None:
        self.live.abort_request(AbortReq(rid=rid, abort_all=False))

    def step(self) -> Any:
        """One round of SGLang's event loop; returns the batch, None if there was none."""
        live = self.live
        plan = live.get_next_batch_to_run(
            running_batch=live.running_batch, last_batch=live.last_batch
        )
        live.running_batch, batch = plan.running_batch, plan.batch_to_run
        if batch:
            live.process_batch_result(batch, live.run_batch(batch))
        else:
            live.on_idle()  # With SGLang's own check for leaks.
        live.last_batch = batch
        return batch

    def _forward(self, batch: Any, *args: Any, **kwargs: Any) -> Any:
        tokens = [
            EOS if len(req.output_ids) + 1 == self._length.get(req.rid) else OTHER
            for req in batch.reqs
        ]
        return GenerationBatchResult(
            next_token_ids=torch.tensor(tokens, dtype=torch.int64), can_run_cuda_graph=False
        )

    def _collect(self, output: Any, *args: Any, **kwargs: Any) -> None:
        for rid, reason, count in zip(
            output.rids, output.finished_reasons, output.completion_tokens, strict=True
        ):
            if reason is not None:
                self.finished[rid] = count


def pace_steps(
    monkeypatch: pytest.MonkeyPatch, engine: BareScheduler, pace: StepPace | None
) -> None:
    """For one test: mixed steps that are paced so, or filled."""
    live, policy = engine.live, engine.live.blend_policy
    for name in ("_pace", "_pacer", "_gather"):  # To be put back.
        monkeypatch.setattr(policy, name, getattr(policy, name))
    policy.steps_are(Steps.FILLED if pace is None else Steps.MIXED, pace or live.blend_pace)


@functools.cache
def the_scheduler() -> BareScheduler:
    """The one of this process, for all tests; ask for it with BLENDSERVE_ENABLED set."""
    return BareScheduler(
        *("--max-total-tokens", str(KV_TOKENS), "--chunked-prefill-size", str(CHUNK)),
        *("--schedule-policy", "fcfs", "--radix-cache-backend", "blendserve"),
    )


def _start(server_args: Any) -> Any:
    """What SGLang's scheduler process does until its event loop, whatever its release calls it."""
    run = scheduler_module.run_scheduler_process
    started: list[Any] = []
    given = {
        "server_args": server_args,
        "port_args": PortArgs.init_new(server_args),
        "dp_rank": None,
        "pipe_writer": SimpleNamespace(send=lambda info: None),
    }
    arguments = {
        name: given.get(name, 0)
        for name, parameter in inspect.signature(run).parameters.items()
        if parameter.default is inspect.Parameter.empty
    }
    stock = scheduler_module.Scheduler

    def fail(signal: int) -> NoReturn:
        raise RuntimeError(f"SGLang's scheduler did not start: {traceback.format_exc()}")

    # A scheduler that cannot start ends its parent process.
    process = SimpleNamespace(parent=lambda: SimpleNamespace(send_signal=fail))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stock, "run_event_loop", lambda self: started.append(self))
        patch.setattr(scheduler_module, "psutil", SimpleNamespace(Process=lambda: process))
        run(**arguments)
    return started[0]
