"""Results of different judges, prompts and ways of asking have files of their own, each the same every time."""

from __future__ import annotations

from itertools import pairwise

import pytest
import yaml

from dualign.eval.asking import Asking
from dualign.eval.places import place

HOST = "{type: judge, rubric: helpfulness, base_url: http://HOST/v1, model: m}"


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("own.jsonl", "a/rew.py", "b/rew.py", "x/test.jsonl", "y/test.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    config = {"model": {"name": "m"}, "data": {"train": "t.jsonl", "eval": str(tmp_path / "own.jsonl")},
              "train": {"online_batches": 1}, "rollout": {"max_new_tokens": 12}}  # fmt: skip
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(config))
    return tmp_path / "run"


def stem(run, judge="run", prompts=None, second=None, **asked):
    return place("reward", [str(run)], judge, Asking(prompts, **asked), None, second=second).stem


def test_the_usual_has_a_plain_name(run):
    assert stem(run) == "reward-run"
    assert stem(run, "builtin:helpful") == "reward-helpful"
    assert stem(run, prompts="own.jsonl", max_new_tokens=12) == "reward-run-own-jsonl"


def test_what_is_asked_differently_has_another_file(run):
    own = {"prompts": "own.jsonl", "max_new_tokens": 12}
    asked = [
        *({"judge": f"{x}/rew.py:f"} for x in "ab"),
        *({"judge": "run", "prompts": f"{x}/test.jsonl"} for x in "xy"),
        *({"judge": f"{x}/rew.py:f", "prompts": f"{y}/test.jsonl"} for x in "ab" for y in "xy"),
        *({"judge": HOST.replace("HOST", host)} for host in ("one", "two")),
        {"judge": HOST.replace("judge", "preference")},
        *({"second": f"{x}/rew.py:f"} for x in "ab"), {"second": "builtin:helpful"},
        own, own | {"system_prompt": "Be terse."}, own | {"system_prompt": ""}, own | {"k": 2}, own | {"limit": 4},
        own | {"temperature": 0.5}, own | {"chat": True}, own | {"max_new_tokens": 128}, {},
    ]  # fmt: skip
    names = [stem(run, **a) for a in asked]
    assert len(set(names)) == len(names)
    assert names == [stem(run, **a) for a in asked]


def test_a_file_is_the_same_by_whatever_path_it_is_named(run, tmp_path):
    for judge, prompts in (("a/rew.py:f", None), ("run", "x/test.jsonl")):
        whole = [str(tmp_path / name) if name and name != "run" else name for name in (judge, prompts)]
        assert stem(run, judge, prompts) == stem(run, *whole)


@pytest.mark.parametrize("option", [("--second", "{}/rew.py:f"), ("--second", HOST.replace("HOST", "{}"))])
def test_signs_of_cheating_by_different_judges(run, option, monkeypatch):
    from command import dualign as command

    monkeypatch.setattr("dualign.eval.evaluate.open_judge", Opened)
    monkeypatch.setattr("dualign.eval.cheat.trace", lambda *a: [])
    monkeypatch.setattr("dualign.eval.cheat.verdict", lambda table: {"verdict": "none", "signs": []})
    for judge in ("a", "b"):
        assert command("eval", "cheat", run, option[0], option[1].replace("{}", judge)).code == 0
    assert command("eval", "cheat", run).code == 0
    files = sorted(path.stem for path in (run / "eval").glob("*.json"))
    assert len(files) == 3 and "cheat" in files and all(x != y for x, y in pairwise(files))


class Opened:
    def __init__(self, *arguments):
        self.record = dict

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass


def test_benchmarks_by_different_judges_and_ways_of_asking(run):
    from dualign.eval.benchmarks import TOKENS, Putting

    def name(judge=None, limit=None, system=None, chat=True, tokens=TOKENS["alpaca"]):
        putting = Putting(tokens, limit, chat, system)
        return putting.generation(str(run), "p.jsonl", "alpaca-against-x", judge, None)[0].stem

    usual = name()
    assert usual == "alpaca-against-x" and name("builtin:helpful") == f"{usual}-helpful"
    others = [name("a/rew.py:f"), name("b/rew.py:f"), name(limit=3), name(system="Be terse."), name(chat=False),
              name(tokens=8)]  # fmt: skip
    assert len({usual, *others}) == 7 and all(other.startswith(usual) for other in others)
