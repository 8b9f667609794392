"""Judges as strict as the real ones: each family refuses what the real server refuses, in its own words, and answers in
its own shape. True answers are those of `fault_server`; its faults can be injected as well.

The words of refusals are as the servers' users report them (OpenAI's and Azure's error objects with `param` and `code`,
Google's list with one error, Anthropic's `param: null`, pydantic's `detail`, Groq's and xAI's sentences).
"""

from __future__ import annotations

import asyncio
import json
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

from fault_server import FaultServer, key_of, true_choice, true_score

Refusal = tuple[int, Any] | None
CHAT = {"model", "messages"}


def openai_error(message: str, param: str | None, code: str | None) -> tuple[int, Any]:
    return 400, {"error": {"message": message, "type": "invalid_request_error", "param": param, "code": code}}


def gpt5(r: dict[str, Any]) -> Refusal:
    """GPT-5: no max_tokens, no temperature but 1, no log-probs, no stop, schemas without lengths, efforts from minimal."""
    if "max_tokens" in r:
        return openai_error("Unsupported parameter: 'max_tokens' is not supported with this model. Use "
                            "'max_completion_tokens' instead.", "max_tokens", "unsupported_parameter")  # fmt: skip
    if r.get("temperature", 1) != 1:
        return openai_error(f"Unsupported value: 'temperature' does not support {r['temperature']} with this model. Only "
                            "the default (1) value is supported.", "temperature", "unsupported_value")  # fmt: skip
    for name in ("logprobs", "top_logprobs"):
        if name in r:
            return 403, {"error": {"message": "You are not allowed to request logprobs from this model",
                                   "type": "invalid_request_error", "param": None, "code": None}}  # fmt: skip
    if "stop" in r:
        return openai_error("Unsupported parameter: 'stop' is not supported with this model.", "stop",
                            "unsupported_parameter")  # fmt: skip
    if "maxLength" in json.dumps(r.get("response_format", {})):
        return openai_error("Invalid schema for response_format 'verdict': In context=('properties', 'reason'), "
                            "'maxLength' is not permitted.", "response_format", None)  # fmt: skip
    if r.get("reasoning_effort", "low") not in ("minimal", "low", "medium", "high"):
        return openai_error(f"Unsupported value: 'reasoning_effort' does not support '{r['reasoning_effort']}' with this "
                            "model. Supported values are: 'minimal', 'low', 'medium', and 'high'.", "reasoning_effort",
                            "unsupported_value")  # fmt: skip
    known = CHAT | {"max_completion_tokens", "temperature", "response_format", "reasoning_effort", "service_tier"}
    return _unknown_argument(r, known)


def gpt4(r: dict[str, Any]) -> Refusal:
    """GPT-4o and its like: takes what is usual, and nothing that it does not know."""
    if "max_tokens" in r and "max_completion_tokens" in r:
        return openai_error("Setting 'max_tokens' and 'max_completion_tokens' at the same time is not supported.",
                            "max_tokens", "invalid_parameter_combination")  # fmt: skip
    return _unknown_argument(r, CHAT | {"max_tokens", "max_completion_tokens", "temperature", "logprobs", "top_logprobs",
                                        "stop", "response_format", "service_tier"})  # fmt: skip


def azure(r: dict[str, Any]) -> Refusal:
    """An older api-version: no max_completion_tokens, no schemas."""
    if r.get("response_format", {}).get("type") == "json_schema":
        return openai_error("Invalid parameter: 'response_format' of type 'json_schema' is not supported with this model.",
                            "response_format", None)  # fmt: skip
    return _unknown_argument(r, CHAT | {"max_tokens", "temperature", "logprobs", "top_logprobs", "stop",
                                        "response_format"})  # fmt: skip


