"""One client for every server that speaks OpenAI's HTTP: asks, waits, tries again, pays, remembers.

Requests run on an event loop in a thread of their own, so `submit` returns at once and a trainer decodes while a judge
answers. What went wrong is sorted into three: passing faults (429, 5xx, time-outs, cut connections, replies that are
not what was asked for) are tried again with back-off; faults of one request (a prompt too long for the judge, a content
filter) make that label absent; lasting faults (a wrong key, an unknown model, a judge that is down, a spent budget) stop
the run with every label so far kept.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
import os
import re
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from dualign.annotate import batch, dialect, serve
from dualign.annotate.budget import Hold, Ledger, Spent
from dualign.annotate.cache import Cache, Row, default_path, key_of
from dualign.annotate.endpoints import Endpoint
from dualign.annotate.faults import AttemptError, MalformedError, NoAnswerError, of_exception, of_payload, shown_url
from dualign.annotate.reply import CUT_THINKING, was_cut
from dualign.annotate.request import Pace, Payload, Request, backoff, parsed, usage
from dualign.common.errors import StopRun, UserError
from dualign.common.types import Label

POOL = 8  # requests at once that share a connection pool
LAST_GRACE = 10.0  # seconds that `close` waits for replies in flight
PATIENCE = 900.0  # seconds that one request waits because a server said "Retry-After"
Waiting = list[tuple[Future[Label], Callable[[Payload], Label]]]
SCOUT = 30.0  # seconds that others wait for the first request to a server that is not known
GIVEN_UP_IN_A_ROW = 8  # requests that failed for good with no answer between them: the judge is not working


class Client:
    """`submit(request, read)` -> Future[Label], where `read` turns a payload into a Label, raising MalformedError for a
    payload that is no answer. The future raises UserError or StopRun for what ends the run; one such ends all."""

    def __init__(self, settings: Endpoint, *, ledger: Path | None = None) -> None:
        self._batches = batch.current()
        if self._batches and settings.serve:
            raise UserError("--batch: a model that is served here has no batch API; ask it without --batch")
        settings, self._server = serve.join(settings, ledger and ledger.parent)
        if not re.match(r"https?://", settings.base_url):
            raise UserError(f"base_url: {shown_url(settings.base_url)!r} is not a URL such as http://localhost:8000/v1")
        self.settings = settings
        self._key = ("" if settings.serve else os.environ.get(settings.api_key_env, "").strip()) or "none"
        if not (self._key.isascii() and self._key.isprintable()):
            raise UserError(
                f"{settings.api_key_env}: this key cannot be sent: it holds something but plain letters and signs"
            )
        self._ledger = Ledger(self._batches.account(ledger) if self._batches else ledger, settings)
        self._cache = Cache(settings.cache or default_path())
        self._dialect, self._scouted = dialect.of(settings.base_url, settings.model), False
        self._requests, self._tokens = Pace(settings.requests_per_minute), Pace(settings.tokens_per_minute)
        self._waiting: dict[str, Waiting] = {}  # by content: what is being asked is not asked again
        self._stopped: StopRun | UserError | None = None
        self._answers = 0  # replies of any use so far
        self._remembered = 0  # labels that the cache had
        self._given_up = 0  # requests in a row that failed for good
        self._paused_until = 0.0
        self._holds = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="dualign-judge", daemon=True)
        self._thread.start()
        self._on_loop(self._start()).result()

    def submit(self, request: Request, read: Callable[[Payload], Label]) -> Future[Label]:
        if self._batches is not None:
            return self._batches.submit(self, request, read)
        answer: Future[Label] = Future()
        self._loop.call_soon_threadsafe(self._begin, request, read, answer)
        return answer

    @property
    def answered(self) -> bool:
        """Whether there ever was a reply of any use, from the server or the cache."""
        return self._answers + self._remembered > 0

    def spent(self) -> Spent:
        return self._ledger.spent()

    def close(self) -> None:
        if self._loop.is_closed():
            return
        self._on_loop(self._stop()).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._cache.close()
        self._ledger.close()
        serve.leave(self._server)

    def _on_loop(self, coroutine: Coroutine[Any, Any, Any]) -> Future[Any]:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    async def _start(self) -> None:
        from openai import AsyncOpenAI

        # A pool looks through its connections at every request: several small ones cost less than a large one.
        pools = math.ceil(self.settings.concurrency / POOL)
        url, _, query = self.settings.base_url.partition("?")
        more = dict(parse_qsl(query))
        headers = {"api-key": self._key} if "api-version" in more else {}  # Azure's way
        clients = [
            AsyncOpenAI(base_url=url, api_key=self._key, max_retries=0, timeout=self.settings.timeout,
                        default_query=more, default_headers=headers) for _ in range(pools)
        ]  # fmt: skip
        self._openai, self._turns = clients, itertools.cycle(clients)
        self._slots = asyncio.Semaphore(self.settings.concurrency)
        self._settled, self._ended, self._heard = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def _stop(self) -> None:
        """Nothing new is sent; what is in flight is paid for, so it may still arrive and be kept."""
        self._end(StopRun("the judge's client was closed"))
        others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        if others:
            await asyncio.wait(others, timeout=(grace := min(LAST_GRACE, self.settings.timeout)))
            if self._holds:
                self._dialect.say(
                    f"has not answered {self._holds} requests within {grace:g} s: they are given up, may be billed all the "
                    "same, and are asked again by a resume"
                )
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        for client in self._openai:
            await client.close()

    def _begin(self, request: Request, read: Callable[[Payload], Label], answer: Future[Label]) -> None:
        """One task per content, however many ask for it."""
        content = request.content(self.settings.model)
        waiting = self._waiting.setdefault(content, [])
        waiting.append((answer, read))
        if len(waiting) == 1:
            task = self._loop.create_task(self._label(content, request, read))
            task.add_done_callback(lambda task: self._finish(task, self._waiting.pop(content)))

    def _finish(self, task: asyncio.Task[tuple[Label, Payload | None]], waiting: Waiting) -> None:
        """Everybody reads the reply for themselves: equal requests may be of rubrics that read it otherwise."""
        error = StopRun("the judge's client was closed") if task.cancelled() else task.exception()
        for answer, read in waiting:
            if not answer.set_running_or_notify_cancel():
                continue
            if error:
                answer.set_exception(error)
            else:
                label, payload = task.result()
                answer.set_result(label if payload is None else read_kept(payload, read))

    async def _label(
        self, content: str, request: Request, read: Callable[[Payload], Label]
    ) -> tuple[Label, Payload | None]:
        """The label, and the reply that it was read from, where there is one."""
        key = key_of(content)
        kept = self._cache.get(key)
        if kept is not None and (label := read_kept(kept, read)).value is not None:
            self._cache.count_hit(key)
            self._remembered += 1
            return label, kept
        tries, turns, waited, answers, plain = 0, 0, 0.0, self._answers, False
        await self._behind_the_first(request)
        while True:
            asked = request.roomy() if self._dialect.thinks and not plain else request
            try:
                async with self._slots:
                    payload, label, tokens = await self._ask(asked, read)
            except LearnedError:
                continue
            except AttemptError as fault:
                if asked != request and not plain and fault.too_long:  # its context has no such room
                    plain = True
                    continue
                tries += fault.wait is None
                turns += 1
                dead = self._server is not None and self._server.dead
                if not fault.passing or tries > self.settings.retries or waited > PATIENCE or dead:
                    return self._give_up(fault, tries, answers), None
                if fault.wait is None:
                    await self._sleep(backoff(tries))
                else:  # asked to come back later; a server that always says "at once" is not believed for long
                    later = max(fault.wait, backoff(min(turns, 5)))
                    waited += later
                    await self._sleep(later)
                continue
            self._heard.set()
            if label.reason == CUT_THINKING and was_cut(payload) and asked == request and request.room and not plain:
                self._dialect.thinks = True
                self._dialect.say(f"thinks before it answers: its replies may have {request.room:,} tokens now")
                continue
            self._answers, self._given_up = self._answers + 1, 0
            if label.value is not None:
                row = Row(key, self.settings.model, request.rubric, content, payload)
                self._cache.put(row, tokens, self._ledger.price(*tokens), replace=kept is not None)
            return label, payload

    async def _behind_the_first(self, request: Request) -> None:
        """To a server that is not known, one request goes ahead of the others: what it refuses is learned once."""
        if not request.wants or self._dialect.known:
            return
        if not self._scouted:
            self._scouted = True
            return
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._heard.wait(), SCOUT)

    async def _ask(self, request: Request, read: Callable[[Payload], Label]) -> tuple[Payload, Label, tuple[int, int]]:
        """One attempt, paid for: the payload, what was read from it, its prompt and completion tokens."""
        prompt, completion = request.bounds()
        await self._requests.take()
        await self._tokens.take(prompt + completion)
        await self._pause()
        hold = await self._hold(prompt, completion)
        billed = (prompt, completion)  # until the server says otherwise, the most that it can be
        spelled = self._dialect.spelled(request.wants)
        try:
            async with asyncio.timeout(self.settings.timeout):
                body = {"model": self.settings.model, **spelled.onto(request.body)}
                payload = parsed(await next(self._turns).post(request.path, body=body, cast_to=str))
            self._dialect.known = True
            billed = (usage(payload) if isinstance(payload, dict) else None) or billed
            if fault := of_payload(payload, self._key, self.settings):
                raise fault
            return payload, _read(payload, read), billed
        except UserError as error:
            raise self._end(error) from None
        except Exception as error:
            fault = of_exception(error, self._key, self.settings)
            if fault is None:
                raise
            if fault.turned_away:
                billed = (0, 0)
            if (said := fault.refusal) and self._dialect.learn(request.wants, spelled, said.words, said.param):
                raise LearnedError from None
            if fault.wait:
                self._paused_until = max(self._paused_until, self._loop.time() + fault.wait)
            raise fault from None  # the cause may hold the request, and with it the key
        finally:
            self._release(hold, billed)
            self._tokens.give_back(prompt + completion - sum(billed))

    async def _pause(self) -> None:
        """Until the time that a server asked everybody to wait for; raises when the run has ended."""
        await self._sleep(0)
        while (wait := self._paused_until - self._loop.time()) > 0:
            await self._sleep(wait)

    async def _sleep(self, seconds: float) -> None:
        if seconds > 0 and not self._stopped:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._ended.wait(), seconds)
        if self._stopped:
            raise self._stopped

    async def _hold(self, prompt: int, completion: int) -> Hold:
        """Waits for what is in flight to settle before it finds a ceiling reached."""
        while (hold := self._ledger.hold(prompt, completion)) is None:
            if self._holds == 0:
                raise self._end(StopRun(f"{self._ledger.reached()}. Raise it and resume: every label so far is kept"))
            self._settled.clear()
            await self._settled.wait()
            if self._stopped:
                raise self._stopped
        self._holds += 1
        return hold

    def _release(self, hold: Hold, billed: tuple[int, int]) -> None:
        self._holds -= 1
        self._ledger.settle(hold, *billed)
        self._settled.set()

    def _give_up(self, fault: AttemptError, tries: int, answers_before: int) -> Label:
        """The label is absent; or, where it is not this request's doing, the run stops."""
        self._heard.set()
        if fault.lasting:
            started = self._answers > 0
            raise self._end(StopRun(f"{fault}; what was labelled is kept") if started else UserError(str(fault)))
        if not fault.passing:
            if fault.suspect and self._answers == 0:  # no request has ever been accepted: it is the settings
                raise self._end(UserError(str(fault)))
            return Label.absent(str(fault))
        self._given_up += 1
        death = self._server and self._server.death()
        silent = self._answers == answers_before
        if death or (silent and (fault.down or self._given_up >= GIVEN_UP_IN_A_ROW)):
            where = f"{self.settings.model} at {shown_url(self.settings.base_url)}"
            message = f"the judge {where} does not work: {fault} ({tries} attempts, no answer in between)"
            advice = f"{death}\nResume" if death else "Resume when it is back"
            raise self._end(StopRun(f"{message}. {advice}: every label so far is kept"))
        return Label.absent(f"{fault} ({tries} attempts)" if tries else str(fault))

    def _end(self, error: StopRun | UserError) -> StopRun | UserError:
        self._stopped = self._stopped or error
        self._settled.set()
        self._ended.set()
        self._heard.set()
        return self._stopped


class LearnedError(Exception):
    """The server refused how a request was put, and it is known now how it wants it: to be sent again at once."""


def _read(payload: Payload, read: Callable[[Payload], Label]) -> Label:
    """The label of a payload: absent for a reply that holds no answer, however often it is asked for."""
    try:
        return read(payload)
    except NoAnswerError as nothing:
        return Label.absent(nothing.reason, note=nothing.words)


def read_kept(kept: Payload, read: Callable[[Payload], Label]) -> Label:
    """The label of a reply in the cache; absent where it can no longer be read, and is asked for again."""
    try:
        return _read(kept, read)
    except MalformedError as error:
        return Label.absent(str(error))
