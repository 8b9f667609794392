"""What a server said, whatever its habits: the text of a chat completion, or why there is none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dualign.annotate.faults import FILTER, MalformedError, NoAnswerError

Payload = Mapping[str, Any]
CUT_THINKING = "cut off while reasoning"
CUT = {"length", "max_tokens", "model_length"}
FILTERED = {
    "content_filter", "content_filtered", "safety", "recitation", "blocklist", "prohibited_content", "spii", "sensitive",
    "guardrail_intervened",
}  # fmt: skip
REASONING = ("reasoning_content", "reasoning", "reasoning_details", "thinking", "thinking_blocks")


@dataclass(frozen=True)
class Reply:
    """A chat completion: what the judge said, and what it thought before that."""

    text: str
    cut: bool = False  # whether it was cut off
    tokens: tuple[Mapping[str, Any], ...] = ()  # with log-probs, where the server gives them
    reasoning: str = ""

    @property
    def note(self) -> str:
        """The judge's words, for people."""
        return f"{self.reasoning.strip()}\n\n{self.text}" if self.reasoning.strip() else self.text


def read_reply(payload: Payload) -> Reply:
    """Raises NoAnswerError for a reply that holds no answer and would not if it were asked for again, MalformedError
    for what is no reply."""
    choice = first_choice(payload)
    message = choice.get("message")
    if message is None and isinstance(choice.get("text"), str):  # as completions without chat have it
        message = {"content": choice["text"]}
    finish = _word(choice.get("finish_reason"))
    if {finish, _word(choice.get("native_finish_reason"))} & FILTERED or _blocked(payload):
        raise NoAnswerError(FILTER)
    if not isinstance(message, dict):
        raise MalformedError(f"no choice with a message{_words_of(payload)}")
    if finish == "error":
        raise MalformedError("the provider broke off")
    text, refusal = text_of(message.get("content")), text_of(message.get("refusal")) or _refusal(message.get("content"))
    if refusal or finish == "refusal":
        raise NoAnswerError("refused", refusal or text)
    reasoning = _reasoning(message)
    if not text.strip():
        text = _called(message)
    if not text.strip():
        _explain(message, finish, bool(reasoning) or _thought(payload), reasoning)
    return Reply(text, finish in CUT, tuple(_tokens(choice)), reasoning)


def first_choice(payload: Payload) -> Mapping[str, Any]:
    """The first of a reply's choices; {} where it has none."""
    choices = payload.get("choices")
    found = choices[0] if isinstance(choices, list) and choices else None
    return found if isinstance(found, dict) else {}


def was_cut(payload: Payload) -> bool:
    """Whether a reply stopped at its longest."""
    return _word(first_choice(payload).get("finish_reason")) in CUT


def text_of(content: Any) -> str:
    """Content that is a text, a number, or a list of parts: the parts that are text, without reasoning and refusals."""
    if isinstance(content, str):
        return content
    if isinstance(content, int | float) and not isinstance(content, bool):
        return str(content)
    if isinstance(content, dict):
        spoken = content.get("type", "text") in ("text", "output_text")
        return text_of(content.get("text")) if spoken else ""
    return "".join(map(text_of, content)) if isinstance(content, list) else ""


def _refusal(content: Any) -> str:
    """The part of a list of parts that refuses."""
    parts = content if isinstance(content, list) else []
    return "".join(text_of(p.get("refusal")) for p in parts if isinstance(p, dict) and p.get("type") == "refusal")


def _reasoning(message: Mapping[str, Any]) -> str:
    """What a judge thought, where the server tells it apart from the answer."""
    content = message.get("content")
    parts = [p for p in content if isinstance(p, dict)] if isinstance(content, list) else []
    told = [message.get(key) for key in REASONING] + [p.get(key) for p in parts for key in REASONING]
    texts = [words for each in told if each and (words := _words_in(each))]
    return texts[0] if texts else ""


def _words_in(thought: Any) -> str:
    """Reasoning as a text, or as a list of parts in one of several forms."""
    if isinstance(thought, list):
        return "".join(map(_words_in, thought))
    if isinstance(thought, dict):
        return next(
            (_words_in(thought[key]) for key in ("text", "thinking", "summary", "content") if thought.get(key)), ""
        )
    return thought if isinstance(thought, str) else ""


def _thought(payload: Payload) -> bool:
    """Whether tokens were paid for that nobody sees: told as reasoning, or in the total alone."""
    counts = payload.get("usage")
    if not isinstance(counts, dict):
        return False
    details = counts.get("completion_tokens_details")
    hidden = details.get("reasoning_tokens") if isinstance(details, dict) else None
    told = [n for of in ("total", "prompt", "completion") if isinstance(n := counts.get(f"{of}_tokens"), int)]
    return (isinstance(hidden, int) and hidden > 0) or (len(told) == 3 and told[0] > told[1] + told[2])


def _called(message: Mapping[str, Any]) -> str:
    """The arguments of the one function that a judge called instead of speaking: JSON, read as any other."""
    tools = message.get("tool_calls")
    calls = [call.get("function") for call in tools if isinstance(call, dict)] if isinstance(tools, list) else []
    calls += [message["function_call"]] if isinstance(message.get("function_call"), dict) else []
    given = [call.get("arguments") for call in calls if isinstance(call, dict)]
    return given[0] if len(given) == 1 and isinstance(given[0], str) else ""


def _explain(message: Mapping[str, Any], finish: str, thought: bool, words: str) -> None:
    """Raises what an empty message stands for. Asked again, a judge would say the same, unless nothing explains it."""
    content = message.get("content")
    thought = thought or any(message.get(key) for key in REASONING) or (isinstance(content, list) and bool(content))
    if finish in CUT:
        raise NoAnswerError(CUT_THINKING if thought else "cut off before an answer", words or None)
    if thought:
        raise NoAnswerError("reasoning without an answer", words or None)
    if message.get("tool_calls") or message.get("function_call"):
        raise NoAnswerError("a tool call instead of an answer")
    raise MalformedError("an empty message")


def _blocked(payload: Payload) -> bool:
    feedback = payload.get("promptFeedback") or payload.get("prompt_feedback")
    return isinstance(feedback, dict) and bool(feedback.get("blockReason") or feedback.get("block_reason"))


def _words_of(payload: Payload) -> str:
    """What a server says instead of a choice."""
    words = [payload[key] for key in ("message", "detail", "msg") if isinstance(payload.get(key), str)]
    return f": {words[0]}" if words else ""


def _word(value: Any) -> str:
    return value.strip().lower() if isinstance(value, str) else ""


def _tokens(choice: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Tokens with log-probs; [] where a server gives none, or something else."""
    given = choice.get("logprobs")
    tokens = given.get("content") if isinstance(given, dict) else None
    if not isinstance(tokens, list):
        return []
    return [_token(token) for token in tokens if isinstance(token, dict) and isinstance(token.get("token"), str)]


def _token(token: Mapping[str, Any]) -> Mapping[str, Any]:
    top = token.get("top_logprobs")
    known = [c for c in top if isinstance(c, dict) and _counted(c)] if isinstance(top, list) else []
    return {**token, "top_logprobs": known}


def _counted(candidate: Mapping[str, Any]) -> bool:
    logprob = candidate.get("logprob")
    number = isinstance(logprob, int | float) and not isinstance(logprob, bool) and logprob <= 0
    return number and isinstance(candidate.get("token"), str)
