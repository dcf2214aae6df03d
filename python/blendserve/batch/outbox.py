"""Which webhooks wait to be sent: a row each, beside the batches, until somebody has been told."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import delete, func, select, update

from blendserve.batch.database import Database
from blendserve.batch.tables import TERMINAL_STATUSES, BatchRow, WebhookRow


@dataclass(frozen=True)
class Notice:
    """One webhook of a batch that has ended.

    ended_at: unix seconds. url: None for the server's own. attempts: that have failed.
    """

    batch_id: str
    status: str
    ended_at: int
    url: str | None
    attempts: int


class Outbox:
    """The webhooks of a batch directory, from any thread."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def next_notice(self, now: int) -> Notice | None:
        """One that is due, of a batch that has ended."""
        ended_at = func.coalesce(
            *(getattr(BatchRow, f"{status}_at") for status in TERMINAL_STATUSES)
        )
        query = (
            select(BatchRow.id, BatchRow.status, ended_at, WebhookRow.url, WebhookRow.attempts)
            .join(WebhookRow, WebhookRow.batch_id == BatchRow.id)
            .where(BatchRow.status.in_(TERMINAL_STATUSES), WebhookRow.due_at <= now)
            .order_by(WebhookRow.due_at)
            .limit(1)
        )
        with self._database.reading() as session:
            found = session.execute(query).first()
        return None if found is None else Notice(*found)

    def done(self, batch_id: str) -> None:
        """It was delivered, or given up."""
        with self._database.writing() as session:
            session.execute(delete(WebhookRow).where(WebhookRow.batch_id == batch_id))

    def again(self, batch_id: str, due_at: int) -> None:
        """It failed; the next try is at `due_at`."""
        values = {"attempts": WebhookRow.attempts + 1, "due_at": due_at}
        with self._database.writing() as session:
            session.execute(
                update(WebhookRow).where(WebhookRow.batch_id == batch_id).values(**values)
            )
