"""The engines of a coordinator: which there are, who joins, who is dropped, who may come back."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from blendserve.batch import EngineAddress
from blendserve.runtime.credits import Credits
from blendserve.runtime.feedback import SchedulerReport
from blendserve.runtime.link_protocol import EngineDescription
from blendserve.runtime.member import LinkLost, Member, Patience, linked

logger = logging.getLogger(__name__)

_FIRST_PAUSE_SECONDS = 0.5
_MAX_PAUSE_SECONDS = 15.0
# Of two coordinators with the same engines, neither shall take them from the other all the time.
_TAKEN_PAUSE_SECONDS = 60.0


@dataclass
class EngineView:
    """An engine as the operator sees it.

    Attributes:
        url: where it listens.
        state: "connecting", "up", "lost", "refused" (it is not like the others) or "leaving".
        reason: why it is lost or refused.
        since: unix seconds, of the state.
        fingerprint: what it said last, None before.
        in_flight, answered: lines that it has, and that it has answered since it was known.
        losses: times that it was dropped.
        schedulers: its latest reports.
    """

    url: str
    state: str = "connecting"
    reason: str | None = None
    since: float = field(default_factory=time.time)
    fingerprint: str | None = None
    in_flight: int = 0
    answered: int = 0
    losses: int = 0
    schedulers: list[dict[str, Any]] = field(default_factory=list)

    def show(self, state: str, reason: str | None = None) -> None:
        if (state, reason) != (self.state, self.reason):
            self.state, self.reason, self.since = state, reason, time.time()


@dataclass
class _Place:
    """An address that the cluster was told of."""

    view: EngineView
    member: Member | None = None
    replicas: list[int] = field(default_factory=list)
    keeper: asyncio.Task[None] | None = None
    answered_before: int = 0


class Cluster:
    """Keeps a link to each engine, and tells the credits of it. Use it in one event loop.

    Args:
        credits: without replicas; each scheduler of each engine that is up becomes one.
        patience: when an engine is given up.
        wake: called when there may be something to send.
    """

    def __init__(
        self, credits: Credits, patience: Patience, wake: Callable[[], None] = lambda: None
    ) -> None:
        self.wake = wake
        self.fingerprint: str | None = None
        """Of the first engine that joined; every other one must have the same."""
        self.description: EngineDescription | None = None
        """Of the first engine that joined."""
        self._credits = credits
        self._patience = patience
        self._name = secrets.token_hex(4)
        self._places: dict[EngineAddress, _Place] = {}
        self._by_replica: dict[int, tuple[Member, int]] = {}
        self._changed = asyncio.Event()
        self.closed = False

    # -- which engines there are -----------------------------------------------------------------

    def add(self, address: EngineAddress) -> None:
        """Link to an engine as soon as it answers, and again whenever it comes back."""
        if address not in self._places:
            place = self._places[address] = _Place(EngineView(address.url))
            place.keeper = asyncio.create_task(self._keep(address, place))

    async def remove(self, address: EngineAddress, reason: str) -> None:
        """Forget an engine; the lines that it has run elsewhere. Nothing if it is not known."""
        place = self._places.pop(address, None)
        if place is None or place.keeper is None:
            return
        place.view.show("leaving", reason)
        place.keeper.cancel()
        await asyncio.wait([place.keeper])

    async def close(self) -> None:
        self.closed = True
        self._tell()
        for address in list(self._places):
            await self.remove(address, "the coordinator stops")

    @property
    def members(self) -> list[Member]:
        """The engines that are up."""
        return [place.member for place in self._places.values() if place.member is not None]

    def has(self, address: EngineAddress) -> bool:
        """Whether this engine is up."""
        place = self._places.get(address)
        return place is not None and place.member is not None

    def find(self, replica: int) -> tuple[Member, int] | None:
        """The engine of a replica, and which of its schedulers that is; None if it has left."""
        return self._by_replica.get(replica)

    async def change(self) -> None:
        """Wait until an engine joins or leaves, or all is closed."""
        changed = self._changed
        await changed.wait()

    def views(self) -> list[EngineView]:
        for place in self._places.values():
            member, view = place.member, place.view
            view.in_flight = member.in_flight if member is not None else 0
            view.answered = place.answered_before + (member.answered if member is not None else 0)
            if member is not None:
                view.schedulers = [asdict(report) for report in member.reports.values()]
        return [place.view for place in self._places.values()]

    # -- one engine ------------------------------------------------------------------------------

    async def _keep(self, address: EngineAddress, place: _Place) -> None:
        pause = _FIRST_PAUSE_SECONDS
        while True:
            began = time.monotonic()
            try:
                async with linked(address, self._name, self._patience) as (member, events):
                    place.view.fingerprint = member.description.fingerprint
                    if (refusal := self._refusal(member.description)) is not None:
                        if place.view.state != "refused":
                            logger.error("engine %s is refused: %s", address.url, refusal)
                        place.view.show("refused", refusal)
                    else:
                        await member.check_health()
                        await self._serve(place, member, events)
            except LinkLost as error:
                if place.view.state != "lost":
                    logger.info("engine %s cannot be reached: %s", address.url, error)
                place.view.show("lost", str(error))
                if error.taken:
                    pause = _TAKEN_PAUSE_SECONDS
            except Exception:
                logger.exception("engine %s: its link failed", address.url)
                place.view.show("lost", "its link failed; the coordinator's log tells more")
            if time.monotonic() - began > _MAX_PAUSE_SECONDS:
                pause = min(pause, _FIRST_PAUSE_SECONDS)
            await asyncio.sleep(pause)
            pause = min(2 * pause, max(_MAX_PAUSE_SECONDS, pause))

    async def _serve(self, place: _Place, member: Member, events: Any) -> None:
        self._join(place, member)
        try:
            await member.serve(events)
        except LinkLost as error:
            place.view.losses += 1
            logger.error(
                "engine %s is dropped with %d lines: %s",
                *(place.view.url, member.in_flight, error),
            )
            await self._leave(place, member, str(error), died=not error.taken)
            raise
        except BaseException as error:
            died = isinstance(error, Exception)
            await self._leave(place, member, place.view.reason or "its link failed", died=died)
            raise

    def _refusal(self, description: EngineDescription) -> str | None:
        if self.fingerprint is None or description.fingerprint == self.fingerprint:
            return None
        return (
            f"it runs {description.fingerprint}, and the others {self.fingerprint}: their answers "
            "must not stand in one file. Start it with the same model and settings."
        )

    def _join(self, place: _Place, member: Member) -> None:
        if self.description is None:
            self.description, self.fingerprint = member.description, member.description.fingerprint
        place.member = member
        place.replicas = [self._credits.join() for _ in range(member.description.dp_size)]
        for rank, replica in enumerate(place.replicas):
            self._by_replica[replica] = member, rank

        def on_report(_: Member, report: SchedulerReport) -> None:
            if report.dp_rank < len(place.replicas):
                counted = replace(report, dp_rank=place.replicas[report.dp_rank])
                self._credits.on_report(counted)
                self.wake()

        member.on_report = on_report
        place.view.show("up")
        logger.info("engine %s is up: %s", place.view.url, member.description.fingerprint)
        self._tell()

    async def _leave(self, place: _Place, member: Member, reason: str, *, died: bool) -> None:
        place.member = None
        place.answered_before += member.answered
        for replica in place.replicas:
            self._credits.leave(replica)
            del self._by_replica[replica]
        place.replicas = []
        self._tell()
        await member.lose(f"engine {place.view.url} is gone: {reason}", died=died)

    def _tell(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
        self.wake()
