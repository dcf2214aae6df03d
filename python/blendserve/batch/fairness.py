"""Whose batch is next, and which one makes room: tenants share alike, whatever each asks for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from blendserve.batch.tables import BatchRow

# A running batch makes room for one that has so many times less left of its completion window.
_CLEARLY_SOONER = 2


def in_turn(tenants: Sequence[str], last: str | None, running: Mapping[str, int]) -> list[str]:
    """Tenants by how few batches of theirs run; of equals, those after the `last` one first."""
    return sorted(
        tenants,
        key=lambda tenant: (running.get(tenant, 0), last is not None and tenant <= last, tenant),
    )


def makes_room(waiting: BatchRow, running: Sequence[BatchRow], now: int) -> BatchRow | None:
    """Which running batch stops for one that waits, if any; all places are taken.

    The most patient one of the tenant that has most, if the waiting one's has fewer even with it;
    else the most patient one of its own tenant, if the waiting one has clearly less time.
    """
    counts = Counter(row.tenant for row in running)
    busiest = max(counts, key=lambda tenant: (counts[tenant], tenant))
    if counts[waiting.tenant] + 1 < counts[busiest]:
        return _most_patient(running, busiest)
    if not counts[waiting.tenant]:
        return None
    patient = _most_patient(running, waiting.tenant)
    left, most = waiting.expires_at - now, patient.expires_at - now
    return patient if _CLEARLY_SOONER * left <= most else None


def _most_patient(rows: Sequence[BatchRow], tenant: str) -> BatchRow:
    own = (row for row in rows if row.tenant == tenant)
    return max(own, key=lambda row: (row.expires_at, row.seq))
