"""One job of ``run-batch``: the batch service in this process, and an engine that works for it."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import secrets
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from blendserve.batch import (
    BatchLimits,
    BatchObject,
    BatchService,
    BatchStore,
    EngineAddress,
    EngineInfo,
    RemoteExecutor,
)
from blendserve.batch.directory import fsync_folder
from blendserve.batch.executor import same_engine
from blendserve.batch.objects import CreateBatch
from blendserve.batch.upload import Upload
from blendserve.cli.carried import Carried
from blendserve.cli.earlier_run import EarlierRun
from blendserve.cli.engine_process import EngineProcess, WatchSettings
from blendserve.cli.figures import FigureKeeper, Figures
from blendserve.cli.front import (
    ENGINE_COMMAND,
    engine_command,
    engine_environment,
    settings_of,
    split_flags,
)
from blendserve.cli.input_check import fault_lines
from blendserve.cli.live_results import LiveResults
from blendserve.cli.parquet_output import is_parquet, write_parquet
from blendserve.cli.status import StatusBoard

_ENDED = frozenset({"completed", "failed", "expired", "cancelled"})
_METADATA_KEY = "input_sha256"
_RETRY_KEY = "retry_failed"
_POLL_SECONDS = 0.25
_MAX_FAILED_STARTS = 3
_COPY_BYTES = 1 << 20


class JobRefused(RuntimeError):
    """The state of an earlier run does not fit, or the job failed; says what to do."""


class Reporter(Protocol):
    """Shows how the job is getting on."""

    def update(
        self, state: str, counts: Mapping[str, int], figures: Figures, note: str | None = None
    ) -> None: ...


class OfflineJob:
    """Resume or begin, run, close: in this order.

    Args:
        state: folder of this job; it may hold the state of an earlier run.
        output, errors: where the results are to appear.
        engine_flags: flags of `blendserve serve`.
        log: receives what the engine prints.
        in_order: sort the results as the input is.
        earlier: results that those of this job are added to.
        carried: columns of the input that results are to have.
    """

    def __init__(
        self,
        state: Path,
        output: Path,
        errors: Path,
        limits: BatchLimits,
        engine_flags: Sequence[str],
        *,
        log: Path,
        in_order: bool = False,
        earlier: EarlierRun | None = None,
        carried: Carried | None = None,
    ) -> None:
        self._in_order = in_order
        self._carried = carried
        self._earlier = earlier
        self._store = BatchStore(state / "batches")
        self._places = {"output": output, "error": errors}
        self._live = LiveResults(output, errors)
        self._executor = RemoteExecutor(on_lost=lambda: self.engine.look_again())
        self._service = BatchService(
            self._store, self._executor, limits, on_saved=self._live.add, in_order=in_order
        )
        options, flags = split_flags(engine_flags)
        settings = settings_of(options)
        self.engine = EngineProcess(
            engine_command(options, flags, settings, ENGINE_COMMAND),
            self._engine_up,
            self._executor.engine_down,
            log=log,
            environment=engine_environment(
                settings.model_copy(update={"batch_dir": self._store.directory.root})
            ),
            watch=WatchSettings(
                hang_seconds=settings.engine_hang_seconds, max_failed_starts=_MAX_FAILED_STARTS
            ),
        )
        self._batch_id = ""
        self._refusal: JobRefused | None = None

    @property
    def live_paths(self) -> list[Path]:
        """Where answers can be read while the job runs."""
        return self._live.paths

    def resume(self, source: Path) -> str | None:
        """The id of the batch that an earlier process has begun over this input, if one has.

        Raises:
            JobRefused: the earlier run had another input, or failed.
        """
        known = self._service.list(after=None, limit=1).data
        if not known:
            return None
        batch = known[0]
        metadata = batch.metadata or {}
        state = self._store.directory.root.parent
        if metadata.get(_METADATA_KEY) != self._identity(source):
            raise JobRefused(
                f"{state} holds the state of a run over another input. Give that input, with the "
                "same columns and template, another -o, or --overwrite to begin anew."
            )
        if (_RETRY_KEY in metadata) != (self._earlier is not None):
            flag = "with" if _RETRY_KEY in metadata else "without"
            raise JobRefused(
                f"{state} holds the state of a run that has not ended; the same command "
                f"{flag} --retry-failed goes on with it."
            )
        _raise_if_failed(batch)
        self._batch_id = batch.id
        row = self._store.find_batch(batch.id)
        if row is not None and row.total is not None:
            self._live.restore(self._store.directory.journal(batch.id), row.total)
        return batch.id

    def begin(self, source: Path, whole: Path, endpoint: str) -> str:
        """Make a batch of the lines in `source`, those of `whole` that are to run; its id.

        Copies the input: it may be changed or removed while the job runs.
        """
        digest = hashlib.sha256()
        size = 0
        with self._store.directory.draft() as draft:
            with source.open("rb") as stream:
                while block := stream.read(_COPY_BYTES):
                    digest.update(block)
                    size += len(block)
                    draft.file.write(block)
            upload = Upload({"purpose": "batch"}, "input.jsonl", size, digest.hexdigest())
            file = self._service.add_upload(upload, draft)
        metadata = {_METADATA_KEY: self._identity(whole)}
        if self._earlier is not None:
            metadata[_RETRY_KEY] = "yes"
        request = CreateBatch(
            input_file_id=file.id,
            endpoint=endpoint,
            completion_window="365d",
            metadata=metadata,
        )
        self._batch_id = self._service.create(request).id
        return self._batch_id

    async def run(
        self,
        batch_id: str,
        reporter: Reporter,
        *,
        total: int = 0,
        on_placed: Callable[[BatchObject, int], None] = lambda batch, answers: None,
    ) -> BatchObject:
        """Run what is left, put the results in place, and return the batch as it has ended.

        The engine is stopped after that: nobody has to wait seconds for it to see the answers.

        Args:
            total: lines of the batch, to tell of before it has been checked.
            on_placed: called with the batch and the number of answers once they are in place.

        Raises:
            JobRefused, EngineFailed: it cannot go on; nothing that was finished is lost.
        """
        board = StatusBoard(self._service, self._executor, self.engine.view, lambda _: "")
        keeper = FigureKeeper()
        await self._service.start()
        engine = asyncio.create_task(self.engine.run())
        try:
            while True:
                batch = self._service.retrieve(batch_id)
                progress = self._service.live_progress(batch_id)
                figures = keeper.update(await board.counters(), batch_id)
                counts = {**batch.request_counts.model_dump(), "retried": progress.retried}
                counts["total"] = counts["total"] or total
                state = batch.status
                if self.engine.view.state != "up" and state not in _ENDED:
                    state_said = f"engine {self.engine.view.state}"
                else:
                    state_said = str(state)
                reporter.update(state_said, counts, figures, progress.note)
                if batch.status in _ENDED:
                    _raise_if_failed(batch)
                    on_placed(batch, await asyncio.to_thread(self.place, batch))
                    return batch
                if engine.done():
                    engine.result()
                if self._refusal is not None:
                    raise self._refusal
                await asyncio.sleep(_POLL_SECONDS)
        finally:
            await self._service.stop()
            engine.cancel()
            await asyncio.wait([engine])
            await board.close()

    def place(self, batch: BatchObject) -> int:
        """Put the result files where they were asked for, each whole and durable; the number of
        answers in the output. May be repeated."""
        fresh = {"output": batch.output_file_id, "error": batch.error_file_id}
        paths = {kind: id and self._store.content_of(id) for kind, id in fresh.items()}
        answers = batch.request_counts.completed
        with contextlib.ExitStack() as drafts:
            merged = drafts.enter_context(self._store.directory.draft())
            if self._earlier is not None:
                output = paths["output"] or None
                answers = self._earlier.merge(output, merged.file, in_order=self._in_order)
                merged.settle()
                paths["output"] = merged.path if answers else None
            for kind, path in paths.items():
                target = self._places[kind]
                if path:
                    _place(self._as_asked(path, target, drafts), target)
                else:
                    target.unlink(missing_ok=True)
                # Before the state goes: a power cut must not take the name and leave the removal.
                fsync_folder(target.parent)
        self._live.remove()
        return answers

    def _as_asked(self, results: Path, target: Path, drafts: contextlib.ExitStack) -> Path:
        """A result file with its columns, as Parquet if the target's name says so."""
        columns: Sequence[str] = ()
        if self._carried is not None:
            columns = self._carried.columns
            joined = drafts.enter_context(self._store.directory.draft())
            self._carried.join(results, joined.file)
            joined.settle()
            results = joined.path
        if is_parquet(target):
            table = drafts.enter_context(self._store.directory.draft())
            write_parquet(results, table.file, columns)
            table.settle()
            results = table.path
        return results

    def _identity(self, source: Path) -> str:
        """Of the input, with what is carried of it."""
        digest = _digest(source)
        if self._carried is None:
            return digest
        return hashlib.sha256(f"{digest}{self._carried.digest}".encode()).hexdigest()

    def close(self) -> None:
        self._live.close()
        self._store.close()

    def _engine_up(self, address: EngineAddress, info: EngineInfo) -> None:
        row = self._store.find_batch(self._batch_id)
        begun = row.fingerprint if row is not None else None
        if begun is not None and not same_engine(begun, info.fingerprint):
            self._refusal = JobRefused(
                f"this job was begun with the engine {begun}, and these flags start "
                f"{info.fingerprint}; their answers must not stand in one file. Give the flags of "
                "the first run, another -o, or --overwrite to begin anew."
            )
            return
        self._executor.engine_up(address, info)
        self._service.engine_recovered()


def _digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _raise_if_failed(batch: BatchObject) -> None:
    if batch.status == "completed" or batch.status not in _ENDED:
        return
    faults = batch.errors.data if batch.errors is not None else []
    said = "\n".join([f"the job has {batch.status}:", *fault_lines(faults)])
    raise JobRefused(f"{said}\nBegin anew with --overwrite once that is put right.")


def _place(source: Path, target: Path) -> None:
    draft = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    try:
        # What was asked for has the mode that the user's files have; the state is private.
        draft.touch()
        mode = draft.stat().st_mode
        draft.unlink()
        try:
            os.link(source, draft)
        except OSError:
            # Another file system, or one without hard links.
            shutil.copyfile(source, draft)
            with draft.open("rb") as written:
                os.fsync(written.fileno())
        draft.chmod(mode)
        os.replace(draft, target)
    finally:
        draft.unlink(missing_ok=True)
