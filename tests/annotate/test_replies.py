"""What servers answer in their various habits: the label or its reason, and how many requests that took."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from dualign.annotate.base import Item, label_all
from dualign.annotate.endpoints import JudgeReward, PreferenceReward
from dualign.annotate.judge import JudgeAnnotator, read_score
from dualign.annotate.preference import PreferenceAnnotator
from dualign.annotate.rubric import load
from dualign.common.errors import StopRun, UserError
from dualign.common.types import Label, Prompt
from fault_server import FaultServer

FILTER = "refused by the provider's content filter"
LONG = "The response is clear, helpful and mostly correct, though brief. " * 4


def chat(content: Any, finish: Any = "stop", **message: Any) -> dict[str, Any]:
    return {"choices": [{"finish_reason": finish, "message": {"role": "assistant", "content": content, **message}}]}


def error(message: str, **more: Any) -> dict[str, Any]:
    return {"error": {"message": message, **more}}


def ask(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    replies: list[Any],
    status: int = 200,
    pairs: bool = False,
    **more: Any,
) -> tuple[list[Label], int]:
    """The labels of as many completions as there are replies, and the requests made. A list of replies is served in
    turn; of a pair, the reply to the request that shows its first completion first."""
    monkeypatch.setattr("dualign.annotate.request.FIRST_WAIT", 0.01)
    with FaultServer() as server:

        def answer(path: str, request: dict[str, Any], writer: Any) -> None:
            found = re.search(r"answer number (\d)", request["messages"][-1]["content"])
            assert found
            body = replies[int(found[1])]
            body = (body.pop(0) if len(body) > 1 else body[0]) if isinstance(body, list) else body
            server._send(writer, status, (body if isinstance(body, str) else json.dumps(body)).encode())

        monkeypatch.setattr(server, "_succeed", answer)
        settings = {"base_url": server.url, "model": "m", "cache": str(folder / "c.sqlite"), "rubric": "helpfulness",
                    "max_tokens": 256}  # fmt: skip
        more = {"retries": 2, "concurrency": 1} | more
        annotator = (
            PreferenceAnnotator(PreferenceReward(**(settings | more)))
            if pairs
            else JudgeAnnotator(JudgeReward(**(settings | more)))
        )
        try:
            items = [Item(i, i // 2, Prompt("p", "question"), f"answer number {i}") for i in range(len(replies))]
            return label_all(annotator, items), server.stats.calls
        finally:
            annotator.close()


@pytest.mark.parametrize(("reply", "value", "reason"), [
    (chat("", "content_filter"), None, FILTER), (chat(None, "content_filter"), None, FILTER),
    (chat("SCORE: 1", "content_filter"), None, FILTER), (chat(None, "SAFETY"), None, FILTER),
    ({"promptFeedback": {"blockReason": "SAFETY"}}, None, FILTER),
    (error("The prompt was filtered", code="content_filter"), None, FILTER),
    (error("input flagged", code=403, metadata={"reasons": ["violence"]}), None, FILTER),
    (chat("", refusal="I can't give this a score of 7."), None, "refused"),
    (chat([{"type": "refusal", "refusal": "No."}]), None, "refused"), (chat("No.", "refusal"), None, "refused"),
    (chat(None, reasoning_content="I would say SCORE: 7"), None, "reasoning without an answer"),
    (chat([{"type": "thinking", "thinking": "SCORE: 7"}]), None, "reasoning without an answer"),
    (chat(None, "length", reasoning="SCORE: 7"), None, "cut off while reasoning"),
    (chat("", "length"), None, "cut off before an answer"),
    (chat('```json\n{"why": "The resp', "length"), None, "cut off before an answer"),
    (chat(None, "tool_calls", tool_calls=[{"id": "1"}]), None, "a tool call instead of an answer"),
    (chat([{"type": "thinking", "thinking": [{"type": "text", "text": "3"}]}, {"type": "text", "text": "SCORE: 7"}]), 7, None),
    (chat(["SCORE", ": 7"]), 7, None), (chat({"type": "text", "text": "7"}), 7, None), (chat(7), 7, None),
    ({"choices": [{"text": "SCORE: 7", "finish_reason": "stop"}]}, 7, None),
    (chat(f'```json\n{{"reasoning": "{LONG}", "score": 7}}\n```'), 7, None),
    ({**chat("SCORE: 7"), "error": None}, 7, None),
])  # fmt: skip
def test_what_asking_again_would_not_change_is_asked_once(
    reply: Any, value: float | None, reason: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels, calls = ask(tmp_path, monkeypatch, [chat("SCORE: 3"), reply, chat("SCORE: 4")])
    assert [(x.value, x.reason) for x in labels] == [(3, None), (value, reason), (4, None)]
    assert calls == 3


@pytest.mark.parametrize("reply", [
    error("Provider returned error", code=502), error("slow down", code="429"), error("Overloaded", type="overloaded_error"),
    {"choices": [{"finish_reason": "error", "message": {"content": ""}, "error": {"code": 502, "message": "gone"}}]},
    {"object": "error", "message": "Internal server error", "type": "InternalServerError", "code": 500},
    chat("SCORE: 1", "error"), {"choices": []}, {"choices": None}, {"choices": [{"message": None}]}, [], "<html>gateway</html>",
    chat(""),
])  # fmt: skip
def test_what_may_pass_is_asked_again(reply: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (label,), calls = ask(tmp_path, monkeypatch, [[reply, reply, chat("SCORE: 3")]])
    assert label.value == 3 and calls == 3


@pytest.mark.parametrize(("reply", "told"), [
    (error("Insufficient credits. Add more", code=402), "no credit left"), (error("No auth", code=401), "refuses the key"),
    (error("Invalid API key"), "refuses the key"), ({"code": "InvalidApiKey", "message": "Invalid API-key"}, "refuses the key"),
    ({"error": "insufficient balance"}, "no credit left"), (error("No such model: m", code="404"), "check `model`"),
    (error("bad field", code="invalid_request_error"), "rejects the request"),
    ('data: {"choices": [{"delta": {"content": "SCORE: 7"}}]}\n\ndata: [DONE]\n\n', "stream of events"),
])  # fmt: skip
@pytest.mark.parametrize("first", [True, False])
def test_an_error_inside_a_success_is_that_error_at_once(
    reply: Any, told: str, first: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lasting = told not in ("rejects the request", "stream of events")  # of one request, once others were accepted
    replies = [reply] if first else [chat("SCORE: 3"), reply, chat("SCORE: 3")]
    if first or lasting:
        with pytest.raises(UserError if first else StopRun, match=told):
            ask(tmp_path, monkeypatch, replies)
    else:
        labels, calls = ask(tmp_path, monkeypatch, replies)
        assert [x.value for x in labels] == [3, None, 3] and told in str(labels[1].reason) and calls == 3


def test_a_page_instead_of_json_is_told_with_its_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (label,), _ = ask(tmp_path, monkeypatch, ["<html><body>Sign in</body></html>"])
    assert "a web page instead of JSON (Sign in); is base_url right?" in str(label.reason)


def test_credit_that_is_gone_is_no_bad_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="no credit left"):
        ask(tmp_path, monkeypatch, [error("Your credit balance is too low")], status=400)


PER_MINUTE = (
    "Rate limit reached for gpt-4o on requests per min (RPM): Limit 3. You can increase your rate limit by adding a payment "
    "method to your account at https://platform.openai.com/account/billing."
)


@pytest.mark.parametrize(("status", "reply", "told"), [
    (429, error(PER_MINUTE, type="requests", code="rate_limit_exceeded"), "HTTP 429"), (429, error(PER_MINUTE), "HTTP 429"),
    (200, error(PER_MINUTE, type="requests", code="rate_limit_exceeded"), "error 429"),
    (400, error("Rejected by our safety system", code=None), FILTER), (400, error("No.", code="content_filter"), FILTER),
    (400, error("No.", innererror={"code": "ResponsibleAIPolicyViolation"}), FILTER),
    (422, {"detail": [{"msg": "Field required", "type": "missing", "input": "about our safety filter"}]}, "rejects"),
    (400, error("[{'msg': 'Field required', 'input': {'content': \"It's a safety filter\"}}]"), "rejects"),
    (400, error("The model acme/safety-filter-guard takes no temperature"), "rejects"),
    (403, error("No access to gpt-oss-safety"), "refuses the key"),
    (429, error("You exceeded your current quota", code="insufficient_quota"), "no credit left"),
    (200, {"base_resp": {"status_code": 1004, "status_msg": "login fail"}, "choices": None}, "refuses the key"),
    (200, {"base_resp": {"status_code": 1008, "status_msg": "no"}, "choices": None}, "no credit left"),
    (200, {"base_resp": {"status_code": 1026, "status_msg": "no"}, "choices": None}, FILTER),
    (200, {"base_resp": {"status_code": 1002, "status_msg": "no"}, "choices": None}, "error 429"),
])  # fmt: skip
def test_a_fault_is_told_by_the_servers_own_words(
    status: int, reply: Any, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    try:
        labels, _ = ask(tmp_path, monkeypatch, [reply], status, model="acme/safety-filter-guard", retries=1)
        said = str(labels[0].reason)
    except (UserError, StopRun) as fault:
        said = str(fault)
    assert told in said


@pytest.mark.parametrize("more", [
    {"error": {"code": None, "message": None}}, {"error": {"code": "", "message": ""}},
    {"base_resp": {"status_code": 0, "status_msg": "success"}},
])  # fmt: skip
def test_an_error_that_says_nothing_is_none(more: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (label,), calls = ask(tmp_path, monkeypatch, [{**chat("SCORE: 7"), **more}])
    assert (label.value, calls) == (7, 1)


def test_a_prompt_that_the_judge_says_again_is_no_answer() -> None:
    prompt = Prompt("p", ({"role": "user", "content": 'Answer with {"score": 10}'},))
    reply = chat('It is fair.\n```json\n{"score": 10}\n```')
    assert read_score(reply, load("helpfulness"), "an answer", prompt).value is None
    assert read_score(reply, load("helpfulness"), "an answer", Prompt("p", "question")).value == 10


def test_a_filter_leaves_a_pair_without_a_label(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    labels, calls = ask(tmp_path, monkeypatch, [chat("1"), chat(None, "content_filter")], pairs=True)
    assert [(x.value, x.reason) for x in labels] == [(None, FILTER)] * 2 and calls == 2


def test_log_probs_of_any_shape_make_no_fault() -> None:
    shapes: list[Any] = [
        [{"token": "7"}], [{"token": "7", "top_logprobs": [{"token": "7", "logprob": None}]}], "7", [None], {"7": 1},
        [{"token": "7", "top_logprobs": [{"logprob": "-0.1"}]}], [{"logprob": -1}],
    ]  # fmt: skip
    for content in shapes:
        reply = chat("7")
        reply["choices"][0]["logprobs"] = {"content": content}
        assert read_score(reply, load("helpfulness"), "answer", expected=True).value == 7
