"""Lines and prompts of a job on the engines of a cluster: what in one engine is done in process."""

from __future__ import annotations

import asyncio
import json
import logging
import uuid
from collections.abc import Sequence
from typing import Any

from blendserve.batch.executor import BatchLine, LineError, LineResult, Lines
from blendserve.runtime.cluster import Cluster
from blendserve.runtime.line_client import MemberLost, answer_body, request_body, unwritable
from blendserve.runtime.line_flight import answered
from blendserve.runtime.link_protocol import frame
from blendserve.runtime.member import LinkLost, Member
from blendserve.runtime.plan_tag import PlanTag
from blendserve.runtime.prompt_data import Prompt

logger = logging.getLogger(__name__)

_ABORT_INTERVAL_SECONDS = 0.2
# What an engine reads at a time: so many lines, and about so many bytes.
_LINES_AT_ONCE = 64
_BYTES_AT_ONCE = 8 << 20
# A block of prompts that so many engines could not read runs without a plan.
_MAX_READINGS = 2


class ClusterLines:
    """Sends the lines of one job (a `LineSender`).

    Args:
        cluster: where to.
        model: served name, for lines that name none.
        salt: of the lines' tenant.
    """

    def __init__(self, cluster: Cluster, model: str, salt: str) -> None:
        self._cluster = cluster
        self._model = model
        self._salt = salt
        self._in_flight: dict[str, tuple[asyncio.Task[LineResult], Member]] = {}

    def start(
        self, line: BatchLine, tag: PlanTag | None, sequences: int, replica: int | None = None
    ) -> asyncio.Task[LineResult]:
        rid = uuid.uuid4().hex
        found = self._cluster.find(replica) if replica is not None else self._least_busy()
        if found is None:
            lost = MemberLost("its engine has left", died=False)
            return asyncio.create_task(_raised(lost), name=rid)
        member, rank = found
        dp_rank = rank if replica is not None and member.description.dp_size > 1 else None
        body = request_body(line, rid, self._model, tag, sequences, dp_rank)
        try:
            content = json.dumps(
                body, ensure_ascii=False, allow_nan=False, separators=(",", ":")
            ).encode()
        except (ValueError, TypeError, RecursionError) as error:
            # Nested too deeply, or a number or a text that JSON does not have.
            refused = LineResult(line.index, rid, 400, unwritable(error))
            return asyncio.create_task(answered(refused), name=rid)
        task = asyncio.create_task(self._call(line, rid, member, content), name=rid)
        self._in_flight[rid] = task, member
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[LineResult]) -> None:
        del self._in_flight[task.get_name()]
        if not task.cancelled():
            # Looked at, as a job that has ended looks at no line any more.
            task.exception()

    def tokens_so_far(self, task: asyncio.Task[LineResult]) -> int:
        found = self._in_flight.get(task.get_name())
        return found[1].tokens_so_far(task.get_name()) if found is not None else 0

    async def abort_all(self) -> None:
        while self._in_flight:
            rids: dict[Member, list[str]] = {}
            for rid, (_, member) in self._in_flight.items():
                rids.setdefault(member, []).append(rid)
            await asyncio.gather(*(member.abort(named) for member, named in rids.items()))
            tasks = [task for task, _ in self._in_flight.values()]
            if tasks:
                await asyncio.wait(tasks, timeout=_ABORT_INTERVAL_SECONDS)

    def _least_busy(self) -> tuple[Member, int] | None:
        members = self._cluster.members
        return (min(members, key=lambda member: member.in_flight), 0) if members else None

    async def _call(self, line: BatchLine, rid: str, member: Member, content: bytes) -> LineResult:
        answer = await member.send(rid, line.url, self._salt, content)
        if answer.status == 0:
            said = answer.content.decode("utf-8", "replace")
            message = f"The engine gave no answer to this request. {said}"
            return LineResult(line.index, rid, error=LineError("internal_error", message))
        return LineResult(line.index, rid, answer.status, answer_body(line.url, answer.content))


class ClusterReader:
    """Has prompts read by the engines (a `BlockReader`).

    Args:
        cluster: whose engines read.
        loop: the event loop that the cluster lives in.
    """

    def __init__(self, cluster: Cluster, loop: asyncio.AbstractEventLoop) -> None:
        self._cluster = cluster
        self._loop = loop
        self._reading: dict[Member, int] = {}

    @property
    def lines_at_once(self) -> int:
        # Two blocks for each engine: one that it reads, and one on its way.
        return _LINES_AT_ONCE * 2 * max(len(self._cluster.members), 1)

    def read_block(self, lines: Lines, block: Sequence[int]) -> list[Prompt | None]:
        frames = [_frame_of(lines, index) for index in block]
        parts = _parts([place for place, body in enumerate(frames) if body is not None], frames)
        return asyncio.run_coroutine_threadsafe(self._read(frames, parts), self._loop).result()

    async def _read(
        self, frames: list[bytes | None], parts: list[list[int]]
    ) -> list[Prompt | None]:
        prompts: list[Prompt | None] = [None] * len(frames)

        async def read(part: list[int]) -> None:
            found = await self._read_part([frames[place] or b"" for place in part])
            for place, prompt in zip(part, found, strict=True):
                prompts[place] = prompt

        await asyncio.gather(*map(read, parts))
        return prompts

    async def _read_part(self, bodies: list[bytes]) -> list[Prompt | None]:
        tries = 0
        while tries < _MAX_READINGS and not self._cluster.closed:
            members = self._cluster.members
            if not members:
                await self._cluster.change()
                continue
            member = min(members, key=lambda each: self._reading.get(each, 0))
            self._reading[member] = self._reading.get(member, 0) + 1
            try:
                return await member.read(bodies)
            except LinkLost as error:
                logger.error("engine %s cannot read prompts: %s", member.address.url, error)
                tries += 1
            finally:
                self._reading[member] -= 1
                if not self._reading[member]:
                    del self._reading[member]
        return [None] * len(bodies)


def _frame_of(lines: Lines, index: int) -> bytes | None:
    """None for what cannot be read: whatever is wrong with it shows when it is sent."""
    try:
        line = lines.read(index)
        body = json.dumps(line.body, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        return frame({"url": line.url}, body.encode())
    except Exception:
        return None


def _parts(places: list[int], frames: Sequence[bytes | None]) -> list[list[int]]:
    parts: list[list[int]] = []
    size = _BYTES_AT_ONCE
    for place in places:
        length = len(frames[place] or b"")
        if size + length > _BYTES_AT_ONCE or len(parts[-1]) == _LINES_AT_ONCE:
            parts.append([])
            size = 0
        parts[-1].append(place)
        size += length
    return parts


async def _raised(error: Exception) -> Any:
    raise error