def _unknown_argument(r: dict[str, Any], known: set[str]) -> Refusal:
    for name in r.keys() - known:
        message = f"Unrecognized request argument supplied: {name}"
        return 400, {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": None}}
    return None


def claude(r: dict[str, Any]) -> Refusal:
    """Newer Claude models: no temperature; unknown fields, schemas and log-probs are ignored without a word."""
    if "temperature" in r:
        return 400, {"error": {"code": "invalid_request_error", "message": "`temperature` is deprecated for this model.",
                               "type": "invalid_request_error", "param": None}}  # fmt: skip
    if r.get("thinking", {}).get("type") == "enabled":
        return 400, {"error": {"code": "invalid_request_error", "type": "invalid_request_error", "param": None,
                               "message": "thinking.type: enabled is not supported by this model; use adaptive"}}  # fmt: skip
    return None


def gemini(r: dict[str, Any]) -> Refusal:
    """Gemini 2.5 Pro: an error in a list, unknown names, no log-probs, and thinking that cannot be switched off."""

    def error(message: str) -> tuple[int, Any]:
        return 400, [{"error": {"code": 400, "message": message, "status": "INVALID_ARGUMENT"}}]

    if "logprobs" in r:
        return error("Logprobs is not enabled for models/gemini-2.5-pro")
    if r.get("reasoning_effort") in ("none", "minimal"):
        return error("Budget 0 is invalid. This model only works in thinking mode.")
    known = CHAT | {"max_tokens", "max_completion_tokens", "temperature", "stop", "response_format", "reasoning_effort"}
    for name in r.keys() - known:
        return error(f'Invalid JSON payload received. Unknown name "{name}": Cannot find field.')
    return None


def mistral(r: dict[str, Any]) -> Refusal:
    """Pydantic with forbidden extras, which sends the input back."""
    known = CHAT | {"max_tokens", "temperature", "stop", "response_format"}
    detail = [{"type": "extra_forbidden", "loc": ["body", name], "msg": "Extra inputs are not permitted",
               "input": r[name]} for name in sorted(r.keys() - known)]  # fmt: skip
    return (
        (422, {"object": "error", "message": {"detail": detail}, "type": "invalid_request_error"}) if detail else None
    )


def groq(r: dict[str, Any]) -> Refusal:
    for name in ("logprobs", "top_logprobs"):
        if name in r:
            return openai_error(f"`{name}` is not supported with this model", None, None)
    known = CHAT | {"max_tokens", "max_completion_tokens", "temperature", "stop", "reasoning_effort"}
    if r.get("response_format", {}).get("type") == "json_schema":
        return openai_error("This model does not support response format `json_schema`. See supported models at ...",
                            "response_format", None)  # fmt: skip
    for name in r.keys() - known - {"response_format"}:
        return openai_error(f"property '{name}' is unsupported", None, None)
    return None


def grok(r: dict[str, Any]) -> Refusal:
    """xAI's reasoning models: one sentence, no object."""
    for name in ("stop", "logprobs", "reasoning_effort"):
        if name in r:
            return 400, {"code": "Client specified an invalid argument",
                         "error": f"Argument not supported on this model: {name}"}  # fmt: skip
    return None


def deepseek(r: dict[str, Any]) -> Refusal:
    for name in ("logprobs", "top_logprobs"):
        if name in r:
            return openai_error(
                f"deepseek-reasoner does not support the parameter `{name}`", None, "invalid_request_error"
            )
    if r.get("response_format", {}).get("type") == "json_schema":
        return openai_error("This response_format type is unavailable now", None, "invalid_request_error")
    return None


def vllm(r: dict[str, Any]) -> Refusal:
    """vLLM ignores what it does not know."""
    return None


def vllm_old(r: dict[str, Any]) -> Refusal:
    """Before it ignored unknown fields: the errors as one text, with the input."""
    known = CHAT | {"max_tokens", "temperature", "logprobs", "top_logprobs", "stop", "response_format", "guided_choice",
                    "chat_template_kwargs"}  # fmt: skip
    if extra := sorted(r.keys() - known):
        said = [{"type": "extra_forbidden", "loc": ("body", n), "msg": "Extra inputs are not permitted", "input": r[n]}
                for n in extra]  # fmt: skip
        return 400, {"object": "error", "message": str(said), "type": "BadRequestError", "param": None, "code": 400}
    return None


FAMILIES: dict[str, Callable[[dict[str, Any]], Refusal]] = {
    f.__name__: f for f in (gpt5, gpt4, azure, claude, gemini, mistral, groq, grok, deepseek, vllm, vllm_old)
}
THINKERS = {"gpt5": 300, "gemini": 350, "grok": 320, "deepseek": 400, "vllm": 500}  # tokens of their thinking


class StrictServer(FaultServer):
    """`with StrictServer("gpt5") as server`. `refused`: how often each field was refused; `seen`: every request that was
    taken."""

    def __init__(self, family: str, **more: Any) -> None:
        super().__init__(**more)
        self.family = family
        self.refused: Counter[int] = Counter()
        self.seen: list[dict[str, Any]] = []
        self.paths: list[str] = []

    def _succeed(self, path: str, request: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        self.paths.append(path)
        if refusal := FAMILIES[self.family](request):
            status, body = refusal
            self.refused[status] += 1
            self._send(writer, status, json.dumps(body).encode())
            return
        self.seen.append(request)
        body, whole = self._reply(request)
        self._send(writer, 200, json.dumps(body).encode())
        if whole:
            self.stats.bought[key_of(request["messages"][-1]["content"])] += 1

    def _reply(self, r: dict[str, Any]) -> tuple[dict[str, Any], bool]:
        text = r["messages"][-1]["content"]
        pair = len(re.findall(r"quality-\d+", text)) == 2
        value = true_choice(text) if pair else true_score(text)
        key = "choice" if pair else "score"
        answer = f"{'' if pair else 'SCORE: '}{value}"
        if r.get("response_format") and self.family not in ("claude",):  # Claude's door ignores it
            answer = json.dumps({"reason": "It is as good as it is.", key: value})
        elif re.search(r"one JSON object", text):
            answer = "Here is my verdict:\n```json\n" + json.dumps({"reason": "As it is.", key: value}) + "\n```"
        elif choices := r.get("structured_outputs", {}).get("choice") or r.get("guided_choice"):
            answer = str(value) if str(value) in choices else choices[0]
        budget = r.get("max_tokens") or r.get("max_completion_tokens") or 1000
        thought = self._thinks(r)
        cut = thought >= budget
        message: dict[str, Any] = {"role": "assistant", "content": None if cut else answer}
        if thought and self.family in ("deepseek", "vllm"):
            message["reasoning_content"] = "Some would say SCORE: 3, others a 9. " * 3
        counts: dict[str, Any] = {"prompt_tokens": len(text) // 4, "completion_tokens": min(thought + 12, budget)}
        if self.family in ("gemini", "grok") and thought:  # what is thought is in the total alone
            counts = {"prompt_tokens": len(text) // 4, "completion_tokens": 0 if cut else 12,
                      "total_tokens": len(text) // 4 + min(thought + 12, budget)}  # fmt: skip
        if self.family == "gpt5":
            counts["completion_tokens_details"] = {"reasoning_tokens": min(thought, budget)}
        if self.family == "gemini" and cut:
            counts["completion_tokens_details"] = {"reasoning_tokens": budget}
        choice = {"index": 0, "message": message, "finish_reason": "length" if cut else "stop"}
        body = {"object": "chat.completion", "choices": [choice], "usage": counts}
        return (body if self.family != "grok" else body | {"system_fingerprint": None}), not cut

    def _thinks(self, r: dict[str, Any]) -> int:
        """Tokens of thinking before the answer."""
        tokens = THINKERS.get(self.family, 0)
        if self.family == "vllm" and r.get("chat_template_kwargs", {}).get("enable_thinking") is False:
            return 0
        if self.family == "deepseek" and r.get("thinking", {}).get("type") == "disabled":
            return 0
        if r.get("reasoning_effort") in ("none", "minimal"):
            return 0
        return tokens // 10 if r.get("reasoning_effort") == "low" else tokens
