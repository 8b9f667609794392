"""Labels from a batch API: at about half the price, within a day (OpenAI's /v1/batches, and those that speak it).

Within `in_batches` a Client sends nothing by itself. The first label that is waited for sends all that was asked for
until then: files of requests, a batch for each. What a batch answers is kept in the cache of labels under the keys of
single requests, so that nobody buys it again; what it does not answer is absent, with its reason.

A small SQLite file (`batch_state.py`) says which requests are in which batch, before the batch is made, and what became of
them. Run again after a Ctrl-C or a kill, a command finds its batches there, and at the server by their names: nothing
is sent twice.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
import uuid
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import Future
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from dualign.annotate import batch_api as api
from dualign.annotate.batch_labels import (
    Wanted,
    as_asked,
    billed,
    body_of,
    label_of,
    lacks_room,
    put_otherwise,
    remembered,
    text_of,
)
from dualign.annotate.batch_state import Asked, Sent, State
from dualign.annotate.cache import key_of
from dualign.annotate.faults import AttemptError, of_exception
from dualign.common.errors import StopRun, UserError
from dualign.common.types import Label

if TYPE_CHECKING:
    from dualign.annotate.client import Client
    from dualign.annotate.request import Payload, Request

X = TypeVar("X")
MOST_ROWS, MOST_BYTES = 50_000, 190_000_000  # of a file; the API takes 50,000 and 200 MB
FIRST_LOOK, LONGEST_WAIT = 2.0, 60.0  # seconds between two looks at a batch
PATIENCE = 3600.0  # seconds without any answer from the server
FULL = "token_limit_exceeded"  # more tokens are enqueued than the account may have at once

_mode: ContextVar[Batches | None] = ContextVar("batches", default=None)


@contextlib.contextmanager
def in_batches(place: Path | None = None, wanted: bool = True) -> Iterator[None]:
    """Clients that are made within ask by batches, if that is `wanted`. `place`: the file of their state; by default
    batch.sqlite beside the account of the first client."""
    if not wanted:
        yield
        return
    batches = Batches(place)
    token = _mode.set(batches)
    try:
        yield
    except BaseException:
        batches.close()
        raise
    else:
        batches.finish()
    finally:
        _mode.reset(token)


def current() -> Batches | None:
    return _mode.get()


def ahead(ask: Callable[[], object]) -> None:
    """Notes what `ask` asks for: it goes out together with what is waited for first, instead of one batch after another.
    Its labels are not bought yet, and absent. Outside of `in_batches` nothing is done."""
    if (batches := current()) is not None:
        batches.note(ask)


class Awaited(Future[Label]):
    """A label that is bought when somebody waits for it."""

    def __init__(self, batches: Batches) -> None:
        super().__init__()
        self._batches = batches

    def result(self, timeout: float | None = None) -> Label:
        if not self.done():
            self._batches.buy()
        return super().result(timeout)


class Batches:
    """Those of one command."""

    def __init__(self, place: Path | None) -> None:
        self._place = place
        self._state: State | None = None
        self._wanted: dict[str, Wanted] = {}  # by key
        self._mutex, self._buying = threading.Lock(), threading.Lock()
        self._most = MOST_ROWS
        self._untouched = True  # the state holds nothing that a later command needs
        self._ahead = False
        self._full = False  # no room for another batch at the server until one has ended

    def account(self, account: Path | None) -> Path:
        """Opens the state, at its place or beside a client's account; the account itself, which is in the state's file
        where the client has none."""
        if self._state is None:
            if self._place is None and account is None:
                raise UserError("in_batches(place): name the file of their state")
            path = self._place or Path(account or "").with_name("batch.sqlite")
            self._untouched = not path.exists()
            self._state = State(path)
        return account or self._state.path

    @property
    def state(self) -> State:
        assert self._state is not None
        return self._state

    def submit(self, client: Client, request: Request, read: Callable[[Payload], Label]) -> Future[Label]:
        if request.path != "chat/completions":
            raise UserError("--batch: a batch API takes chat requests; a served reward model is asked without --batch")
        content = request.content(client.settings.model)
        key, answer = key_of(content), Awaited(self)
        if (label := remembered(client, key, read)) is not None:
            answer.set_result(label)
            return answer
        with self._mutex:
            wanted = self._wanted.setdefault(key, Wanted(client, request, content))
            wanted.askers.append((answer, read))
        if self._ahead:
            noted: Future[Label] = Future()
            noted.set_result(Label.absent("asked for, and not bought yet"))
            return noted
        return answer

    def note(self, ask: Callable[[], object]) -> None:
        self._ahead = True
        try:
            ask()
        finally:
            self._ahead = False

    def buy(self) -> None:
        """Until nothing is wanted any more. Raises StopRun where a ceiling or the server ends it, UserError for what
        the user must fix; what was sent stays in the state."""
        with self._buying:  # whoever comes second finds his labels bought
            self._answer()
            while self._wanted:
                self._send()
                self._await_one()
                self._answer()

    # --- sending ---

    def _send(self) -> None:
        """What is in no batch yet, as far as the ceilings leave room beside what is in flight. Of each judge apart: a
        file holds requests to one model."""
        for client in dict.fromkeys(wanted.client for wanted in self._wanted.values()):
            for sent in self.state.unknown(client.settings.model):
                self._create(client, sent, fresh=False)
            held = self.state.keys()
            waiting = [k for k, w in self._wanted.items() if w.client is client and k not in held]
            while waiting and not self._full:
                part = self._plan(client, waiting)
                if part is None:
                    break
                self._create(client, part, fresh=True)
                waiting = waiting[part.rows :]

    def _plan(self, client: Client, keys: Sequence[str]) -> Sent | None:
        """As many of `keys` as one file takes and the ceilings allow, set aside and written down. None: no room."""
        asked: list[Asked] = []
        size = 0
        for key in keys:
            request = self._wanted[key].request
            body = text_of(body_of(client, request))
            size += len(body.encode()) + 200
            if len(asked) == self._most or (asked and size > MOST_BYTES):
                break
            prompt, completion = as_asked(client, request).bounds()
            hold = client._ledger.hold(prompt, completion)
            if hold is None:
                break
            asked.append(Asked(key, body, prompt, completion, hold))
        if asked:
            self._untouched = False
            return self.state.plan(f"dualign-{uuid.uuid4().hex}", client.settings.model, asked)
        if not self._awaited():
            raise StopRun(f"{client._ledger.reached()}. Raise it and run again: every label so far is kept")
        return None

    def _create(self, client: Client, sent: Sent, fresh: bool) -> None:
        """Uploads a batch's file and makes the batch. Unless it is `fresh`, somebody may have done so before."""
        while True:
            batch_id = None if fresh else self._call(client, api.find_batch, sent)
            if batch_id is None and sent.file_id is None:
                file_id = None if fresh else self._call(client, api.find_file, sent)
                file_id = file_id or self._call(client, api.upload, sent, self.state.lines(sent.name))
                sent = self.state.uploaded(sent, file_id)
            try:
                batch_id = batch_id or api.wait(client, api.make, sent)
            except Exception as error:
                fault = self._fault(client, error)
                _say(f"{fault}; trying again")
                time.sleep(fault.wait or FIRST_LOOK)
                fresh = fault.turned_away  # otherwise it may have been made all the same
                continue
            self.state.created(sent, batch_id)
            _say(f"{batch_id}: {sent.rows:,} requests to {sent.model}; Ctrl-C is safe, the same command goes on")
            return

    # --- waiting ---

    def _await_one(self) -> None:
        """Until one of the batches has ended whose requests are wanted; with those that have ended beside it."""
        pause, told = FIRST_LOOK, dict[str, str]()
        while True:
            ended = 0
            for sent, client in self._awaited():
                batch = self._call(client, api.look, sent.batch_id)
                if (said := api.progress(batch)) != told.get(sent.name):
                    told[sent.name] = said
                    _say(f"{batch.id}: {said}")
                if batch.status in api.ENDED:
                    self._ended(client, sent, batch)
                    ended += 1
            if ended:
                self._full = False
                return
            time.sleep(pause)
            pause = min(LONGEST_WAIT, pause * 1.5)

    def _awaited(self) -> list[tuple[Sent, Client]]:
        """Batches on their way that hold what is wanted now, each with who wants it."""
        found = []
        for sent in self.state.running():
            keys = self.state.keys(sent.name)
            found += [(sent, wanted.client) for key, wanted in self._wanted.items() if key in keys][:1]
        return found

    def _ended(self, client: Client, sent: Sent, batch: Any) -> None:
        if batch.status == "failed":
            self._failed(client, sent, batch)
            return
        found: dict[str, dict[str, Any]] = {}
        for file_id in (batch.output_file_id, batch.error_file_id):
            if file_id:
                found |= api.outcomes(self._call(client, api.download, file_id))
        asked = self.state.asked(sent.name)
        became = {each.key: found.get(each.key) or {"missing": batch.status} for each in asked}
        spent = [billed(became[each.key], each.bounds) for each in asked]
        hold = self.state.ended(sent, became)
        client._ledger.settle(hold, sum(prompt for prompt, _ in spent), sum(completion for _, completion in spent))

    def _failed(self, client: Client, sent: Sent, batch: Any) -> None:
        """Not begun: nothing was asked and nothing is billed."""
        errors = list((batch.errors and batch.errors.data) or [])
        others = len(self._awaited()) > 1
        client._ledger.undo(self.state.forget(sent), sent.rows)
        if any(error.code == FULL for error in errors) and (others or sent.rows > 1):
            self._full = others
            self._most = self._most if others else max(1, sent.rows // 2)
            _say(f"{batch.id}: the account may not have so many tokens in batches at once: sending fewer")
            return
        words = "; ".join(
            f"{f'line {error.line}: ' if error.line else ''}{error.message or error.code}" for error in errors[:3]
        )
        more = f" (and {len(errors) - 3} more)" if len(errors) > 3 else ""
        raise UserError(f"{client.settings.model}: the server took batch {batch.id} for invalid: {words}{more}")

    # --- labels ---

    def _answer(self) -> None:
        """Labels of what has come back; what the server wants put otherwise is wanted on."""
        outcomes = self.state.outcomes(self._wanted)
        rejected: list[AttemptError] = []
        for key, (body, outcome) in outcomes.items():
            wanted = self._wanted[key]
            fault = api.fault_of(wanted.client, outcome)
            if fault is not None and put_otherwise(wanted, body, fault):
                self.state.drop(key)
                continue
            rejected += [fault] if fault is not None and (fault.suspect or fault.lasting) else []
            labels = [label_of(wanted, key, outcome, fault, read) for _, read in wanted.askers]
            if any(lacks_room(wanted, body, outcome.get("body"), label) for label in labels):
                self.state.drop(key)
                continue
            for (answer, _), label in zip(wanted.askers, labels, strict=True):
                if not answer.done():
                    answer.set_result(label)
            del self._wanted[key]
        if rejected and len(rejected) == len(outcomes):  # of every request alike: it is the settings
            raise UserError(str(rejected[0]))

    # --- the server ---

    def _call(self, client: Client, ask: Callable[..., Coroutine[Any, Any, X]], *what: Any) -> X:
        """What it answers; a passing fault is tried again for an hour."""
        since, pause = time.monotonic(), FIRST_LOOK
        while True:
            try:
                return api.wait(client, ask, *what)
            except Exception as error:
                fault = self._fault(client, error)
                if time.monotonic() - since > PATIENCE:
                    raise StopRun(f"{fault}, for an hour. Batches go on: run the command again") from None
                _say(f"{fault}; trying again")
            time.sleep(fault.wait or pause)
            pause = min(LONGEST_WAIT, pause * 1.5)

    def _fault(self, client: Client, error: Exception) -> AttemptError:
        """A passing one. Raises UserError for others."""
        fault = of_exception(error, client._key, client.settings)
        if fault is None:
            raise error
        if not fault.passing:
            advice = f"what is on its way stands in {self.state.path}; without that file the command begins anew"
            raise UserError(f"--batch: {fault} ({advice})") from None
        return fault

    def finish(self) -> None:
        """The command has its result: what ended is forgotten. What is still on its way of earlier commands stays."""
        if self._state is not None:
            left = self._state.forget_ended()
            for sent in left:
                _say(f"note: batch {sent.batch_id} of an earlier command is not waited for ({self._state.path})")
            self._state.close(remove=not left)

    def close(self) -> None:
        """The command ends without a result. Its account stays, and so do batches that are on their way."""
        if self._state is None:
            return
        running = self._state.forget_ended()
        self._state.close(remove=self._untouched)
        if running:
            _say(f"{len(running)} batches go on at the server: run the same command again to wait for them")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
