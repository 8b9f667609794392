"""What tells a function, a reward, a model or data from another of the same name."""

import functools
import json
import os
import shutil
import xmlrpc.client

import pytest

from dualign.annotate.endpoints import JudgeReward
from dualign.annotate.function import load_function
from dualign.annotate.settings import FunctionReward, HeadReward
from dualign.common import digests as common
from dualign.common.code_digest import of_function
from dualign.config import build, dump
from dualign.run import digests
from dualign.run.folder import Run
from dualign.trainer import note_fetched
from runs_common import reward_file, write_prompts

SOURCE = '''
import re
K, seen, WEIGHTS = 2.0, [], {"a": 1.0}
def helper(x):
    return x * K
def scored(completions, **columns):
    """The reward."""
    seen.append(len(completions))
    out = []
    for c in completions:
        out.append(helper(len(c)) * WEIGHTS["a"])
    return out
def make(scale, settings):
    calls = 0
    def reward(completions, **columns):
        nonlocal calls
        calls += 1
        return [scale * len(c) * settings["w"] for c in completions]
    return reward
class Reward:
    def __init__(self, scale):
        self.scale, self.calls = scale, 0
    def __call__(self, completions, **columns):
        self.calls += 1
        return [self.scale * len(c) for c in completions]
ones = lambda completions, **columns: [1.0 for c in completions]
'''


def module(source=SOURCE):
    found = {"__name__": "a_users_module"}
    exec(compile(source, "a_users_module.py", "exec"), found)
    return found


CHANGES = [("K, seen, WEIGHTS = 2.0", "K, seen, WEIGHTS = 3.0"), ('{"a": 1.0}', '{"a": 2.0}'), ("x * K", "x + K"),
           ("helper(len(c)) *", "helper(len(c)) +"), ('WEIGHTS["a"])', 'WEIGHTS["a"] + 1)')]  # fmt: skip


@pytest.mark.parametrize(("old", "new"), CHANGES)
def test_a_function_is_its_code_its_helpers_and_their_constants(old, new):
    assert of_function(module(SOURCE.replace(old, new))["scored"]) != of_function(module()["scored"])


def test_comments_lines_and_what_a_function_counts_are_no_part_of_it():
    one, other = module(), module("# a note\n" + SOURCE.replace("out = []", "out = []  # all of them"))
    one["scored"](["a"])
    assert one["seen"] and of_function(one["scored"]) == of_function(other["scored"])
    reward, called = one["make"](2, {"w": 1}), one["Reward"](2)
    before = of_function(reward), of_function(called)
    reward(["a"]), called(["a"])
    assert (of_function(reward), of_function(called)) == before


def test_what_a_function_closes_over_or_holds_is_part_of_it():
    one, other = module(), module()
    same = [("make", (2, {"w": 1})), ("Reward", (2,))]
    assert all(of_function(one[name](*given)) == of_function(other[name](*given)) for name, given in same)
    kinds = [one["make"](2, {"w": 1}), one["make"](3, {"w": 1}), one["make"](2, {"w": 2}), one["Reward"](2),
             one["Reward"](3), functools.partial(one["scored"], n=1), functools.partial(one["scored"], n=2),
             one["ones"], module(SOURCE.replace("1.0 for c", "2.0 for c"))["ones"], one["scored"]]  # fmt: skip
    assert len({of_function(kind) for kind in kinds}) == len(kinds)


def test_a_reward_is_what_decides_its_labels(tmp_path):
    file = tmp_path / "rewards.py"
    file.write_text(SOURCE)
    reward = FunctionReward(path=f"{file}:scored")
    found = digests.of_reward(reward)
    shutil.copy(file, tmp_path / "elsewhere.py")
    assert digests.of_reward(FunctionReward(path=f"{tmp_path / 'elsewhere.py'}:scored", timeout=3.0)) == found
    assert digests.of_reward(FunctionReward(path=f"{file}:ones")) != found
    assert digests.of_reward(FunctionReward(path=f"{file}:scored", weight=2.0)) != found
    file.write_text(SOURCE.replace("x * K", "x + K"))
    assert digests.of_reward(reward) != found
    packaged = FunctionReward(path="dualign.rewards:relevance")
    assert len({digests.of_reward(r) for r in (packaged, HeadReward(), HeadReward(path="builtin:helpful"))}) == 3


