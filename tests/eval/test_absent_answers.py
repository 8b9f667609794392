"""One bad row never stops an evaluation or a file: an empty answer is judged, a missing one is absent and counted."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from conftest import make_model, make_tokenizer
from dualign.cli import application
from dualign.common.errors import UserError
from dualign.data.responses import answer_text, load_responses
from dualign.eval.judges import judge_pairs, open_judge
from dualign.eval.outputs import Outputs, grouped, read
from dualign.eval.winrate import measure
from fault_server import FaultServer


def length(completions, **columns):
    return [float(len(c[0]["content"] if isinstance(c, list) else c)) for c in completions]


LENGTH = f"{__file__}:length"


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def cli(*arguments):
    return CliRunner().invoke(application(), [str(a) for a in arguments], catch_exceptions=False)


def ask(i):
    return [{"role": "user", "content": f"question {i}"}]


@pytest.fixture(scope="module")
def mute(tmp_path_factory):
    """A model that answers question 0 with nothing: EOS at once."""
    folder, tokenizer = tmp_path_factory.mktemp("mute"), make_tokenizer()
    model = make_model("llama", len(tokenizer), tokenizer.eos_token_id)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.config.tie_word_embeddings = False
    ids = tokenizer.apply_chat_template(ask(0), add_generation_prompt=True, return_dict=True)["input_ids"]
    with torch.no_grad():
        state = model.model(input_ids=torch.tensor([ids])).last_hidden_state[0, -1]
        model.lm_head.weight[tokenizer.eos_token_id] = state
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def prompts(tmp_path):
    columns = {"reference_gpt4_1106_preview": "an answer"}
    return write(
        tmp_path / "p.jsonl", [{"prompt": ask(i), "instruction": f"question {i}", **columns} for i in range(4)]
    )


def test_an_empty_answer_of_a_model_is_judged(mute, tiny, prompts, tmp_path):
    out = tmp_path / "x.json"
    options = ["--judge", LENGTH, "--max-new-tokens", 6, "--out", out]
    assert cli("eval", "winrate", mute, "--against", tiny, "--prompts", prompts, *options).exit_code == 0
    point = json.loads(out.read_text())["systems"][0]["points"][0]
    assert (point["win_rate"]["n"], point["absent"]) == (4, 0)
    verdicts = [json.loads(line) for line in out.with_suffix(".jsonl").read_text().splitlines()]
    assert verdicts[0]["a"] == "" and verdicts[0]["scores"][0] == 0 and verdicts[0]["value"] == 0
    assert cli("eval", "alpaca", mute, "--instructions", prompts, *options).exit_code == 0
    assert json.loads(out.read_text())["systems"][0]["points"][0]["win_rate"]["n"] == 4
    assert cli("eval", "reward", mute, "--prompts", prompts, *options).exit_code == 0
    assert json.loads(out.read_text())["systems"][0]["points"][0]["reward"]["n"] == 4


def test_mtbench_judges_an_empty_turn_and_counts_one_that_does_not_fit(mute, tmp_path):
    turns = [["question 0", "question 1"], ["question 2", "y" * 300]]
    questions = write(
        tmp_path / "q.jsonl", [{"question_id": i, "category": "writing", "turns": t} for i, t in enumerate(turns)]
    )
    names = ("single-v1", "single-math-v1", "single-v1-multi-turn", "single-math-v1-multi-turn")
    texts = {"system_prompt": "s", "prompt_template": "{question}{question_1} {answer}{answer_1} rate as [[5]]"}
    judge_prompts = write(tmp_path / "jp.jsonl", [{"name": name, **texts} for name in names])
    out = tmp_path / "mt.json"
    with FaultServer(faults=0.0, latency=0.0, reply="[[7]]") as server:
        judge = json.dumps({"base_url": server.url, "model": "m", "cache": str(tmp_path / "c.sqlite")})
        done = cli("eval", "mtbench", mute, "--judge", judge, "--questions", questions, "--judge-prompts", judge_prompts,
                   "--max-new-tokens", 8, "--out", out)  # fmt: skip
        assert done.exit_code == 0 and server.stats.calls == 3
    result = json.loads(out.read_text())
    assert result["absent"] == 1 and "exceed the model's context of 256" in result["absent_reasons"][0]
    rows = [json.loads(line) for line in out.with_suffix(".jsonl").read_text().splitlines()]
    assert rows[0]["answer"] == "" and [row["rating"] for row in rows] == [7, 7, 7, None]
    assert rows[3]["answer"] is None and result["rows"]["all"]["turn_2"]["n"] == 1


def test_prompts_beyond_the_context_are_absent_and_counted(tiny, tmp_path):
    prompts = write(tmp_path / "p.jsonl", [{"prompt": "y" * n} for n in (5, 400, 6)])
    out = tmp_path / "x.json"
    options = ["--judge", LENGTH, "--prompts", prompts, "--max-new-tokens", 6, "--out", out]
    assert cli("eval", "reward", tiny, *options).exit_code == 0
    point = json.loads(out.read_text())["systems"][0]["points"][0]
    assert (point["reward"]["n"], point["absent"]) == (2, 1)
    done = cli("sample", tiny, prompts, "--max-new-tokens", 6, "--out", tmp_path / "s.jsonl")
    assert "1 of 3 prompts cannot be asked" in done.stdout
    assert len((tmp_path / "s.jsonl").read_text().splitlines()) == 2
    write(prompts, [{"prompt": "y" * 400}])
    for command in (["eval", "reward", tiny, *options], ["sample", tiny, prompts]):
        with pytest.raises(UserError, match=r"exceed the model's context of 256 \(fewer new ones: --max-new-tokens\)"):
            cli(*command)


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_null_and_missing_outputs_are_absent_empty_ones_judged(name, tmp_path):
    question, answer = ("instruction", "output") if name == "a.json" else ("prompt", "completion")
    rows = [{question: f"q{i}", answer: text} for i, text in enumerate(["long", "", None, 7])]
    rows += [{question: "q4"}, {question: None, answer: "a row without a prompt"}]
    file = tmp_path / name
    file.write_text(json.dumps(rows) if name == "a.json" else "".join(json.dumps(row) + "\n" for row in rows))
    theirs = write(tmp_path / "b.jsonl", [{"prompt": f"q{i}", "completion": "no"} for i in range(5)])
    a, b = (Outputs(f.name, grouped(read(f))) for f in (file, theirs))
    pairs = {p.prompt.text: p for p in judge_pairs(open_judge(LENGTH), a, b)}
    assert [pairs[f"q{i}"].value for i in range(5)] == [1, 0, None, None, None]
    found = measure(a, b, list(pairs.values()))
    assert (found["won"], found["lost"], found["absent"], found["win_rate"]["n"]) == (1, 1, 3, 2)
    assert all(answer in reason for reason in found["absent_reasons"])


def test_a_file_without_any_answer_is_refused(tmp_path):
    file = write(tmp_path / "a.jsonl", [{"prompt": "q", "completion": None}])
    with pytest.raises(UserError, match=r"none of its rows has an answer; the first, a\.jsonl:1: completion is null"):
        cli("eval", "reward", file, "--judge", LENGTH, "--out", tmp_path / "x.json")


LAYOUTS = {
    "response": lambda a, b: {"prompt": "q", "response_a": a, "response_b": b, "label": "a"},
    "preference": lambda a, b: {"prompt": ask(1), "chosen": a, "rejected": b},
    "conversations": lambda a, b: {"chosen": [*ask(1), {"role": "assistant", "content": a}],
                                   "rejected": [*ask(1), {"role": "assistant", "content": b}]},
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_keeps_rows_whose_answer_is_empty_or_absent(layout, tmp_path):
    pairs = [("one", "two"), ("", "two"), ("one", None), (" ", "")]
    rows = load_responses(str(write(tmp_path / "r.jsonl", [LAYOUTS[layout](*pair) for pair in pairs])))
    assert [tuple(row.texts.values()) for row in rows] == pairs
    assert [bool(row.absent) for row in rows] == [False, False, True, False]
    assert len({row.prompt.text for row in rows}) == 1


def said(text):
    return {"role": "assistant", "content": text}


SEVERAL = [*ask(1), said("A1"), *ask(2)]
PAIRS = {"response": ("response_a", "response_b"), "preference": ("chosen", "rejected")}


@pytest.mark.parametrize("names", PAIRS)
@pytest.mark.parametrize("prompt", ["question 1", ask(1)])
def test_answers_that_are_conversations_keep_their_turns(names, prompt, tmp_path):
    a, b = PAIRS[names]
    rows = [
        {"prompt": prompt, a: [*SEVERAL, said("x")], b: [*SEVERAL, said("y")]},
        {"prompt": prompt, a: [*SEVERAL, said("x")], b: None},
        {"prompt": prompt, a: [*SEVERAL[1:], said("x")], b: [*SEVERAL, said("")]},
    ]
    found = load_responses(str(write(tmp_path / "r.jsonl", rows)))
    assert [row.prompt.messages for row in found] == [SEVERAL] * 3
    assert [tuple(row.texts.values()) for row in found] == [("x", "y"), ("x", None), ("x", "")]


OTHERS = {
    "another question": ([*ask(3), said("x")], [*ask(1), said("y")], "is of another conversation than 'prompt'"),
    "other turns": ([*SEVERAL, said("x")], [*ask(1), said("B1"), *ask(2), said("y")], "differ before their last"),
    "more turns": ([*SEVERAL, said("x")], "y", "differ before their last"),
}


@pytest.mark.parametrize("names", PAIRS)
@pytest.mark.parametrize("case", OTHERS)
def test_answers_to_another_conversation_are_left_out_and_counted(names, case, tmp_path, caplog):
    (a, b), (first, second, told) = PAIRS[names], OTHERS[case]
    rows = [{"prompt": ask(1), a: [said("x")], b: "y"}, {"prompt": ask(1), a: first, b: second}]
    found = load_responses(str(write(tmp_path / "r.jsonl", rows)))
    assert [(r.prompt.messages, tuple(r.texts.values())) for r in found] == [(ask(1), ("x", "y"))]
    assert "1 of 2 rows left out" in caplog.text and "row 2: " in caplog.text and told in caplog.text


def test_answers_in_parts_and_tool_calls_are_text():
    assert (
        answer_text([{"role": "assistant", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}])[
            0
        ]
        == "ab"
    )
    call = {"function": {"name": "look", "arguments": {}}}
    assert "look" in answer_text([{"role": "assistant", "content": None, "tool_calls": [call]}])[0]
    assert answer_text([{"role": "user", "content": "?"}])[1] == "does not end with the assistant's message"
    assert "half of a character" in answer_text("x\ud800")[1]


def test_judge_labels_empty_responses_and_counts_absent_ones(tmp_path):
    rows = [{"id": str(i), "prompt": "q", "response_a": a, "response_b": b, "label": "a"}
            for i, (a, b) in enumerate([("quality-9", "quality-2"), ("", "quality-3"), (None, "quality-4")])]  # fmt: skip
    file, out = write(tmp_path / "r.jsonl", rows), tmp_path / "out.jsonl"
    with FaultServer(faults=0.0, latency=0.0) as server:
        options = [
            "--rubric",
            "helpfulness",
            "--base-url",
            server.url,
            "--model",
            "m",
            "--set",
            f"cache={tmp_path / 'c'}",
        ]
        told = cli("judge", file, *options, "--out", out).stdout
        found = [json.loads(line) for line in out.read_text().splitlines()]
        assert server.stats.calls == 5, "the empty one was asked for"
        assert [r["completion"] for r in found[2:5]] == ["", "quality-3", None] and found[4]["reward"] is None
        assert "absent: 1 × response_a is null or missing" in told
        told = cli("judge", file, *options, "--pairs", "--out", out).stdout
        assert [json.loads(line)["value"] for line in out.read_text().splitlines()][::2] == [1.0, None]
        numbers = tmp_path / "a.json"
        assert "1 of 3 pairs cannot be compared" in cli("agreement", file, *options, "--out", numbers).stdout
    (report,) = json.loads(numbers.read_text())
    longer = report["labellers"][0]
    assert (longer["pairs"], longer["share"], longer["absent"], report["rows"]) == (2, 0.25, 1, 3)


def test_reward_score_writes_null_for_an_absent_answer(tmp_path):
    pytest.importorskip("dualign.annotate.head")
    rows = [{"id": "a", "prompt": "q", "completion": "text"}, {"id": "b", "prompt": "q", "completion": ""},
            {"id": "c", "prompt": "q", "completion": None}]  # fmt: skip
    out = tmp_path / "out.jsonl"
    told = cli("reward", "score", write(tmp_path / "r.jsonl", rows), "--out", out).stdout
    found = {row["id"]: row["reward"] for row in map(json.loads, out.read_text().splitlines())}
    assert isinstance(found["a"], float) and isinstance(found["b"], float) and found["c"] is None
    assert "2 completions" in told and "1 absent: completion is null or missing" in told


def test_messages_name_the_options_that_a_command_has(tiny, tmp_path):
    """No recipe's key where there is no recipe."""
    other = write(tmp_path / "o.jsonl", [{"question": "a"}, {"question": "b"}])
    commands = [["sample", tiny, other], ["eval", "reward", tiny, "--prompts", other, "--judge", LENGTH],
                ["eval", "winrate", tiny, "--against", tiny, "--prompts", other, "--judge", LENGTH]]  # fmt: skip
    for command in commands:
        with pytest.raises(UserError, match="--prompt-column") as told:
            cli(*command)
        assert "bad_rows" not in str(told.value)
        assert "--prompt-column" in cli(*command[: 1 + (command[0] == "eval")], "--help").stdout
    cli("sample", tiny, other, "--prompt-column", "question", "--max-new-tokens", 4, "--out", tmp_path / "s.jsonl")
    assert len((tmp_path / "s.jsonl").read_text().splitlines()) == 2
    with pytest.raises(UserError) as told:
        cli("sample", tmp_path / "nowhere", "hello")
    assert not str(told.value).startswith("model.name")
    plain = tmp_path / "plain"
    AutoModelForCausalLM.from_pretrained(tiny).save_pretrained(plain)
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(plain)
    with pytest.raises(UserError, match="no chat template: put one into its folder"):
        cli("sample", plain, "hello")


def test_ifeval_checks_empty_answers_and_counts_absent_ones(monkeypatch):
    from types import SimpleNamespace

    from dualign.common.types import Prompt
    from dualign.eval import ifeval
    from dualign.eval.outputs import Answer

    def process_results(doc, texts):
        followed = [bool(texts[0])] * len(doc["instruction_id_list"])
        return {"inst_level_strict_acc": followed, "inst_level_loose_acc": followed}

    monkeypatch.setattr(ifeval, "library", lambda: SimpleNamespace(process_results=process_results))
    columns = {"instruction_id_list": ["one", "two"], "kwargs": [{}, {}]}
    asked, bare = Prompt("p", "q", columns), Prompt("bare", "q", {"instruction_id_list": ["one"]})
    answers = [Answer(asked, "text"), Answer(asked, ""), Answer(asked, "", absent="it is null"), Answer(bare, "text")]
    found = ifeval.table(ifeval.check(answers))
    assert (found["checked"], found["absent"], found["prompt_strict"]["value"]) == (2, 2, 0.5)
    assert found["absent_reasons"] == ["it is null", "kwargs is null or missing"]
    with pytest.raises(UserError, match="in no row of the prompts"):
        ifeval.check([Answer(bare, "text")])
