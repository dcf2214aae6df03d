"""The batches that are not at their end: which is next, and whose time is up.

Every question costs the same however many there are: it is answered from an index, and about a
bounded number of them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from sqlalchemy import func, select, text, update

from blendserve.batch.database import BLOCK_ROWS, Database
from blendserve.batch.tables import OPEN_STATUSES, BatchRow, BatchStage

# One seek of the index for each tenant, however many batches each has.
_TENANTS_WITH = text(
    "WITH RECURSIVE t(tenant) AS ("
    " SELECT min(tenant) FROM batches WHERE stage = :stage"
    " UNION ALL"
    " SELECT (SELECT min(tenant) FROM batches WHERE stage = :stage AND tenant > t.tenant)"
    " FROM t WHERE t.tenant IS NOT NULL)"
    " SELECT tenant FROM t WHERE tenant IS NOT NULL"
)


class Backlog:
    """Questions about open batches, from any thread. Rows are snapshots."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def next_batch(
        self,
        stage: BatchStage,
        in_turn: Callable[[Sequence[str]], Sequence[str]],
        *,
        without: Collection[str] = (),
        fingerprint: str | None = None,
    ) -> BatchRow | None:
        """The batch that is next in a stage; of each tenant the one whose window closes first.

        `in_turn` sorts the tenants that have any. `without`: ids of a few that are taken. With a
        `fingerprint` only batches of that engine count. The work does not grow with their number.
        """
        query = select(BatchRow).where(BatchRow.stage == stage, BatchRow.id.not_in(without))
        if fingerprint is not None:
            query = query.where(BatchRow.fingerprint == fingerprint)
        order = (BatchRow.fingerprint, BatchRow.expires_at, BatchRow.seq)
        with self._database.reading() as session:
            tenants = session.scalars(_TENANTS_WITH, {"stage": stage}).all()
            for tenant in in_turn(tenants):
                of_tenant = query.where(BatchRow.tenant == tenant).order_by(*order).limit(1)
                if (row := session.scalar(of_tenant)) is not None:
                    return row
        return None

    def unfinished_batches(self, after_seq: int) -> Sequence[BatchRow]:
        """A block of the batches that have been validated and are not at their end, by `seq`."""
        query = select(BatchRow).where(
            BatchRow.status.in_(OPEN_STATUSES),
            BatchRow.total.is_not(None),
            BatchRow.seq > after_seq,
        )
        with self._database.reading() as session:
            return session.scalars(query.order_by(BatchRow.seq).limit(BLOCK_ROWS)).all()

    def adopt(self, fingerprint: str) -> int:
        """Gives this engine the open batches of an earlier release that wait for one of its name.

        Returns:
            How many open batches wait for other engines.
        """
        name = fingerprint.rpartition("@")[0]
        waiting = select(BatchRow.id).where(BatchRow.stage == "run")
        with self._database.reading() as session:
            unbound = waiting.where(BatchRow.fingerprint == f"{name}@").limit(1)
            adopts = bool(name) and session.scalar(unbound) is not None
        if adopts:
            with self._database.writing() as session:
                session.execute(
                    update(BatchRow)
                    .where(BatchRow.stage == "run", BatchRow.fingerprint == f"{name}@")
                    .values(fingerprint=fingerprint)
                )
        others = waiting.where(BatchRow.fingerprint != fingerprint).subquery()
        with self._database.reading() as session:
            return session.scalar(select(func.count()).select_from(others)) or 0

    def expire_overdue(self, now: int) -> Sequence[str]:
        """Sends batches past their completion window to the ending `expired`: a block of them."""
        due = (
            select(BatchRow.seq)
            .where(BatchRow.stage.in_(("validate", "run")), BatchRow.expires_at <= now)
            .limit(BLOCK_ROWS)
        )
        with self._database.reading() as session:
            if session.scalar(due.limit(1)) is None:
                return []
        expire = update(BatchRow).where(BatchRow.seq.in_(due.scalar_subquery()))
        with self._database.writing() as session:
            return session.scalars(
                expire.values(ending="expired").returning(BatchRow.id),
                execution_options={"synchronize_session": False},
            ).all()

    def next_expiry(self) -> int | None:
        """When the first of the batches expires that wait or run, in unix seconds."""
        with self._database.reading() as session:
            firsts = [
                session.scalar(select(func.min(BatchRow.expires_at)).where(BatchRow.stage == stage))
                for stage in ("validate", "run")
            ]
        return min((first for first in firsts if first is not None), default=None)
