"""The laboratory's language and gold reward: the same for a seed, and with no answer that is best for all."""

from __future__ import annotations

import json

import numpy as np
import pytest

from dualign.eval.lab.task import Task, write_data
from dualign.eval.lab.world import World, gold, told


@pytest.fixture(scope="module")
def world() -> World:
    return World.of(0, 2)


def drawn(world: World, count: int) -> tuple[list[str], list[str]]:
    rng = np.random.default_rng(7)
    prompts = [world.prompt(rng) for _ in range(count)]
    return prompts, [world.sentence(prompt, rng) for prompt in prompts]


def test_a_seed_fixes_the_task(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write_data(tmp_path / name, Task(demonstrations=64, prompts=32, heldout=16, pairs=20))
    files = sorted(p.name for p in (tmp_path / "one").iterdir())
    assert files == ["asked.jsonl", "asked_heldout.jsonl", "demonstrations.jsonl", "eval.jsonl", "train.jsonl"]
    assert all((tmp_path / "one" / f).read_bytes() == (tmp_path / "two" / f).read_bytes() for f in files)
    prompts = [
        {json.loads(line)["prompt"] for line in (tmp_path / "one" / f"{name}.jsonl").read_text().splitlines()}
        for name in ("train", "eval", "asked", "asked_heldout")
    ]
    assert [len(each) for each in prompts] == [32, 16, 20, 500]
    assert len(set.union(*prompts)) == sum(map(len, prompts)), "a prompt is in two files"
    assert World.of(1, 2).words != World.of(0, 2).words


def test_the_language_is_grammatical_and_far_from_the_best(world):
    prompts, sentences = drawn(world, 300)
    assert {world.grammar(sentence) for sentence in sentences} == {1.0}
    found = np.mean([world.gold(*pair) for pair in zip(prompts, sentences, strict=True)])
    best = np.mean([world.gold(prompt, world.best(prompt)) for prompt in prompts])
    assert found < 0.1 and best > 0.8


def test_no_answer_wins_for_all_prompts(world):
    """Of the best answers to 60 prompts, each is far below another one for some prompts, and in the mean below what
    every prompt's own best is worth."""
    prompts, _ = drawn(world, 60)
    answers = [world.best(prompt) for prompt in prompts]
    value_PA = np.array([[world.gold(prompt, answer) for answer in answers] for prompt in prompts])
    own_P = value_PA.max(1)
    assert ((own_P[:, None] - value_PA).max(0) > 0.3).all()
    assert value_PA.mean(0).max() < own_P.mean() - 0.05


def test_gold_falls_for_what_a_linear_proxy_cannot_see(world):
    prompt = drawn(world, 1)[0][0]
    whole = world.best(prompt)
    noun, verb, other, *_ = whole.split()
    assert world.gold(prompt, " ".join([noun, verb, noun])) < world.gold(
        prompt, " ".join([noun, verb, other])
    )  # variety
    assert world.gold(prompt, " ".join([noun, other, verb])) < world.gold(
        prompt, " ".join([noun, verb, other])
    )  # order
    assert world.gold(prompt, f"{whole} {verb}") < world.gold(prompt, whole)  # no end
    assert world.gold(prompt, "") == world.gold(prompt, "nothing known") == -1


def test_preferences_follow_bradley_terry(world):
    """Of two answers the better one is told to be with σ(difference / noise)."""
    prompts, one = drawn(world, 800)
    other = [world.sentence(prompt, np.random.default_rng([1, i])) for i, prompt in enumerate(prompts)]
    columns = {"world_seed": [0] * 800, "clauses": [2] * 800}
    noise = {"noise": [0.5] * 800}
    said = np.array(told(prompts, one, **columns, **noise)) - told(prompts, other, **columns, **noise)
    true = np.array(gold(prompts, one, **columns)) - gold(prompts, other, **columns)
    expected = 1 / (1 + np.exp(-true / 0.5))
    differ = np.array([a != b for a, b in zip(one, other, strict=True)])
    error = ((said > 0) - expected)[differ]
    assert abs(error.mean()) < 3 * np.sqrt((expected * (1 - expected))[differ].mean() / differ.sum())
    assert told(prompts[:1], one[:1], [0], [2], [0.5]) == told(prompts[:1], one[:1], [0], [2], [0.5])
