"""A model's chat template: the text that a conversation is to the model, with nothing of it lost in silence."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from dualign.common.errors import UserError
from dualign.common.types import Message, Prompt

log = logging.getLogger(__name__)

PROBE = "words that stand in for others"
REASONING = re.compile("reasoning|think|thought")  # as providers name it: reasoning_content, reasoning, thinking, ...
EMPTY: tuple[Any, ...] = (None, "", [], {})
CALLS = ("tool_calls", "function_call")
RENDERINGS = 3  # of a prompt and its answer, should the clock that a template shows move on between the two


class ChatTemplate:
    """Renders by a Hugging Face tokenizer's template. Raises UserError, naming the row, for what the template refuses,
    and for an answer whose text, calls or reasoning it leaves out, under whatever key; what else it leaves out is said,
    once for each kind."""

    def __init__(self, hf: Any) -> None:
        self.hf = hf
        self._said: set[str] = set()

    def prompt(self, prompt: Prompt) -> str:
        """The text after which the assistant speaks."""
        return self._rendered(prompt, prompt.messages, True)

    def answer(self, prompt: Prompt, before: str, turn: Message) -> tuple[str, str]:
        """The prompt's text, which was `before`, and what the template has after it where the assistant says `turn`."""
        for _ in range(RENDERINGS):
            whole = self._rendered(prompt, [*prompt.messages, turn], False)
            if whole.startswith(before):
                return before, whole[len(before) :]
            before = self.prompt(prompt)
        at = next(i for i, c in enumerate(before) if whole[i : i + 1] != c)
        raise UserError(
            f"{prompt}: the chat template shows the model another text before the answer than when it is to "
            f"answer: {whole[at : at + 40]!r} stands where the prompt goes on with {before[at : at + 40]!r}"
        )

    def closing(self, more: Sequence[Message] = ()) -> str:
        """What the template has after an answer; "" where it takes no such conversation. `more`: turns after it."""
        talk = [{"role": "user", "content": "?"}, {"role": "assistant", "content": PROBE}, *more]
        try:
            text = self._text(Prompt("", ()), talk, False) if self.hf.chat_template is not None else ""
        except Exception:  # whatever a template may raise: it is not asked to take this
            return ""
        return text.rpartition(PROBE)[2] if PROBE in text else ""

    def _rendered(self, prompt: Prompt, messages: list[Message], generation: bool) -> str:
        """The text, of messages in the shape that this template takes, by trying: there are templates that read text
        from parts alone, or arguments of calls that are JSON already, and raise for others or leave them out."""
        if self.hf.chat_template is None:
            raise UserError(
                f"{prompt}: it is a conversation, but the model has no chat template; "
                "give one with model.chat_template=FILE.jinja, or use plain-text prompts"
            )
        found: list[tuple[str, list[str]]] = []
        refusals = []
        for shape in (as_they_are, in_parts, arguments_as_json):
            if shape is not as_they_are and shape(messages) == messages:
                continue
            try:
                found.append(self._tried(prompt, messages, shape, generation))
            except Exception as error:  # whatever a template may raise
                refusals.append(error)
            else:
                if not found[-1][1]:
                    return found[-1][0]
        if not found:
            raise UserError(f"{prompt}: the chat template refuses it: {_reason(refusals[0])}")
        text, lost = min(found, key=lambda one: len(one[1]))
        self._tell(prompt, lost)
        return text

    def _tell(self, prompt: Prompt, lost: list[str]) -> None:
        for part in lost:
            if part.startswith("the answer's"):
                raise UserError(
                    f"{prompt}: the chat template leaves out {part}; give one that has it "
                    "(model.chat_template=FILE.jinja), or take it out of the row"
                )
            if part not in self._said:
                self._said.add(part)
                log.warning("the chat template leaves out %s: the model never sees it (%s)", part, prompt)

    def _tried(self, prompt: Prompt, messages: list[Message], shape: Shape, generation: bool) -> tuple[str, list[str]]:
        """The text, and what of the messages makes no difference to it."""

        def text_of(these: list[Message], asked: Prompt = prompt) -> str:
            return self._text(asked, shape(these), generation)

        def idle(at: int, message: Message) -> bool:
            try:
                return text_of([*messages[:at], message, *messages[at + 1 :]]) == text
            except Exception:  # it made a difference
                return False

        text = text_of(messages)
        if shape is in_parts and "'type': 'text'" in text:
            raise ValueError("content must be text, not parts")
        found = []
        for at, message in enumerate(messages):
            answer = at == len(messages) - 1 and not generation
            found += _lost(message, text, answer, partial(idle, at))
        if prompt.tools and text_of(messages, Prompt(prompt.id, prompt.content)) == text:
            found.append("the tools")
        return text, found

    def _text(self, prompt: Prompt, messages: list[Message], generation: bool) -> str:
        given = prompt.for_template.get("chat_template_kwargs", {})
        return str(
            self.hf.apply_chat_template(
                messages, tools=prompt.tools, add_generation_prompt=generation, tokenize=False, **given
            )
        )


Shape = Callable[[list[Message]], list[Message]]


def as_they_are(messages: list[Message]) -> list[Message]:
    return messages


def in_parts(messages: list[Message]) -> list[Message]:
    return [m | {"content": [{"type": "text", "text": m["content"]}]} if m.get("content") else m for m in messages]


def arguments_as_json(messages: list[Message]) -> list[Message]:
    return [m | {"tool_calls": [_as_json(c) for c in m["tool_calls"]]} if "tool_calls" in m else m for m in messages]


def _as_json(call: dict[str, Any]) -> dict[str, Any]:
    if isinstance(call.get("function"), dict):
        return call | {"function": _as_json(call["function"])}
    arguments = call.get("arguments")
    return call | {"arguments": json.dumps(arguments, ensure_ascii=False)} if isinstance(arguments, dict) else call


def _lost(message: Message, text: str, answer: bool, idle: Callable[[Message], bool]) -> list[str]:
    """What of a message is not in the text: `idle` says whether another message in its place changes nothing."""
    whose = f"{'an' if message['role'] == 'assistant' else 'a'} {message['role']} message's"
    mine = "the answer's" if answer else whose
    content = message["content"].strip() if isinstance(message.get("content"), str) else ""
    found = [f"{mine} text"] if content and content not in text and idle(message | {"content": PROBE}) else []
    thoughts = {k for k, v in message.items() if REASONING.search(k) and isinstance(v, str | list | dict)}
    unread = bool(thoughts) and idle({k: v for k, v in message.items() if k not in thoughts})
    for key in sorted(message.keys() - {"role", "content"}):
        if message[key] in EMPTY or not idle({k: v for k, v in message.items() if k != key}):
            continue
        if key not in thoughts:
            found.append(f"{mine if key in CALLS else whose} {key}")
        elif answer and (unread or not _shown(message[key], text)):  # earlier turns' reasoning is left out on purpose
            found.append(f"{mine} {key}")
    return found


def _shown(reasoning: Any, text: str) -> bool:
    """Whether its words are in a text: two keys of a message may hold the same."""
    parts = reasoning if isinstance(reasoning, list) else [reasoning]
    words = [p.get("text") if isinstance(p, dict) else p for p in parts]
    return all(isinstance(w, str) and w.strip() in text for w in words)


def _reason(error: Exception) -> str:
    line = getattr(error, "lineno", None)
    where = f"a syntax error in its line {line}: " if line is not None else ""
    return f"{where}{str(error).strip() or type(error).__name__}"
