"""MT-Bench, AlpacaEval and IFEval: the whole path on small files, a tiny model and a judge whose truth is known."""

import json

import pytest
from typer.testing import CliRunner

from dualign.cli import application
from dualign.common.errors import UserError
from dualign.common.types import Label
from dualign.eval import mtbench
from fault_server import FaultServer
from shared import shared

QUESTIONS = [
    {"question_id": 1, "category": "writing", "turns": ["write {answer_2} quality-3", "now quality-8"]},
    {"question_id": 2, "category": "math", "turns": ["1+1? quality-5", "2+2?"], "reference": ["it is 2", "it is 4"]},
]


def judge_prompts():
    single = "[Question]\n{question}\n{ref}[Answer]\n{answer}\nrate as [[5]]"
    multi = "{question_1}|{question_2}|{ref}{answer_1}|{answer_2}"
    return [
        {"name": "single-v1", "system_prompt": "judge", "prompt_template": single.replace("{ref}", "")},
        {"name": "single-math-v1", "system_prompt": "m", "prompt_template": single.replace("{ref}", "{ref_answer_1}")},
        {"name": "single-v1-multi-turn", "system_prompt": "two", "prompt_template": multi.replace("{ref}", "")},
        {"name": "single-math-v1-multi-turn", "system_prompt": "both",
         "prompt_template": multi.replace("{ref}", "{ref_answer_1}|{ref_answer_2}|")},
    ]  # fmt: skip


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run_cli(*arguments):
    return CliRunner().invoke(application(), [str(a) for a in arguments], catch_exceptions=False)


@pytest.fixture
def files(tmp_path):
    return write(tmp_path / "question.jsonl", QUESTIONS), write(tmp_path / "judge_prompts.jsonl", judge_prompts())


def test_references_are_used_where_the_category_has_them_and_answers_are_data(files):
    questions, prompts = mtbench.load_questions(files[0]), mtbench.load_prompts(files[1])
    sly = ("{ref_answer_1} {question}", "second")
    name, asked = mtbench.messages(prompts, questions[0], sly, 1)
    assert name == "single-v1" and asked[0]["content"] == "judge"
    assert "{ref_answer_1} {question}" in asked[1]["content"], "an answer is not a template"
    name, asked = mtbench.messages(prompts, questions[1], ("two", "four"), 2)
    assert name == "single-math-v1-multi-turn" and asked[1]["content"] == "1+1? quality-5|2+2?|it is 2|it is 4|two|four"


@pytest.mark.parametrize(
    ("reply", "value"),
    [
        ("Good. Rating: [[7]]", 7),
        ("[[8.5]]", 8.5),
        ("Rating: [6]", 6),
        ("seven", None),
        ("[[0]]", None),
        ("[[11]]", None),
    ],
)
def test_ratings_follow_fastchats_rule_and_absent_is_no_number(reply, value):
    payload = {"choices": [{"message": {"content": reply}, "finish_reason": "stop"}]}
    assert mtbench.read_rating(payload).value == value


def test_scores_by_category_and_turn():
    questions = [mtbench.Question(str(i), c, ("a", "b"), None) for i, c in enumerate(["x", "x", "y"])]
    ratings = [(Label(8.0), Label(6.0)), (Label(4.0), Label.absent("?")), (Label(1.0), Label(3.0))]
    found = mtbench.table(questions, ratings)
    assert found["rows"]["x"]["turn_1"]["value"] == 6 and found["rows"]["x"]["turn_2"]["value"] == 6
    assert found["rows"]["x"]["both"]["value"] == 5.5 and found["rows"]["all"]["both"]["value"] == pytest.approx(13 / 3)
    assert found["absent"] == 1


def test_mtbench_end_to_end_is_bought_once(files, tiny, tmp_path):
    out = tmp_path / "mt.json"
    with FaultServer(faults=0.0, latency=0.0, reply="Rating: [[7]]") as server:
        judge = json.dumps({"base_url": server.url, "model": "m", "cache": str(tmp_path / "cache.sqlite")})
        arguments = ["eval", "mtbench", tiny, "--judge", judge, "--questions", files[0], "--judge-prompts", files[1],
                     "--max-new-tokens", 8, "--out", out]  # fmt: skip
        done = run_cli(*arguments)
        assert done.exit_code == 0 and server.stats.calls == 4
        run_cli(*arguments)
        assert server.stats.calls == 4
    result = json.loads(out.read_text())
    assert result["rows"]["all"]["both"]["value"] == 7 and set(result["rows"]) == {"all", "writing", "math"}
    assert result["judge"]["temperature"] == 0 and result["judge"]["max_tokens"] == 2048
    rows = [json.loads(line) for line in out.with_suffix(".jsonl").read_text().splitlines()]
    assert [(r["id"], r["turn"], r["rating"]) for r in rows] == [("1", 1, 7), ("1", 2, 7), ("2", 1, 7), ("2", 2, 7)]


