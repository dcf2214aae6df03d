"""What a batch goes through: it is validated, run and published, each by one class.

A stage reads what to do from the batch's row and from its journal, never from memory, so it does
after a crash exactly what it does otherwise.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import orjson

from blendserve.batch.executor import Executor, LineError, same_engine
from blendserve.batch.job import BatchRun, JournalUnwritable
from blendserve.batch.journal import Journal, Record, Tally, read_records
from blendserve.batch.lines import FileLineSource
from blendserve.batch.objects import BatchFault
from blendserve.batch.progress import Progress
from blendserve.batch.publication import JournalIncomplete, Results, write_results
from blendserve.batch.refusals import RefusalJournal
from blendserve.batch.reuse import reused_records
from blendserve.batch.surroundings import Surroundings, progress_of_tally
from blendserve.batch.tables import BatchRow
from blendserve.batch.turns import Turns
from blendserve.batch.validation import ValidationStopped, Verdict, validate_file

logger = logging.getLogger(__name__)

_UNFINISHED = {
    "cancelled": LineError("batch_cancelled", "The batch was cancelled before this request ran."),
    "expired": LineError("batch_expired", "The completion window closed before this request ran."),
    "failed": LineError("batch_failed", "The batch failed before this request ran."),
}


class Validation:
    """Checks the input file, and binds the batch to the engine of the day."""

    def __init__(self, around: Surroundings) -> None:
        self._around = around

    async def carry_out(self, row: BatchRow) -> None:
        """Raises EngineUnavailable as long as no engine is known to check against."""
        around = self._around
        fingerprint = around.executor.fingerprint
        # Where lines may differ, each is asked for.
        differ = around.limits.mixed_endpoints
        if not differ and row.endpoint not in around.executor.endpoints:
            await self._fail(row, [_not_served(row, around.executor)])
            return
        try:
            verdict = await around.offload(self._check, row)
        except ValidationStopped:
            return
        except FileNotFoundError:
            await self._fail(row, [_input_missing(row)])
            return
        if verdict.faults:
            await self._fail(row, verdict.faults)
            return
        if row.reuse_results:
            await around.offload(self._reuse, row, fingerprint)
        around.live[row.id] = Progress(total=verdict.total, failed=verdict.refused)
        await around.offload(
            lambda: around.store.advance(
                row.id,
                ["validating"],
                status="in_progress",
                in_progress_at=around.now(),
                total=verdict.total,
                model=verdict.model,
                fingerprint=fingerprint,
            )
        )
        if around.on_saved is not None and verdict.refused:
            await around.offload(self._show_refused, row, verdict.total)

    def _check(self, row: BatchRow) -> Verdict:
        """Reads the file; what it refuses is in the journal, unless the file fails as a whole."""
        around = self._around
        path = around.store.content_of(row.input_file_id)
        refusals = RefusalJournal(row.id, around.store.directory.journal(row.id))
        try:
            verdict = validate_file(
                path,
                row.endpoint,
                around.executor,
                around.limits,
                lambda: around.is_stopped(row.id),
                refusals.add,
            )
        finally:
            refusals.close()
        if verdict.faults:
            refusals.discard()
        return verdict

    def _show_refused(self, row: BatchRow, total: int) -> None:
        assert self._around.on_saved is not None
        journal = self._around.store.directory.journal(row.id)
        for record in read_records(journal, total):
            self._around.on_saved(row.id, [record])

    def _reuse(self, row: BatchRow, fingerprint: str) -> None:
        around = self._around
        journal = Journal(around.store.directory.journal(row.id))
        count = 0
        try:
            for group in reused_records(
                around.store.content_of,
                row,
                around.store.answered_batches(row, fingerprint),
                around.limits.max_line_bytes,
            ):
                journal.append(group)
                count += len(group)
        finally:
            journal.close()
        logger.info("%s: %d answers of earlier batches are used again", row.id, count)

    async def _fail(self, row: BatchRow, faults: Sequence[BatchFault]) -> None:
        around = self._around
        await around.offload(
            lambda: around.store.advance(
                row.id,
                ["validating"],
                status="failed",
                ending="failed",
                failed_at=around.now(),
                errors_json=_faults_json(faults),
            )
        )


class Running:
    """Gives the engine what the journals do not have yet, of several batches at once."""

    def __init__(self, around: Surroundings) -> None:
        self._around = around
        self._runs: dict[str, BatchRun] = {}
        self._turns = Turns()

    def request_stop(self, should_stop: Callable[[str], bool]) -> None:
        """Lets go of the running batches of whose ids `should_stop` says so. Loop thread only."""
        for batch_id, run in self._runs.items():
            if should_stop(batch_id):
                run.request_stop()

    def pause(self, row: BatchRow, note: str) -> None:
        """Shows that a batch waits, and for what."""
        live = self._around.live
        live[row.id] = replace(
            live.get(row.id, Progress(total=row.total or 0)), phase="paused", note=note
        )

    async def carry_out(self, row: BatchRow) -> None:
        """Raises EngineUnavailable and JournalUnwritable: to be tried again; results are kept."""
        around = self._around
        path = around.store.directory.journal(row.id)
        # Opening comes first: it cuts off a torn record, after which the rest may be read.
        journal = await around.offload(Journal, path)
        around.journals[row.id] = journal
        try:
            tally = await around.offload(around.read_journal, row)
            if tally.remaining == 0:
                await around.end(row, "completed", status="finalizing", finalizing_at=around.now())
                return
            if row.fingerprint != around.executor.fingerprint:
                # It was changed just now. The batch waits for its own.
                return
            try:
                source = await around.offload(
                    FileLineSource,
                    await around.offload(around.store.content_of, row.input_file_id),
                    around.limits.max_line_bytes,
                )
            except FileNotFoundError:
                await around.end(row, "failed", errors_json=_faults_json([_input_missing(row)]))
                return
            try:
                await self._drive(row, source, journal, tally)
            finally:
                source.close()
        finally:
            del around.journals[row.id]
            journal.close()

    async def _drive(
        self, row: BatchRow, source: FileLineSource, journal: Journal, tally: Tally
    ) -> None:
        around = self._around
        start = progress_of_tally(tally, recovered=tally.completed + tally.failed)
        start = replace(start, started_at=float(around.now()), phase="running")

        def report(current: Tally, retried: int) -> None:
            around.live[row.id] = replace(
                start,
                completed=current.completed,
                failed=current.failed,
                usage=current.usage,
                suspects=len(current.suspects),
                retried=retried,
            )

        def saved(records: Sequence[Record]) -> None:
            if around.on_saved is not None:
                try:
                    around.on_saved(row.id, records)
                except OSError as error:
                    raise JournalUnwritable(error.strerror or str(error)) from error

        report(tally, 0)
        run = BatchRun(
            row.id,
            source,
            journal,
            tally,
            around.executor,
            around.offload,
            report,
            saved,
            deadline=float(row.expires_at),
            turns=self._turns,
        )
        self._runs[row.id] = run
        try:
            if not around.is_stopped(row.id) and await run.run():
                await around.end(row, "completed", status="finalizing", finalizing_at=around.now())
            else:
                around.live[row.id] = replace(around.live[row.id], phase="waiting")
        finally:
            del self._runs[row.id]


class Publishing:
    """Turns a journal into the batch's files, and ends it."""

    def __init__(self, around: Surroundings) -> None:
        self._around = around

    async def carry_out(self, row: BatchRow) -> None:
        around = self._around
        try:
            await around.offload(self._publish, row, row.ending or "completed")
        except JournalIncomplete:
            # The journal lost records since: the batch is not at its end after all.
            values = {"status": "in_progress", "ending": None, "finalizing_at": None}
            await around.offload(lambda: around.store.conclude(row.id, [], **values))
            return
        around.live.pop(row.id, None)
        around.store.directory.journal(row.id).unlink(missing_ok=True)

    async def give_up(self, row: BatchRow, error: Exception) -> None:
        """Ends a batch that fails for a cause that another try does not mend."""
        around, store = self._around, self._around.store
        fault = BatchFault(
            code="internal_error",
            message=(
                f"The server failed with {type(error).__name__} while the batch was {row.status}, "
                "several times. Its log tells more. Finished requests of the batch are kept."
            ),
        )
        values: dict[str, Any] = {"errors_json": _faults_json([fault])}
        if row.ending is None and row.total is not None:
            await around.end(row, "failed", **values)
            return
        # Nothing can be published, so what is done stays where whoever looks into it finds it.
        values |= {"status": "failed", "ending": "failed", "failed_at": around.now()}
        values["failed"] = row.total or 0
        journal = store.directory.journal(row.id)
        if await around.offload(journal.exists):
            await around.offload(store.directory.keep, journal)
        await around.offload(lambda: store.conclude(row.id, [], **values))
        around.live.pop(row.id, None)
        journal.unlink(missing_ok=True)

    def _publish(self, row: BatchRow, ending: str) -> None:
        around, store = self._around, self._around.store
        if row.total is None:
            store.conclude(row.id, [], status=ending, **{f"{ending}_at": around.now()})
            return
        with (
            around.ids_of_input(row) as custom_id_of,
            store.directory.draft() as outputs,
            store.directory.draft() as errors,
        ):
            results = write_results(
                row,
                store.content_of(row.input_file_id),
                store.directory.journal(row.id),
                outputs,
                errors,
                max_line_bytes=around.limits.max_line_bytes,
                unfinished=_UNFINISHED.get(ending),
                now=around.now,
                in_order=around.in_order,
                custom_id_of=custom_id_of,
            )
            files = [file for file in (results.output, results.error) if file is not None]
            store.conclude(
                row.id,
                files,
                status=ending,
                **_final_values(results),
                **{f"{ending}_at": around.now()},
            )