def test_a_judge_is_its_name_and_its_rubric(tmp_path):
    from importlib import resources

    shipped = resources.files("dualign.annotate") / "rubrics" / "helpfulness.yaml"
    (tmp_path / "mine.yaml").write_text(shipped.read_text())
    asked = {"base_url": "http://localhost/v1", "model": "m"}
    found = digests.of_reward(JudgeReward(**asked, rubric="helpfulness"))
    mine = JudgeReward(**asked, rubric=str(tmp_path / "mine.yaml"), concurrency=3)
    assert (
        digests.of_reward(mine)
        == found
        != digests.of_reward(JudgeReward(**asked | {"model": "n"}, rubric="helpfulness"))
    )
    (tmp_path / "mine.yaml").write_text(shipped.read_text() + "\n# other words\n")
    assert digests.of_reward(mine) != found


def test_a_model_is_its_weights_settings_tokenizer_and_template(tiny, tmp_path):
    folder = shutil.copytree(tiny, tmp_path / "model")
    found = digests.of_model(str(tiny))
    (folder / "state.json").write_text("{}")
    (folder / "README.md").write_text("of no weight")
    assert digests.of_model(str(folder)) == found and {"model.safetensors", "config.json"} < set(found)
    for name in found:
        kept = (folder / name).read_bytes()
        (folder / name).write_bytes(kept + b" ")
        assert digests.changed(found, digests.of_model(str(folder))).startswith(
            f"{name} (sha256 {found[name][:12]} then"
        )
        (folder / name).write_bytes(kept)


def test_a_hubs_model_is_the_commit_that_is_here(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    found = []
    for commit in ("a" * 40, "b" * 40):
        folder = tmp_path / "models--org--model" / "snapshots" / commit
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
        (tmp_path / "models--org--model" / "refs").mkdir(exist_ok=True)
        (tmp_path / "models--org--model" / "refs" / "main").write_text(commit)
        found.append(digests.of_model("org/model"))
    assert found == [{"commit": "a" * 40}, {"commit": "b" * 40}] and digests.of_model("org/other") == {}
    assert digests.of_model("org/model", "a" * 40) == found[0] and "commit has changed" in digests.changed(*found)


def test_data_are_their_bytes_or_their_rows(tmp_path):
    import datasets

    file = write_prompts(tmp_path)
    found = digests.of_data(str(file))
    moved = shutil.copy(file, tmp_path / "moved.jsonl")
    assert digests.changed(found, digests.of_data(str(moved))) is None
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    for name, given in (("one", rows), ("same", rows), ("other", [*rows[:-1], {**rows[-1], "id": "x"}])):
        datasets.Dataset.from_list(given).save_to_disk(tmp_path / name)
    one, same, other = (digests.of_data(str(tmp_path / name)) for name in ("one", "same", "other"))
    assert one == same and "rows" in digests.changed(one, other)
    file.write_text(file.read_text() + "\n")
    assert "prompts.jsonl has changed" in digests.changed(found, digests.of_data(str(file)))


def test_a_large_file_is_hashed_once_and_again_where_it_may_have_changed(tmp_path, monkeypatch):
    monkeypatch.setenv("DUALIGN_CACHE", str(tmp_path / "cache"))
    read = []
    whole = common.sha256_of
    monkeypatch.setattr(common, "sha256_of", lambda path: read.append(path) or whole(path))
    monkeypatch.setattr(common, "SETTLED", -1.0)
    file = tmp_path / "large.safetensors"
    file.write_bytes(b"a" * common.LARGE)
    first = common.of_file(file)
    assert common.of_file(file) == first and len(read) == 1
    times = os.stat(file)
    file.write_bytes(b"b" * common.LARGE)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))  # as a copy that keeps times
    assert common.of_file(file) != first and len(read) == 2


def test_the_suites_own_reward_has_a_digest():
    assert len(digests.of_reward(FunctionReward(**reward_file()))) == 64


