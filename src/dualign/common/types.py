"""The records that pass from stage to stage of an online batch. No torch here: annotators import it without."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Message = dict[str, Any]  # {"role": text, "content": text, and what else a chat template reads: tool_calls, name, ...}
TEMPLATE_COLUMNS: dict[str, type[list[Any]] | type[dict[str, Any]]] = {"tools": list, "chat_template_kwargs": dict}
Finish = Literal["eos", "length"]


@dataclass(frozen=True)
class Prompt:
    """One prompt: a conversation that ends where the assistant is to speak, or plain text to continue.

    `columns` holds whatever else the data row had; reward functions receive it by keyword. Of a conversation's, `tools`
    and `chat_template_kwargs` are for the chat template. `where`: its file and row, for people.
    """

    id: str
    content: str | tuple[Message, ...]
    columns: Mapping[str, Any] = field(default_factory=dict)
    where: str = field(default="", compare=False)

    def __str__(self) -> str:
        return self.where or f"prompt {self.id}"

    @property
    def conversational(self) -> bool:
        return not isinstance(self.content, str)

    @property
    def messages(self) -> list[Message]:
        """The prompt as chat messages; plain text becomes one user turn."""
        if isinstance(self.content, str):
            return [{"role": "user", "content": self.content}]
        return [dict(m) for m in self.content]

    @property
    def text(self) -> str:
        """The prompt for people and logs: the plain text, or the last user turn of a conversation."""
        return self.content if isinstance(self.content, str) else str(self.content[-1]["content"])

    @property
    def texts(self) -> list[str]:
        """What the prompt says: the plain text, or every message of a conversation."""
        return [self.content] if isinstance(self.content, str) else [text_of(message) for message in self.content]

    @property
    def tools(self) -> list[dict[str, Any]] | None:
        """What a conversation's assistant can call, as chat templates list it."""
        return self.for_template.get("tools")

    @property
    def for_template(self) -> dict[str, Any]:
        """The columns that a conversation's chat template reads beside its messages."""
        named = TEMPLATE_COLUMNS.items() if self.conversational else ()
        return {name: value for name, kind in named if isinstance(value := self.columns.get(name), kind) and value}


def user_prompt(id: str, text: str, system: str | None = None) -> Prompt:
    """A user's message, after a system message where there is one."""
    before: tuple[Message, ...] = ({"role": "system", "content": system},) if system else ()
    return Prompt(id, (*before, {"role": "user", "content": text}))


def text_of(message: Message) -> str:
    """A message for those who read text: its content, then a line for each tool call."""
    calls = [call.get("function") or call for call in message.get("tool_calls") or ()]
    lines = [f"{c.get('name')}({json.dumps(c.get('arguments', {}), ensure_ascii=False)})" for c in calls]
    return "\n".join([message["content"], *lines] if message["content"] else lines)


@dataclass(frozen=True)
class Example:
    """One row of a fixed data set: a prompt with one completion (demonstration) or two (chosen, rejected), and how each
    of them ended. `turns`: a conversation's completions as the assistant's messages, where they hold more than text."""

    prompt: Prompt
    completions: tuple[str, ...]
    finish: tuple[Finish, ...]
    turns: tuple[Message, ...] = ()

    def turn(self, i: int) -> Message:
        """Completion i of a conversation, as the assistant's message."""
        return self.turns[i] if self.turns else {"role": "assistant", "content": self.completions[i]}


@dataclass(frozen=True)
class Rollout:
    """One completion sampled from the current policy π_t.

    `completion_ids` ends with the EOS token exactly when `finish == "eos"`; a completion cut off at
    max_new_tokens is never given one. `sampler_logp` are the sampler's own untempered log-probs, one per id.
    """

    index: int  # position in the online batch: group * K + k
    group: int  # which prompt of the online batch
    prompt: Prompt
    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    text: str
    finish: Finish
    sampler_logp: tuple[float, ...]


@dataclass(frozen=True)
class Label:
    """A completion's scalar reward, or the reason why there is none. Absent is never zero."""

    value: float | None
    reason: str | None = None  # why absent; None where there is a value
    parts: Mapping[str, float | None] = field(default_factory=dict)  # each reward by its name, unweighted
    note: str | None = None  # the judge's own words

    @staticmethod
    def absent(reason: str, **more: Any) -> Label:
        return Label(None, reason, **more)