def test_bad_files_are_named(tmp_path, files):
    bad = write(tmp_path / "bad.jsonl", [{"question_id": 1, "category": "math", "turns": ["a", "b"]}])
    with pytest.raises(UserError, match=r"bad\.jsonl, row 1: math is graded against references"):
        mtbench.load_questions(bad)
    with pytest.raises(UserError, match=r"question\.jsonl: no judge prompt single-v1"):
        mtbench.load_prompts(files[0])


def test_the_published_mtbench_files_load_as_they_are():
    questions = mtbench.load_questions(shared("data/evaluation/mt_bench_questions.jsonl"))
    prompts = mtbench.load_prompts(shared("data/evaluation/mt_bench_judge_prompts.jsonl"))
    assert len(questions) == 80
    for question in questions:
        for turn in (1, 2):
            name, asked = mtbench.messages(prompts, question, ("ANSWER ONE", "ANSWER TWO"), turn)
            text = asked[1]["content"]
            assert "ANSWER " + ("ONE" if turn == 1 else "TWO") in text and ("math" in name) == bool(question.reference)
            assert "{answer" not in text and "{ref_answer" not in text


def alpaca_file(tmp_path):
    rows = [{"instruction": f"tell {i}", "reference_gpt4_1106_preview": "x" * i} for i in range(4)]
    return write(tmp_path / "alpaca.jsonl", rows)


def test_alpaca_outputs_are_in_its_format_and_scored_by_our_judges(tiny, tmp_path):
    out = tmp_path / "alpaca.json"
    done = run_cli("eval", "alpaca", tiny, "--instructions", alpaca_file(tmp_path), "--judge", f"{__file__}:length",
                   "--max-new-tokens", 8, "--out", out)  # fmt: skip
    assert done.exit_code == 0, done.output
    ours, theirs = (json.loads((tmp_path / f"alpaca-{x}.json").read_text()) for x in ("outputs", "reference"))
    assert [set(r) for r in ours + theirs] == [{"instruction", "output", "generator", "dataset"}] * 8
    assert [r["instruction"] for r in ours] == [r["instruction"] for r in theirs] == [f"tell {i}" for i in range(4)]
    point = json.loads(out.read_text())["systems"][0]["points"][0]
    wins = [1.0 if len(a["output"]) > len(b["output"]) else 0.5 if len(a["output"]) == len(b["output"]) else 0.0
            for a, b in zip(ours, theirs, strict=True)]  # fmt: skip
    assert point["win_rate"]["value"] == pytest.approx(sum(wins) / 4) and point["length_controlled"]["n"] == 4


def test_the_official_package_is_named_where_it_is_missing(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UserError, match="pip install alpaca-eval"):
        run_cli("eval", "alpaca", tiny, "--instructions", alpaca_file(tmp_path), "--official", "any",
                "--max-new-tokens", 4, "--out", tmp_path / "a.json")  # fmt: skip


def length(completions, **columns):
    return [float(len(c[0]["content"] if isinstance(c, list) else c)) for c in completions]


def test_ifeval_checks_instructions_with_the_library():
    pytest.importorskip("lm_eval.tasks.ifeval.utils", reason="lm-eval[ifeval] is not installed")
    from dualign.common.types import Prompt
    from dualign.eval import ifeval
    from dualign.eval.outputs import Answer

    columns = {"instruction_id_list": ["punctuation:no_comma", "length_constraints:number_words"],
               "kwargs": [{}, {"relation": "at least", "num_words": 4}]}  # fmt: skip
    prompt = Prompt("p", ({"role": "user", "content": "?"},), columns)
    rows = ifeval.check([Answer(prompt, "one two three four"), Answer(prompt, "one, two")])
    assert [r["strict"] for r in rows] == [[True, True], [False, False]]
    found = ifeval.table(rows)
    assert found["prompt_strict"]["value"] == 0.5 and found["instruction_strict"] == 0.5 and found["checked"] == 2


def test_ifeval_without_the_library_says_what_to_install(monkeypatch):
    from dualign.eval import ifeval

    monkeypatch.setitem(__import__("sys").modules, "lm_eval.tasks.ifeval", None)
    with pytest.raises(UserError, match=r"pip install 'lm-eval\[ifeval\]'"):
        ifeval.check([])
