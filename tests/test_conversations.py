"""Rows keep what they say: turns, tools, calls, reasoning and parts reach the prompt and the completions; what
contradicts itself is refused with its row."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dualign.common.errors import UserError
from dualign.data.rows import load_examples, load_prompts
from dualign.data.settings import DataConfig


def u(text):
    return {"role": "user", "content": text}


def a(text, **more):
    return {"role": "assistant", "content": text, **more}


S = {"role": "system", "content": "Answer in French."}
CALL = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Paris"}}}
CALLED = a("", tool_calls=[CALL])
TOOL = {"role": "tool", "content": "22 C", "tool_call_id": "1", "name": "weather"}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"city": {"type": "string"}}}}]


def write(folder, *rows, parquet=False):
    if parquet:
        path = folder / "x.parquet"
        pq.write_table(pa.Table.from_pylist([*rows]), path)
    else:
        path = folder / "x.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def example(folder, row, **config):
    source = write(folder, row)
    return load_examples(source, DataConfig(train=source, **config))[0]


TALK = [u("Q1"), a("A1"), u("Q2")]
CONTEXTS = {
    "prompt text, whole conversations": (
        {"prompt": "Q1", "chosen": [*TALK, a("y")], "rejected": [*TALK, a("n")]},
        TALK,
        ("y", "n"),
    ),
    "prompt text, a system message": ({"prompt": "Q", "chosen": [S, u("Q"), a("y")], "rejected": [S, u("Q"), a("n")]},
                                      [S, u("Q")], ("y", "n")),
    "a prompt's own system message": ({"prompt": [S, u("Q")], "completion": [u("Q"), a("y")]}, [S, u("Q")], ("y",)),
    "prompt text is the last question": ({"prompt": "Q2", "completion": [*TALK, a("y")]}, TALK, ("y",)),
    "several turns": ({"prompt": [u("Q1")], "completion": [a("A1"), u("Q2"), a("y")]}, TALK, ("y",)),
    "turns after the assistant's": ({"prompt": TALK[:2], "completion": [u("Q2"), a("y")]}, TALK, ("y",)),
    "no prompt": ({"chosen": [*TALK, a("y")], "rejected": [*TALK, a("n")]}, TALK, ("y", "n")),
    "messages": ({"messages": [*TALK, a("y")]}, TALK, ("y",)),
    "messages beside a prompt": ({"prompt": "Q1", "messages": [*TALK, a("y")]}, TALK, ("y",)),
    "text beside messages": ({"prompt": "Q", "chosen": [u("Q"), a("y")], "rejected": "n"}, [u("Q")], ("y", "n")),
}  # fmt: skip


@pytest.mark.parametrize("case", CONTEXTS)
def test_the_context_is_the_whole_conversation_before_the_last_turn(tmp_path, case):
    row, context, completions = CONTEXTS[case]
    found = example(tmp_path, row)
    assert found.prompt.messages == context and found.completions == completions
    assert [found.turn(i) for i in range(len(completions))] == [a(text) for text in completions]
    own = "prompt" in row and "messages" in row  # as prompts, such rows have one
    assert own or load_prompts(str(tmp_path / "x.jsonl"))[0].messages == context


CONTRADICTIONS = [
    ({"prompt": "Else", "chosen": [u("Q1"), a("y")], "rejected": [u("Q1"), a("n")]}, "of another conversation"),
    ({"prompt": [u("Else")], "completion": [u("Q1"), a("y")]}, "begins with the user's 'Q1'"),
    ({"prompt": [{**S, "content": "In Dutch."}, u("Q")], "completion": [S, u("Q"), a("y")]}, "another conversation"),
    ({"prompt": "Else", "messages": [u("Q1"), a("y")]}, "another conversation"),
    (
        {"prompt": [u("Q1")], "chosen": [a("A1"), u("Q2"), a("y")], "rejected": [a("B1"), u("Q3"), a("n")]},
        "differ before their last message",
    ),
    ({"prompt": [u("Q1")], "completion": [a("A1"), a("A2")]}, "ends with the assistant's turn"),
    ({"prompt": [u("Q1")], "messages": [u("Q1"), a("A1"), u("Q2")]}, "must end with the assistant's message"),
    ({"chosen": "Why? So.", "rejected": "Why? So."}, "the same text"),
    ({"messages": "Why?"}, "must be text or a list of messages"),
    ({"prompt": None, "completion": "x"}, "nothing (null)"),
]


@pytest.mark.parametrize(("row", "message"), CONTRADICTIONS)
def test_a_row_that_contradicts_itself_is_named(tmp_path, row, message):
    with pytest.raises(UserError, match=r"x\.jsonl, row 1: ") as error:
        example(tmp_path, row)
    assert message in str(error.value)


def test_a_messages_column_is_prompts_too(tmp_path):
    source = write(tmp_path, {"messages": TALK}, {"messages": [*TALK, a("y")]})
    for column in ("prompt", "messages"):
        prompts = load_prompts(source, DataConfig(train=source, prompt_column=column))
        assert [p.messages for p in prompts] == [TALK, TALK]
    assert example(tmp_path, {"messages": [*TALK, a("y")]}, prompt_column="messages").completions == ("y",)


def test_turns_that_become_context_are_counted(tmp_path, caplog):
    example(tmp_path, {"prompt": TALK, "completion": [*TALK, a("y")]})
    assert not caplog.text
    source = write(tmp_path, {"messages": [u("Q1"), a("A1")]}, {"messages": [*TALK, a("y")]})
    load_examples(source)
    assert "1 of 2 rows are longer conversations" in caplog.text and "last turn is trained on" in caplog.text


@pytest.mark.parametrize("parquet", [False, True])
def test_tools_calls_and_reasoning_stay_with_the_row(tmp_path, parquet):
    asked = [u("Weather?"), CALLED, TOOL]
    rows = [
        {"prompt": asked, "completion": [a("22", reasoning_content="It says so.")], "tools": TOOLS},
        {"prompt": [u("Weather?")], "completion": [CALLED], "tools": TOOLS},
    ]
    source = write(tmp_path, *rows, parquet=parquet)
    talked, called = load_examples(source)
    assert talked.prompt.messages == asked and talked.prompt.tools == TOOLS
    assert talked.turn(0) == a("22", reasoning_content="It says so.") and talked.completions == ("22",)
    assert called.prompt.messages == [u("Weather?")] and called.turn(0) == CALLED
    assert called.completions == ('weather({"city": "Paris"})',)
    assert [p.messages for p in load_prompts(source)] == [asked, [u("Weather?")]]


def test_calls_of_the_api_read_like_calls_of_a_template(tmp_path):
    """Null content, arguments and tools as JSON, content in parts."""
    call = {**CALL, "function": {"name": "weather", "arguments": '{"city": "Paris"}'}}
    parts = [{"type": "text", "text": "Wea"}, {"type": "text", "text": "ther?"}]
    row = {"prompt": [{"role": "user", "content": parts}, {**a(None), "tool_calls": [call], "refusal": None}, TOOL]}
    (prompt,) = load_prompts(write(tmp_path, row | {"tools": json.dumps(TOOLS)}))
    assert prompt.messages == [u("Weather?"), CALLED, TOOL] and prompt.tools == TOOLS


BAD_MESSAGES = [
    ([{"role": "user", "content": [{"type": "image", "url": "x"}]}], "message 1: part 1 of its content is of the type 'im"),
    ([{"role": "User", "content": "hi"}], "message 1: the role 'User' must be 'user'"),
    ([u("hi"), a(None), u("ho")], "message 2: expected text"),
    ([u("hi"), a("", tool_calls="weather"), u("ho")], "message 2: 'tool_calls' must be a list of objects"),
    ([u("hi"), a("", tool_calls=[{"function": {"name": "\ud800"}}]), u("ho")], "half of a character"),
]  # fmt: skip


@pytest.mark.parametrize(("messages", "message"), BAD_MESSAGES)
def test_a_message_that_cannot_be_read_is_named(tmp_path, messages, message):
    with pytest.raises(UserError, match=r"x\.jsonl, row 1: 'prompt'") as error:
        load_prompts(write(tmp_path, {"prompt": messages}))
    assert message in str(error.value)


def test_tools_that_are_none_are_refused_with_their_row(tmp_path):
    with pytest.raises(UserError, match=r"x\.jsonl, row 1: 'tools' must be a list of objects"):
        load_prompts(write(tmp_path, {"prompt": [u("hi")], "tools": "hammer"}))
    (plain,) = load_prompts(write(tmp_path, {"prompt": "hi", "tools": "hammer"}))
    assert plain.columns["tools"] == "hammer" and plain.tools is None
    (none,) = load_prompts(write(tmp_path, {"id": None, "prompt": [u("hi")], "tools": None}))
    assert none.tools is None and none.id == "x.jsonl:1"


def test_tools_of_plain_rows_are_counted_unless_a_template_reads_them(tmp_path, caplog):
    rows = [{"prompt": "Weather?", "completion": "22", "tools": tools} for tools in (TOOLS, json.dumps(TOOLS), None)]
    source = write(tmp_path, *rows)
    for load in (load_prompts, load_examples):
        caplog.clear()
        load(source)
        assert "2 of 3 rows are plain text with tools: no template shows them" in caplog.text
    caplog.clear()
    chat = DataConfig(train=source, chat=True)
    assert [p.tools for p in load_prompts(source, chat)] == [TOOLS, TOOLS, None]
    assert [(e.prompt.tools, e.completions) for e in load_examples(source, chat)][1] == (TOOLS, ("22",))
    assert not caplog.text


@pytest.mark.parametrize("parquet", [False, True])
@pytest.mark.parametrize("prompt", ["Q", [u("Q")]])
def test_completions_that_people_rejected_are_no_demonstrations(tmp_path, caplog, parquet, prompt):
    def answer(text):
        return text if prompt == "Q" else [a(text)]

    rows = [{"prompt": prompt, "completion": answer(f"y{i}"), "label": i != 1} for i in range(3)]
    source = write(tmp_path, *rows, parquet=parquet)
    with pytest.raises(UserError, match=r"row 2: its 'label' is false: .*\(data\.bad_rows=skip"):
        load_examples(source)
    assert len(load_prompts(source)) == 3
    kept = load_examples(source, DataConfig(train=source, bad_rows="skip"))
    assert [e.completions for e in kept] == [("y0",), ("y2",)] and "1 of 3 rows left out" in caplog.text
