"""Rows that a chat template or a model does not take: the row and the reason, left out and counted where that is asked
for, and no folder that refuses the mended command."""

from __future__ import annotations

import json

import pytest

import dualign
from conftest import TEMPLATE, make_model, make_tokenizer
from dualign import data
from dualign.common.errors import UserError
from runs_common import tree, vowels

U, A = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}
S = {"role": "system", "content": "Be brief."}
STRICT = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + TEMPLATE


def model(folder, template=STRICT, extra=()):
    """Its tokenizer has `extra` tokens that the model has no row for."""
    tokenizer = make_tokenizer()
    made = make_model("llama", len(tokenizer), tokenizer.eos_token_id)
    tokenizer.add_special_tokens({"additional_special_tokens": [*extra]})
    tokenizer.chat_template = template
    made.save_pretrained(folder / "m")
    tokenizer.save_pretrained(folder / "m")
    return folder / "m"


def config(folder, path, rows, algo="rloo", **section):
    source = folder / "rows.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = tree(path, source, folder / "run", {"name": algo}, online_batches=1, online_batch=4, update_size=4)
    config["data"] = {"train": str(source), **section}
    return config


FAULTS = {
    "a role": ([{"prompt": [U]}, {"prompt": [S, U]}], STRICT, "rows.jsonl, row 2: .*System role not supported"),
    "a syntax error": (
        [{"prompt": [U]}],
        "{% for m in messages %}{{ m.content }",
        "row 1: .*syntax error in its line 1",
    ),
    "a field": ([{"prompt": [U]}], "{{ messages[0].content.items() }}", "row 1: .*has no attribute 'items'"),
    "a token": ([{"prompt": [U]}, {"prompt": "<|new|>"}], TEMPLATE, "row 2: the token '<|new|>' has the id 260"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_the_row_and_the_reason_and_the_mended_command_runs(tmp_path, case):
    rows, template, message = FAULTS[case]
    path = model(tmp_path, template, ("<|new|>",))
    with pytest.raises(UserError, match=message.replace("|", r"\|")) as error:
        dualign.train(config(tmp_path, path, rows), reward=vowels, quiet=True)
    assert "data.bad_rows=skip" in str(error.value) and not (tmp_path / "run").exists()
    mended = config(tmp_path, path, [{"prompt": "hi"}])
    assert dualign.train(mended, reward=vowels, quiet=True).read_batch(0) is not None


@pytest.mark.parametrize("algo", ["rloo", "sft"])
def test_rows_that_are_refused_are_left_out_and_counted(tmp_path, capsys, algo):
    rows = [{"prompt": [U], "completion": [A]}, {"prompt": [S, U], "completion": [A]}]
    asked = config(tmp_path, model(tmp_path), rows, algo, bad_rows="skip")
    batch = dualign.train(asked, reward=vowels).read_batch(0)
    assert {row.rollout.prompt.messages[0]["role"] for row in batch.rows} == {"user"}
    said = " ".join(capsys.readouterr().out.split())
    assert "left out 1 of 2 rows that cannot be used; the first:" in said and "System role not supported" in said
    none = config(tmp_path, tmp_path / "m", rows[1:], algo, bad_rows="skip") | {"run": {"dir": str(tmp_path / "none")}}
    with pytest.raises(UserError, match=r"none of 1 rows can be used; .*System role"):
        dualign.train(none, reward=vowels, quiet=True)


def test_an_unforeseen_error_before_sampling_leaves_no_folder(tmp_path, monkeypatch):
    from dualign.training.source import OnlineSource

    asked = config(tmp_path, model(tmp_path), [{"prompt": [U]}])
    with monkeypatch.context() as patched:
        patched.setattr(OnlineSource, "ask", lambda *a, **k: [][0])
        with pytest.raises(IndexError):
            dualign.train(asked, reward=vowels, quiet=True)
    assert not (tmp_path / "run").exists()
    dualign.train(asked, reward=vowels, quiet=True)


def test_plain_words_are_no_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text("{}\n")
    for words in (
        "Is 3/4 bigger than .5?",
        "and/or",
        "3/4",
        "What is in package.json",
        "x" * 5000,
        "~5",
        "...",
        "/ or \\",
    ):
        assert not data.names_data(words)
    for words in ("rows.jsonl", "missing.jsonl", "./missing", "~/missing", "/missing", "builtin:quickstart", "."):
        assert data.names_data(words)
