"""Reward settings: what they say of themselves, and rewards that are given to `train` in Python."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import yaml
from pydantic import Field

import dualign
from command import dualign as command
from dualign.annotate import BatchSession, Label, RewardSettings, annotator_of, build
from dualign.annotate.endpoints import JudgeReward, PreferenceReward, ServedReward
from dualign.annotate.registry import REWARDS
from dualign.annotate.settings import FunctionReward, HeadReward
from dualign.common.errors import UserError
from dualign.config import build as configuration
from dualign.config import differences, dump
from dualign.run.folder import Run
from runs_common import metrics, reward_file, tree, vowels, write_prompts

ASKED = {"base_url": "http://localhost/v1", "model": "m", "price_prompt": 1.0, "price_completion": 2.0}


class Length(RewardSettings):
    """Longer is better."""

    scale: float = Field(1.0, description="per character")

    def build(self, run_dir=None):
        return lambda completions, **columns: [self.scale * len(c[-1]["content"]) for c in completions]


class Fixed:
    """An annotator that is no function."""

    name = "fixed"

    def __init__(self, value):
        self.value, self.closed = value, False

    def open(self):
        return BatchSession(lambda items: [Label(self.value + item.index % 3) for item in items])

    def close(self):
        self.closed = True


def test_settings_tell_their_price_and_what_they_are_made_of():
    judge = JudgeReward(**ASKED, rubric="helpfulness", samples=2, temperature=1.0, max_tokens=100)
    assert judge.dollars(1000) == 2 * 1000 * (600 * 1.0 + 100 * 2.0) / 1e6
    words = "judge, weight 1.0, at most about 1.60 dollars for 2000 calls (assuming 600 prompt tokens each)"
    assert judge.describe(1000) == words
    assert ServedReward(**ASKED).dollars(1000) == 0.6 and HeadReward().describe(5) == "head, weight 1.0"
    made_of = {"judge": ["rubric"], "served": [], "head": ["path"]}
    every = {"judge": judge, "served": ServedReward(**ASKED), "head": HeadReward()}
    assert {kind: list(settings.made_of()) for kind, settings in every.items()} == made_of
    assert [kind for kind, settings in REWARDS.items() if settings.compares] == ["preference"]


def test_settings_need_no_torch():
    code = "import sys, dualign.annotate.settings; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_configuration_with_a_type_of_ones_own_is_written_and_read_again(tiny, tmp_path):
    (tmp_path / "mine.py").write_text(
        "from dualign.annotate import RewardSettings\nfrom dualign.annotate.settings import HeadReward\n"
        "class Mine(RewardSettings):\n    n: int = 3\n    def build(self):\n        return None\n"
        "class Nothing(RewardSettings):\n    def build(self, run_dir=None):\n        return 5\n"
        "class MyHead(HeadReward):\n    scale: float = 1.0\n"
    )
    config = tree(tiny, write_prompts(tmp_path), tmp_path / "run", {"name": "dar"})
    mine = {"type": f"{tmp_path}/mine.py:Mine", "n": 4, "weight": 2.0}
    read = configuration(config | {"reward": [mine, {"type": f"{tmp_path}/mine.py:MyHead"}]})
    again = configuration(yaml.safe_load(dump(read)))
    assert not differences(read, again) and again.reward[0].n == 4
    assert set(again.reward[1].made_of()) == {"type", "path"} and again.reward[1].scale == 1.0
    for name, words in (("Mine", r"mine.py:Mine, build\(run_dir\) raised TypeError"), ("Nothing", "value of type int")):
        with pytest.raises(UserError, match=words):
            configuration(config | {"reward": [{"type": f"{tmp_path}/mine.py:{name}"}]}).reward[0].check()
    with pytest.raises(UserError, match=r"reward\.0: Length has no place to be found again"):
        configuration(config | {"reward": [Length()]})
    assert configuration(config | {"reward": [HeadReward()]}).reward[0] == HeadReward()


def test_rewards_of_every_kind_are_given_to_train(tiny, tmp_path):
    config = tree(tiny, write_prompts(tmp_path), tmp_path / "run", {"name": "dar"}, online_batches=1)
    more = {**config, "train": {**config["train"], "online_batches": 2}}
    mine = Length(scale=0.5, weight=2.0)
    given = [vowels, fixed := Fixed(1.0), mine, FunctionReward(**reward_file("whitened"))]
    run = dualign.train(config, reward=given, quiet=True)
    assert fixed.closed and run.functions == ["vowels", "fixed"]
    assert [r.type for r in run.config.reward] == [f"{__file__}:Length", "function"]
    row = run.read_batch(0).rows[0]
    assert set(row.label.parts) == {"vowels", "fixed", "Length", "whitened"}
    assert row.label.parts["Length"] == 0.5 * len(row.rollout.text)
    for other in (Length(scale=1.0, weight=2.0), Length(scale=0.5)):
        with pytest.raises(UserError, match=r"reward\.0\.(scale|weight) cannot change on resume"):
            dualign.train(more, reward=[*given[:2], other, given[3]], resume=True, quiet=True)
    with pytest.raises(UserError, match=r"reward 1 \(fixed\): its code"):
        dualign.train(more, reward=[vowels, Fixed(2.0), *given[2:]], resume=True, quiet=True)
    with pytest.raises(UserError, match="its rewards came from Python: vowels, fixed, now fixed"):
        dualign.train(more, reward=fixed, resume=True, quiet=True)
    same = [vowels, Fixed(1.0), *given[2:]]
    assert len(metrics(dualign.train(more, reward=same, resume=True, quiet=True).folder)) == 2


def test_reward_settings_from_python_are_resumed_from_the_command_line(tiny, tmp_path):
    config = tree(tiny, write_prompts(tmp_path), tmp_path / "run", {"name": "dar"}, online_batches=1)
    run = dualign.train(config, reward=Length(scale=0.5), quiet=True)
    assert run.functions == [] and run.read_batch(0).rows[0].label.value is not None
    assert command("resume", run.folder, "train.online_batches=2").code == 0 and len(metrics(run.folder)) == 2
    Local = type("Local", (Length,), {"__qualname__": "somewhere.Local"})
    with pytest.raises(UserError, match=r"reward: somewhere\.Local must stand at the top of a file"):
        dualign.train(config, reward=Local(), quiet=True)


def test_one_annotator_is_a_reward(tiny, tmp_path):
    config = tree(tiny, write_prompts(tmp_path), tmp_path / "run", {"name": "dar"}, online_batches=1)
    run = dualign.train(config, reward=Fixed(0.0), quiet=True)
    assert {row.label.value for row in run.read_batch(0).rows} == {0.0, 1.0, 2.0}
    assert json.loads((run.folder / "run.json").read_text())["functions"] == ["fixed"]
    assert Run.open(run.folder).functions == ["fixed"]


def test_what_is_no_reward_is_refused(tiny, tmp_path):
    for wrong, words in ((5, "got a value of type int"), (Length, "got the class Length"), ("vowels", "type str")):
        with pytest.raises(UserError, match=f"reward: expected a function or an annotator.*{words}"):
            annotator_of(wrong)
    config = tree(tiny, write_prompts(tmp_path), tmp_path / "run", {"name": "dar"})
    with pytest.raises(UserError, match=r"data\.eval: an AI preference compares"):
        dualign.train(config, reward=PreferenceReward(**ASKED, rubric="helpfulness"), quiet=True)
    with pytest.raises(UserError, match="no reward"):
        build([])
