"""Labels of what a batch brings back, by the client that would have asked: its cache, its reading, its faults."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dualign.annotate.cache import Row
from dualign.annotate.faults import AttemptError
from dualign.annotate.reply import CUT_THINKING, was_cut
from dualign.annotate.request import Payload, Request, usage
from dualign.common.types import Label

if TYPE_CHECKING:
    from dualign.annotate.client import Client


@dataclass
class Wanted:
    """What is asked for and not answered yet, by whoever asks."""

    client: Client
    request: Request
    content: str
    askers: list[tuple[Future[Label], Callable[[Payload], Label]]] = field(default_factory=list)


def as_asked(client: Client, request: Request) -> Request:
    """With the room that a judge needs which thinks."""
    return request.roomy() if client._dialect.thinks else request


def body_of(client: Client, request: Request) -> dict[str, Any]:
    """As the server takes it, as far as that is known now."""
    spelled = client._dialect.spelled(as_asked(client, request).wants)
    return {"model": client.settings.model, **spelled.onto(request.body)}


def text_of(body: Mapping[str, Any]) -> str:
    """As it is sent. The order of a schema's keys is part of what it asks for."""
    return json.dumps(body, ensure_ascii=False, separators=(",", ":"))


def put_otherwise(wanted: Wanted, sent: str, fault: AttemptError) -> bool:
    """Whether a request that was `sent` so, and turned away, is to be put otherwise: its words may teach how."""
    client, said = wanted.client, fault.refusal
    if said is None:
        return False
    wants = as_asked(client, wanted.request).wants
    if text_of(body_of(client, wanted.request)) != sent:
        return True  # learned from another line
    return client._dialect.learn(wants, client._dialect.spelled(wants), said.words, said.param)


def lacks_room(wanted: Wanted, sent: str, reply: Any, label: Label) -> bool:
    """Whether the judge was cut off as it thought, and is to be asked again with more room, as all are from then on."""
    client = wanted.client
    if label.reason != CUT_THINKING or not was_cut(reply) or not wanted.request.room:
        return False
    client._dialect.thinks = True
    return text_of(body_of(client, wanted.request)) != sent


def remembered(client: Client, key: str, read: Callable[[Payload], Label]) -> Label | None:
    """The label of a reply in the cache; None where there is none, or none that can be read."""
    from dualign.annotate.client import read_kept

    kept = client._cache.get(key)
    if kept is None or (label := read_kept(kept, read)).value is None:
        return None
    client._cache.count_hit(key)
    client._remembered += 1
    return label


def label_of(
    wanted: Wanted, key: str, outcome: dict[str, Any], fault: AttemptError | None, read: Callable[[Payload], Label]
) -> Label:
    """Of what came back. A reply that gives one is kept."""
    from dualign.annotate.client import read_kept

    client, reply = wanted.client, outcome.get("body")
    if "missing" in outcome:
        how = outcome["missing"]
        return Label.absent(f"no line in the batch's output (it {'is' if how == 'completed' else 'was'} {how})")
    if "error" in outcome:
        return Label.absent(outcome["error"])
    if fault is not None or not isinstance(reply, dict):
        return Label.absent(str(fault))
    client._answers += 1
    label = read_kept(reply, read)
    if label.value is not None:
        tokens = usage(reply) or wanted.request.bounds()
        row = Row(key, client.settings.model, wanted.request.rubric, wanted.content, reply)
        client._cache.put(row, tokens, client._ledger.price(*tokens))
    return label


def billed(outcome: dict[str, Any], bounds: tuple[int, int]) -> tuple[int, int]:
    """Prompt and completion tokens, by the server's count. What it does not tell is the most that it can be; what was
    not asked, or was turned away, costs nothing."""
    reply = outcome.get("body")
    if outcome.get("status") == 200:
        return (usage(reply) if isinstance(reply, dict) else None) or bounds
    return bounds if outcome.get("missing") == "completed" else (0, 0)
