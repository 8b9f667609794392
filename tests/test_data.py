"""Rows of every layout become the same prompts and completions; what is wrong is named by file, row and column."""

from __future__ import annotations

import csv
import gzip
import json
from datetime import datetime, timedelta
from decimal import Decimal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dualign.common.errors import UserError
from dualign.data.rows import load_examples, load_prompts
from dualign.data.settings import DataConfig
from shared import shared

USER = [{"role": "user", "content": "hi"}]
REPLY = [{"role": "assistant", "content": "hello"}]
OTHER = [{"role": "assistant", "content": "go away"}]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet"])
def test_every_file_kind_reads_the_same(tmp_path, suffix):
    rows = [{"id": "a", "prompt": USER, "n": 1}, {"id": "b", "prompt": USER, "n": 2}]
    path = tmp_path / f"x{suffix}"
    text = "\n".join(map(json.dumps, rows)) if "jsonl" in suffix else json.dumps(rows)
    if suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_bytes(gzip.compress(text.encode()) if suffix.endswith("gz") else text.encode())
    prompts = load_prompts(str(path))
    assert [(p.id, p.content, p.columns["n"]) for p in prompts] == [("a", tuple(USER), 1), ("b", tuple(USER), 2)]


def test_a_csv_is_text_under_the_names_of_its_first_line(tmp_path):
    rows = [{"prompt": "Wo, 'ist' \"Käse\"?\nSag es!", "n": "01"}, {"prompt": "什么是爱？", "n": ""}]
    path = tmp_path / "x.csv"
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["prompt", "n"])
        writer.writeheader()
        writer.writerows(rows)
    assert [{"prompt": p.content, "n": p.columns["n"]} for p in load_prompts(str(path))] == rows


