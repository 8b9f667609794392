"""What is said to a batch API (OpenAI's: files, /v1/batches), and what its files hold."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Coroutine, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from dualign.annotate.batch_state import Sent
from dualign.annotate.cache import canonical
from dualign.annotate.faults import AttemptError, of_answer, of_payload

if TYPE_CHECKING:
    from openai.types import Batch

    from dualign.annotate.client import Client

X = TypeVar("X")
UPLOAD = 600.0  # seconds for a file, either way
ENDED = ("completed", "failed", "expired", "cancelled")
OF_LINE = {  # what a line says that was not answered
    "batch_expired": "the batch expired before this was asked",
    "batch_cancelled": "the batch was cancelled before this was asked",
}


def wait(client: Client, ask: Callable[..., Coroutine[Any, Any, X]], *what: Any) -> X:
    """The answer, over the client's own connections."""
    found: X = client._on_loop(ask(client, *what)).result()
    return found


async def upload(client: Client, sent: Sent, lines: Sequence[str]) -> str:
    content = "".join(f"{line}\n" for line in lines).encode()
    file = (f"{sent.name}.jsonl", content, "application/jsonl")
    return str((await client._openai[0].files.create(file=file, purpose="batch", timeout=UPLOAD)).id)


async def make(client: Client, sent: Sent) -> str:
    made = await client._openai[0].batches.create(
        input_file_id=str(sent.file_id), endpoint="/v1/chat/completions", completion_window="24h",
        metadata={"dualign": sent.name},
    )  # fmt: skip
    return str(made.id)


async def look(client: Client, batch_id: str) -> Batch:
    return await client._openai[0].batches.retrieve(batch_id)


async def find_batch(client: Client, sent: Sent) -> str | None:
    """The batch of this name, among those made since it was planned."""
    async for batch in client._openai[0].batches.list(limit=100):  # newest first
        if (batch.metadata or {}).get("dualign") == sent.name:
            return str(batch.id)
        if batch.created_at < sent.planned - 3600:
            break
    return None


async def find_file(client: Client, sent: Sent) -> str | None:
    async for file in client._openai[0].files.list(purpose="batch", order="desc", limit=1000):
        if file.filename == f"{sent.name}.jsonl":
            return str(file.id)
        if file.created_at < sent.planned - 3600:
            break
    return None


async def download(client: Client, file_id: str) -> str:
    return str((await client._openai[0].files.content(file_id, timeout=UPLOAD)).text)


def outcomes(text: str) -> dict[str, dict[str, Any]]:
    """What became of each request of an output or error file, by its key: {"status", "body"} as if it had been asked
    alone, or {"error": {...}} where it was not asked."""
    found = {}
    for row in text.split("\n"):
        with contextlib.suppress(ValueError):
            line = json.loads(row)
            if isinstance(line, dict) and isinstance(line.get("custom_id"), str):
                found[line["custom_id"]] = _outcome(line)
    return found


def _outcome(line: dict[str, Any]) -> dict[str, Any]:
    response, error = line.get("response"), line.get("error")
    if isinstance(response, dict) and isinstance(response.get("status_code"), int):
        return {"status": response["status_code"], "body": response.get("body")}
    error = error if isinstance(error, dict) else {}
    known = OF_LINE.get(str(error.get("code")))
    return {"error": known or str(error.get("message") or error.get("code") or "a line without a response")}


def fault_of(client: Client, outcome: dict[str, Any]) -> AttemptError | None:
    """What is wrong with a reply, or with a request that was turned away, as if it had been asked alone."""
    if "status" not in outcome:
        return None
    status, body = outcome["status"], outcome["body"]
    if status == 200:
        return of_payload(body, client._key, client.settings)
    error = body["error"] if isinstance(body, dict) and isinstance(body.get("error"), dict) else body
    said = str(error.get("message") or canonical(error)) if isinstance(error, dict) else str(error)
    return of_answer(status, error, said, client._key, client.settings)


def progress(batch: Batch) -> str:
    counts = batch.request_counts
    return f"{batch.status}, {counts.completed + counts.failed:,} of {counts.total:,} done" if counts else batch.status
