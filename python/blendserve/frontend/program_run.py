"""All inputs of one `run_batch`: started in waves, held, run in the server's order.

Programs are really started, each once, and wait at their first requests; so the server knows those
prompts before any of them runs. A wave bounds what is started and held at a time: each such program
has two threads, its own and the one in which SGLang runs what it asks for. The next wave starts
when most of the one before is on its way, and is a further job; jobs blend with each other.
"""

from __future__ import annotations

import json
import multiprocessing
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager
from typing import Any

import sglang.lang.interpreter as interpreter

from blendserve.frontend.held import HeldProgram, Stopped, running_program
from blendserve.frontend.link import Link

# Programs of a wave; the next one starts when so few of those before are held.
WAVE = 1024
_FEW_HELD = 256
# What came of a wave is told to the server when all of it has come, nothing has come for so long,
# or it is so large.
_QUIET_SECONDS = 0.25
_MOST_BYTES = 8 << 20
# Programs that come late, one by one, do not become a job each.
_MOST_LINKS = 16
# Where even that does not help, a program runs without a plan rather than wait.
_MOST_WAIT_SECONDS = 5.0
_CLOSE_SECONDS = 10.0
# So long the engine may take to come back, and so often it is looked for.
RESTART_SECONDS = 300.0
RETRY_SECONDS = 1.0