def _final_values(results: Results) -> dict[str, Any]:
    tally, usage = results.tally, results.tally.usage
    return {
        "completed": tally.completed,
        "failed": tally.total - tally.completed,
        "input_tokens": usage.input_tokens,
        "cached_tokens": usage.cached_tokens,
        "output_tokens": usage.output_tokens,
        "reasoning_tokens": usage.reasoning_tokens,
        "output_file_id": results.output and results.output[0].id,
        "error_file_id": results.error and results.error[0].id,
    }


def other_engine_note(row: BatchRow, fingerprint: str) -> str | None:
    """Why this engine does not go on with a batch that another one has begun; None if it does."""
    if row.fingerprint is None or same_engine(row.fingerprint, fingerprint):
        return None
    return (
        f"begun with the engine {row.fingerprint}, and this server runs {fingerprint}: their "
        "answers must not stand in one file. It goes on when its engine is back; or cancel it, "
        "which keeps what is finished, and create it again from the same input file."
    )


def _not_served(row: BatchRow, executor: Executor) -> BatchFault:
    return BatchFault(
        code="invalid_endpoint",
        message=(
            f"The engine does not serve {row.endpoint}; it has "
            f"{', '.join(sorted(executor.endpoints))}."
        ),
        param="endpoint",
    )


def _input_missing(row: BatchRow) -> BatchFault:
    return BatchFault(
        code="input_file_missing",
        message=f"The bytes of {row.input_file_id} are gone from the batch directory.",
    )


def _faults_json(faults: Sequence[BatchFault]) -> str:
    return orjson.dumps([fault.model_dump() for fault in faults]).decode()