def test_a_text_in_a_csv_may_be_long(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text(f"prompt,n,,\n{'a' * 200_000},1,,\n")
    assert len(load_prompts(str(path))[0].content) == 200_000


def test_a_label_that_a_csv_calls_false_is_false(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text("prompt,completion,label\na,b,True\na,c,False\n")
    with pytest.raises(UserError, match="row 2: its 'label' is false"):
        load_examples(str(path))


LAYOUTS = {
    "conversational": {"prompt": USER, "chosen": REPLY, "rejected": OTHER},
    "implicit": {"chosen": USER + REPLY, "rejected": USER + OTHER},
    "whole conversations beside the prompt": {"prompt": USER, "chosen": USER + REPLY, "rejected": USER + OTHER},
    "plain prompt, conversational answers": {"prompt": "hi", "chosen": REPLY, "rejected": OTHER},
    "transcripts": {
        "chosen": "\n\nHuman: hi\n\nAssistant: hello",
        "rejected": "\n\nHuman: hi\n\nAssistant: go away",
    },
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_preference_layout_gives_the_same_pair(tmp_path, layout):
    (example,) = load_examples(write(tmp_path / "x.jsonl", [LAYOUTS[layout]]))
    assert example.prompt.content == tuple(USER)
    assert example.completions == ("hello", "go away")
    assert example.prompt.id == "x.jsonl:1"


def test_plain_layouts(tmp_path):
    pair = {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."}
    implicit = {"chosen": "The sky is blue.", "rejected": "The sky is black."}
    for row, want in ((pair, (" blue.", " green.")), (implicit, (" blue.", " black."))):
        (example,) = load_examples(write(tmp_path / "x.jsonl", [row]))
        assert example.prompt.content == "The sky is" and example.completions == want
    (demo,) = load_examples(write(tmp_path / "x.jsonl", [{"prompt": "2+2=", "completion": "4", "answer": 4}]))
    assert demo.completions == ("4",) and demo.prompt.columns["answer"] == 4


def test_transcript_of_several_turns(tmp_path):
    start = "\n\nHuman: a\n\nAssistant: b\nHuman: not a turn\n\nHuman: c\n\nAssistant:"
    (example,) = load_examples(write(tmp_path / "x.jsonl", [{"chosen": start + " d", "rejected": start + " e"}]))
    assert [m["content"] for m in example.prompt.messages] == ["a", "b\nHuman: not a turn", "c"]
    assert example.completions == ("d", "e")
    source = write(tmp_path / "p.jsonl", [{"prompt": start}])
    assert load_prompts(source, DataConfig(train=source, format="hh"))[0].messages == example.prompt.messages


def test_plain_text_is_a_users_message_where_asked(tmp_path):
    source = write(tmp_path / "p.jsonl", [{"prompt": "hi"}, {"prompt": [{"role": "user", "content": "ho"}]}])
    plain = load_prompts(source, DataConfig(train=source))
    chat = load_prompts(source, DataConfig(train=source, chat=True, system_prompt="be kind"))
    assert [p.conversational for p in plain] == [False, True] and plain[0].content == "hi"
    assert [[m["role"] for m in p.messages] for p in chat] == [["system", "user"]] * 2
    assert [p.messages[-1]["content"] for p in chat] == ["hi", "ho"]


def test_system_prompt_only_where_there_is_none(tmp_path):
    own = [{"role": "system", "content": "own"}, *USER]
    source = write(tmp_path / "x.jsonl", [{"prompt": USER}, {"prompt": own}, {"prompt": "plain"}])
    prompts = load_prompts(source, DataConfig(train=source, system_prompt="be kind"))
    assert prompts[0].messages[0] == {"role": "system", "content": "be kind"}
    assert prompts[1].messages == own and prompts[2].content == "plain"


def test_data_set_folder(tmp_path):
    import datasets

    datasets.DatasetDict({"test": datasets.Dataset.from_list([{"prompt": "x", "n": 3}])}).save_to_disk(tmp_path / "d")
    (prompt,) = load_prompts(str(tmp_path / "d"), split="test")
    assert prompt.content == "x" and prompt.columns == {"n": 3}
    with pytest.raises(UserError, match="train"):
        load_prompts(str(tmp_path / "d"))


def test_builtin_prompts():
    train, test = (load_prompts("builtin:quickstart", split=s) for s in ("train", "test"))
    assert [p.id for p in load_prompts("builtin:quickstart/test")] == [p.id for p in test]
    assert len(train) >= 200 and not {p.text for p in train} & {p.text for p in test}
    with pytest.raises(UserError, match="builtin:quickstart/test"):
        load_prompts("builtin:quickstrt")


BAD_ROWS = [
    ({"prompt": ""}, "row 2: 'prompt' is empty"),
    ({"prompt": []}, "row 2: 'prompt' is empty"),
    ({"prompt": [{"role": "user", "content": " "}]}, "row 2: 'prompt' ends with an empty message"),
    ({"prompt": 3}, "row 2: 'prompt' must be text or a list of messages, got a value of type int"),
    ({"prompt": None}, "null"),
    ({"prompt": ["hi"]}, "message 1"),
    ({"prompt": [{"role": "user", "content": None}]}, "message 1"),
    ({"prompt": [{"role": "Human", "content": "hi"}]}, "message 1: the role 'Human' must be 'user'"),
    ({"prompt": USER + REPLY}, "row 2: 'prompt' ends with the assistant's turn"),
    ({"promt": "x"}, "no column 'prompt'; its columns are promt; did you mean 'promt'"),
    ([1], "row 2: expected an object"),
]


@pytest.mark.parametrize(("row", "message"), BAD_ROWS)
def test_bad_prompt_row_is_named(tmp_path, row, message):
    with pytest.raises(UserError, match=r"x\.jsonl, row 2") as error:
        load_prompts(write(tmp_path / "x.jsonl", [{"prompt": "fine"}, row]))
    assert message in str(error.value)


BAD_PAIRS = [
    ({"prompt": "a", "chosen": "b"}, "'rejected'"),
    ({"prompt": "a", "chosen": "", "rejected": "c"}, "'chosen' is empty"),
    ({"prompt": "a", "chosen": USER, "rejected": REPLY}, "'chosen' must end with the assistant's message"),
    ({"chosen": USER + REPLY, "rejected": OTHER}, "differ before their last message"),
    ({"chosen": "one", "rejected": "two"}, "no beginning in common"),
]


@pytest.mark.parametrize(("row", "message"), BAD_PAIRS)
def test_bad_pair_is_named(tmp_path, row, message):
    source = write(tmp_path / "x.jsonl", [row])
    with pytest.raises(UserError) as error:
        load_examples(source, DataConfig(train=source, format="preference"))
    assert message in str(error.value) and "row 1" in str(error.value)


def test_bad_files(tmp_path):
    (tmp_path / "broken.jsonl").write_text('{"prompt": "a"}\n{"prompt": \n')
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "bytes.jsonl").write_bytes(b'{"prompt": "\xff"}')
    (tmp_path / "zip.jsonl.gz").write_bytes(b"not gzip")
    (tmp_path / "x.parquet").write_bytes(b"not parquet")
    (tmp_path / "one.json").write_text('{"prompt": "a"}')
    (tmp_path / "notes.txt").write_text("a")
    (tmp_path / "short.csv").write_text("prompt,topic\na,b\nc\n")
    (tmp_path / "twice.csv").write_text("prompt,prompt\na,b\n")
    (tmp_path / "quote.csv").write_text('prompt\n"a\n')
    for name, message in [
        ("broken.jsonl", "row 2: not JSON"),
        ("empty.jsonl", "no rows"),
        ("bytes.jsonl", "not UTF-8 .byte 0xff."),
        ("zip.jsonl.gz", "cannot be read"),
        ("x.parquet", "Parquet"),
        ("one.json", "one list of rows"),
        ("notes.txt", "cannot tell its kind"),
        ("short.csv", "row 2: not as many values"),
        ("twice.csv", "names the column 'prompt' twice"),
        ("quote.csv", "cannot be read"),
        ("brken.jsonl", "did you mean"),
    ]:
        with pytest.raises(UserError, match=message) as error:
            load_prompts(str(tmp_path / name))
        assert name in str(error.value)


def test_examples_need_completions(tmp_path):
    with pytest.raises(UserError, match="chosen and rejected, or completion"):
        load_examples(write(tmp_path / "x.jsonl", [{"prompt": "a"}]))


def test_real_files():
    pairs = load_examples(str(shared("data/preferences/hh_harmless_train.jsonl.gz")))
    assert len(pairs) == 1493 and all(e.prompt.messages[-1]["role"] == "user" for e in pairs)
    maths = load_prompts(str(shared("data/prompts/gsm8k_test.jsonl")))
    assert len(maths) == 200 and all("answer" in p.columns for p in maths)


def test_bad_rows_are_left_out_and_counted_where_that_is_asked_for(tmp_path, caplog):
    good = {"prompt": "a", "chosen": "b", "rejected": "c"}
    source = write(tmp_path / "x.jsonl", [good, good | {"chosen": ""}, good, good | {"rejected": 3}])
    config = DataConfig(train=source, bad_rows="skip")
    assert [p.id for p in load_prompts(source, config)] == ["x.jsonl:1", "x.jsonl:3"]
    assert len(load_examples(source, config)) == 2
    assert "2 of 4 rows left out" in caplog.text and "row 2: 'chosen' is empty" in caplog.text
    with pytest.raises(UserError, match="bad_rows=skip"):
        load_examples(source)
    worse = write(tmp_path / "y.jsonl", [good | {"chosen": ""}])
    with pytest.raises(UserError, match="none of its 1 rows"):
        load_examples(worse, DataConfig(train=worse, bad_rows="skip"))


def test_one_kind_of_the_shipped_prompts():
    everything = load_prompts("builtin:quickstart/test")
    kinds = {kind: load_prompts(f"builtin:quickstart/test/{kind}") for kind in ("everyday", "decline")}
    assert {k: len(v) for k, v in kinds.items()} == {"everyday": 53, "decline": 35} and len(everything) == 88
    assert all(p.columns["kind"] == kind for kind, prompts in kinds.items() for p in prompts)
    with pytest.raises(UserError, match="its kinds are decline, everyday"):
        load_prompts("builtin:quickstart/test/rude")
    with pytest.raises(UserError, match="no such data"):
        load_prompts("builtin:quickstart/tset/everyday")


@pytest.mark.parametrize("way", ["parquet", "data set"])
def test_values_that_json_has_no_type_for_are_the_same_wherever_they_are_read(tmp_path, way):
    import datasets

    day = datetime(2024, 5, 6, 7, 8, 9)
    row = {"prompt": "x", "n": Decimal("2.50"), "day": day.date(), "at": day, "took": timedelta(minutes=1),
           "raw": b"caf\xc3\xa9", "bytes": b"\xff\x00", "deep": [{"n": Decimal("0.25"), "none": None}]}  # fmt: skip
    path = tmp_path / "x.parquet"
    pq.write_table(pa.Table.from_pylist([row]), path)
    if way == "data set":
        datasets.Dataset(pa.Table.from_pylist([row])).save_to_disk(tmp_path / "d")
    (prompt,) = load_prompts(str(path if way == "parquet" else tmp_path / "d"))
    assert prompt.columns == {
        "n": 2.5, "day": "2024-05-06", "at": "2024-05-06T07:08:09", "took": 60.0, "raw": "café", "bytes": "ff00",
        "deep": [{"n": 0.25, "none": None}],
    }  # fmt: skip
    assert json.loads(json.dumps(prompt.columns)) == prompt.columns