class ProgramRun:
    """Runs each input once.

    Args:
        program: an `SglFunction`.
        endpoint: an `Endpoint`.
        arguments: of each run.
        sampling: SGLang's default sampling parameters.
        num_threads: programs that may run at once, "auto" as in SGLang.
        progress_bar: show one.
    """

    def __init__(
        self,
        program: Any,
        endpoint: Any,
        arguments: Sequence[dict[str, Any]],
        sampling: Any,
        num_threads: int | str,
        progress_bar: bool,
    ) -> None:
        if num_threads == "auto":
            num_threads = max(96, multiprocessing.cpu_count() * 16)
        self._limit = int(num_threads)
        self._began = time.monotonic()
        self._program = program
        self._endpoint = endpoint
        self._arguments = arguments
        self._sampling = sampling
        self._bar = _bar(len(arguments)) if progress_bar else None
        # Guards all below.
        self._changed = threading.Condition()
        self._programs: dict[int, HeldProgram] = {}
        self._next = 0
        self._taken = 0
        self._most_untaken = len(arguments)
        self._starting = 0
        self._alive = 0
        self._gathered: list[tuple[HeldProgram, dict[str, Any]]] = []
        self._gathered_bytes = 0
        self._gathered_at = 0.0
        self._held: set[HeldProgram] = set()
        self._waiting: deque[tuple[HeldProgram, str | None]] = deque()
        self._running = 0
        self._links: list[Link] = []
        self._lost_at: float | None = None
        self._failure: BaseException | None = None
        self._stopped = False

    def all(self) -> list[Any]:
        """The states, in the order of the inputs. What a program raised is raised once all others
        have ended."""
        with self._feeding():
            ended = [self._take(index) for index in range(len(self._arguments))]
            return [future.result() for future in ended]

    def in_waves(self) -> Iterator[Any]:
        """The states one by one, in the order of the inputs; no more than two waves are started
        beyond what has been taken from here. Raises what a program raised, in its place."""
        self._most_untaken = 2 * WAVE
        with self._feeding():
            for index in range(len(self._arguments)):
                yield self._take(index).result()

    @contextmanager
    def _feeding(self) -> Iterator[None]:
        feeder = threading.Thread(target=self._feed, name="blendserve-feed", daemon=True)
        feeder.start()
        try:
            yield
        finally:
            self._stop()
            feeder.join()

    def _take(self, index: int) -> Future[Any]:
        """A program that has ended. Raises if the server takes none."""
        program = self._started(index)
        wait([program.result])
        with self._changed:
            if self._failure is not None:
                raise self._failure
            del self._programs[index]
            self._taken += 1
            self._changed.notify_all()
        return program.result

    def _started(self, index: int) -> HeldProgram:
        with self._changed:
            self._changed.wait_for(lambda: index in self._programs or self._failure)
            if self._failure is not None:
                raise self._failure
            return self._programs[index]

    def _stop(self) -> None:
        """Start nothing more, end what is held, and wait for what runs, as SGLang does."""
        with self._changed:
            self._stopped = True
            links = list(self._links)
            if self._held:
                for link in links:
                    link.cancel()
            self.end(list(self._held), self._failure or _too_late())
            self._changed.wait_for(lambda: not self._alive)
        # What the server has is gone when this returns, if it answers at all.
        for link in links:
            link.thread.join(_CLOSE_SECONDS)
        if self._bar is not None:
            self._bar.close()

    # -- a thread of its own -----------------------------------------------------------------------

    def _feed(self) -> None:
        """Start waves, and tell the server of them."""
        while True:
            with self._changed:
                self._changed.wait_for(self._something_to_do, timeout=_QUIET_SECONDS / 2)
                if self._stopped:
                    return
                for program in self._wave():
                    self._start(program)
                link = self._link()
            if link is not None:
                link.start()

    def _something_to_do(self) -> bool:
        return self._stopped or self._may_start() or (bool(self._gathered) and not self._starting)

    def _may_start(self) -> bool:
        return (
            self._next < len(self._arguments)
            and self._starting + len(self._held) <= _FEW_HELD
            and self._next - self._taken < self._most_untaken
            and self._failure is None
        )

    def _wave(self) -> list[HeldProgram]:
        if not self._may_start():
            return []
        first = self._next
        self._next = min(first + WAVE, len(self._arguments))
        wave = [HeldProgram(k, self._endpoint, self._hold) for k in range(first, self._next)]
        self._starting += len(wave)
        self._alive += len(wave)
        self._programs.update((program.index, program) for program in wave)
        self._changed.notify_all()
        return wave

    def _start(self, program: HeldProgram) -> None:
        thread = threading.Thread(target=self._run, args=(program,), daemon=True)
        try:
            thread.start()
        except RuntimeError as error:
            # The system gives no more threads.
            self._end(program, error)

    def _link(self) -> Link | None:
        """A job of what has gathered, if it is time."""
        if not self._gathered:
            return None
        self._links = [link for link in self._links if link.thread.is_alive()]
        age = time.monotonic() - self._gathered_at
        complete = not self._starting or self._gathered_bytes >= _MOST_BYTES
        if not complete and age < _QUIET_SECONDS:
            return None
        if len(self._links) >= _MOST_LINKS:
            if age >= _MOST_WAIT_SECONDS:
                late, self._gathered, self._gathered_bytes = self._gathered, [], 0
                for program, _ in late:
                    self._admit(program, None)
            return None
        gathered, self._gathered, self._gathered_bytes = self._gathered, [], 0
        programs, bodies = zip(*gathered, strict=True)
        name = getattr(self._program.func, "__name__", "program")
        link = Link(self._endpoint, self, programs, bodies, name, self._limit, self._seconds_left())
        self._links.append(link)
        return link

    def _seconds_left(self) -> float | None:
        """For the jobs of a run, which are due together."""
        window: float | None = self._endpoint.window_seconds
        return None if window is None else max(window - (time.monotonic() - self._began), 1e-3)

    # -- each program's own thread -----------------------------------------------------------------

    def _run(self, program: HeldProgram) -> None:
        running_program.set(program)
        try:
            state = interpreter.run_program(
                self._program,
                self._endpoint,
                (),
                self._arguments[program.index],
                self._sampling,
                False,
                True,
            )
        except BaseException as error:
            self._end(program, error)
        else:
            self._end(program, None, state)

    def _hold(self, program: HeldProgram, body: dict[str, Any]) -> None:
        """A program has come to its first request."""
        size = len(json.dumps(body))
        with self._changed:
            self._starting -= 1
            if self._stopped or self._failure is not None:
                program.fail(self._failure or _too_late())
                return
            self._held.add(program)
            self._gathered.append((program, body))
            self._gathered_bytes += size
            self._gathered_at = time.monotonic()
            self._changed.notify_all()

    def _end(self, program: HeldProgram, error: BaseException | None, state: Any = None) -> None:
        with self._changed:
            self._alive -= 1
            if not program.held:
                self._starting -= 1
            elif program.running:
                self._running -= 1
                self._open()
            links = list(self._links)
            self._changed.notify_all()
            if self._bar is not None:
                self._bar.update()
        failed = error is not None or state.stream_executor.error_ is not None
        for link in links:
            link.ended(program, failed)
        if error is not None:
            program.result.set_exception(error)
        else:
            program.result.set_result(state)

    # -- the gate: called by links -----------------------------------------------------------------

    def admit(self, program: HeldProgram, ticket: str | None) -> None:
        """The server says that a program may go on; it does as soon as there is room."""
        with self._changed:
            if ticket is not None:
                self._lost_at = None
            self._admit(program, ticket)

    def again(self, held: Sequence[tuple[HeldProgram, dict[str, Any]]]) -> bool:
        """These have lost their server, and become another job. False if it has been away for too
        long. Waits for a moment."""
        time.sleep(RETRY_SECONDS)
        with self._changed:
            now = time.monotonic()
            self._lost_at = self._lost_at or now
            if now - self._lost_at > RESTART_SECONDS:
                return False
            programs = {program for program, _ in held}
            self._waiting = deque(one for one in self._waiting if one[0] not in programs)
            self._gathered += [one for one in held if one[0] in self._held]
            self._gathered_at = now
            self._changed.notify_all()
        return True

    def widen(self, limit: int) -> None:
        """More programs may run at once: those that do may wait for others."""
        with self._changed:
            self._limit = max(self._limit, limit)
            self._open()

    def end(self, programs: Sequence[HeldProgram], error: BaseException) -> None:
        """The next request of these programs raises, whether they are held or run."""
        with self._changed:
            self._held.difference_update(programs)
            for program in programs:
                program.fail(error)
            self._changed.notify_all()

    def refuse(self, error: BaseException) -> None:
        """The server takes no programs: the whole run fails."""
        with self._changed:
            self._failure = error
            self.end(list(self._held), error)

    def _admit(self, program: HeldProgram, ticket: str | None) -> None:
        if program in self._held:
            self._waiting.append((program, ticket))
            self._open()

    def _open(self) -> None:
        while self._waiting and self._running < self._limit:
            program, ticket = self._waiting.popleft()
            if program not in self._held:
                continue  # It has been ended meanwhile.
            self._held.discard(program)
            self._running += 1
            program.running = True
            program.go(ticket)
        self._changed.notify_all()


def _too_late() -> Stopped:
    return Stopped("run_batch ended before this program's turn came.")


def _bar(total: int) -> Any:
    import tqdm  # type: ignore[import-untyped]

    return tqdm.tqdm(total=total)