MUTATING = [
    "seen[c.strip()] = len(c)",
    "counts[len(c) % 2] += 1",
    "counts[0], counts[1] = counts[1] + 1, counts[0]",
    "memory.d[c.strip()] = 1; memory.last = c",
    "memory.add(c)",
    "seen.setdefault(c, []).append(1)",
    "helper(c)",
]
STATEFUL = """
seen, counts = {}, [0, 0]
class Memory:
    def __init__(self):
        self.d, self.history, self.scale = {}, [], 1.0
    def add(self, c):
        self.d.setdefault(c, []).append(1); self.history += [c]
memory = Memory()
def helper(c):
    seen[c] = 1
def scored(c):
    CHANGE
    return len(seen) * memory.scale
"""


@pytest.mark.parametrize("change", MUTATING)
def test_what_a_function_keeps_as_it_runs_is_no_part_of_it(change):
    source = STATEFUL.replace("CHANGE", change)
    made = module(source)
    before = of_function(made["scored"])
    made["scored"]("a b")
    assert of_function(made["scored"]) == before
    for old, new in (("self.scale = {}, [], 1.0", "self.scale = {}, [], 2.0"), ("* memory", "+ memory")):
        assert of_function(module(source.replace(old, new))["scored"]) != before


def test_what_answers_anything_or_is_nested_deep_ends_no_run():
    proxy, deep = xmlrpc.client.ServerProxy("http://localhost:1"), None
    for _ in range(3000):
        deep = [deep]
    assert of_function(lambda completions: proxy.score(completions)).count(":") == 1
    assert of_function(lambda completions: deep) == ""
    found = digests.of_rewards([], [lambda completions: deep])
    assert list(found.values()) == [{}]


def test_modules_that_a_reward_imports_are_part_of_it(tmp_path, monkeypatch):
    (tmp_path / "near_reward").mkdir()
    (tmp_path / "near_reward" / "__init__.py").write_text("from . import inner\n")
    (tmp_path / "near_reward" / "inner.py").write_text("import json\ndef score(c):\n    return 1.0\n")
    (tmp_path / "near_helper.py").write_text(
        "import near_reward\ndef score(c):\n    return near_reward.inner.score(c)\n"
    )
    (tmp_path / "unrelated.py").write_text("x = 1\n")
    file = tmp_path / "rewards.py"
    file.write_text(
        "import near_helper\ndef scored(completions):\n    return [near_helper.score(c) for c in completions]\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    function = load_function(f"{file}:scored")

    def imports_within(completions):
        import near_reward.inner

        return [near_reward.inner.score(c) for c in completions]

    both = [FunctionReward(path=f"{file}:scored"), FunctionReward(path="rewards:scored")]
    monkeypatch.chdir(tmp_path)
    then, code = digests.of_rewards(both, [function, imports_within]), of_function(function)
    (tmp_path / "unrelated.py").write_text("x = 2\n")
    assert digests.of_rewards(both, [function, imports_within]) == then
    (tmp_path / "near_reward" / "inner.py").write_text("import json\ndef score(c):\n    return 2.0\n")
    now = digests.of_rewards(both, [function, imports_within])
    assert len(now) == 4 and of_function(function) == code
    for key in now:
        words = digests.changed(then[key], now[key])
        assert "inner.py (sha256" in words and "imported" in words
        alone = {name: sha for name, sha in then[key].items() if "imported" not in name}
        assert digests.changed(alone, now[key]) is None  # not known then


def test_a_hubs_classifier_that_was_fetched_meanwhile_is_noted(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    reward = [{"type": "classifier", "model": "org/judge"}]
    config = build(
        {"model": {"name": "org/m"}, "data": {"train": "p.jsonl"}, "reward": reward, "train": {"online_batches": 1}}
    )
    run = Run(tmp_path / "run")
    run.create(dump(config), [], digests.of_run(config, near=True))
    assert run.about["inputs"]["reward.0.model"] == {}
    repo = tmp_path / "hub" / "models--org--judge"
    (repo / "snapshots" / "c").mkdir(parents=True)
    (repo / "snapshots" / "c" / "config.json").write_text("{}")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("c")
    note_fetched(run, config)
    run.unlock()
    assert run.about["inputs"]["reward.0.model"] == {"commit": "c"}
