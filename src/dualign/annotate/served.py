"""A reward model behind a server: vLLM's /classify and /pooling, which answer a text with numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from dualign.annotate.base import Item
from dualign.annotate.client import Client
from dualign.annotate.endpoints import ServedReward
from dualign.annotate.faults import MalformedError
from dualign.annotate.request import Payload, Request
from dualign.common.errors import UserError
from dualign.common.types import Label


class ServedAnnotator:
    """The label is the model's one number for the conversation that ends in the completion."""

    def __init__(self, settings: ServedReward, *, ledger: Path | None = None) -> None:
        self.name = settings.name or settings.model
        self.settings = settings
        self.client = Client(settings, ledger=ledger)
        root = self.client.settings.base_url.rstrip("/").removesuffix(
            "/v1"
        )  # these routes stand beside /v1, not under it
        self._url = f"{root}/{settings.route}"

    def open(self) -> ServedSession:
        return ServedSession(self)

    def close(self) -> None:
        self.client.close()

    def ask(self, item: Item) -> Future[Label]:
        if item.prompt.conversational:
            turn = {"role": "assistant", "content": item.completion}
            body: dict[str, Any] = {"messages": [*item.prompt.messages, turn]}
        else:
            body = {"input": item.prompt.text + item.completion}
        return self.client.submit(Request(self._url, body, self.settings.route), self._read)

    def _read(self, payload: Payload) -> Label:
        value = read_value(payload)
        return Label(value, parts={self.name: value})


class ServedSession:
    def __init__(self, annotator: ServedAnnotator) -> None:
        self._annotator = annotator
        self._asked: dict[int, Future[Label]] = {}

    def add(self, item: Item) -> None:
        self._asked[item.index] = self._annotator.ask(item)

    def so_far(self) -> dict[int, Label]:
        there = {i: future for i, future in self._asked.items() if future.done() and future.exception() is None}
        return {index: future.result() for index, future in there.items()}

    def close(self) -> dict[int, Label]:
        name = self._annotator.name
        labels = {index: future.result() for index, future in self._asked.items()}
        return {
            i: x if x.value is not None else Label.absent(x.reason or "", parts={name: None}) for i, x in labels.items()
        }


def read_value(payload: Payload) -> float:
    """The number in a reply of /classify ({"data": [{"probs": [0.3]}]}) or /pooling ({"data": [{"data": [0.3]}]}).
    Raises MalformedError for what is no such reply, UserError for a model with several outputs."""
    try:
        row: Mapping[str, Any] = payload["data"][0]
        values = row["probs"] if "probs" in row else row["data"]
        while len(values) == 1 and isinstance(values[0], list):
            values = values[0]
        numbers = [float(v) for v in values]
    except (KeyError, IndexError, TypeError, ValueError):
        raise MalformedError("no numbers in the reply") from None
    if len(numbers) > 1:
        raise UserError(
            f"the served model has {len(numbers)} outputs; a reward needs one (a sequence classifier with one label)"
        )
    if not numbers or not math.isfinite(numbers[0]):
        raise MalformedError("not a finite number")
    return numbers[0]
