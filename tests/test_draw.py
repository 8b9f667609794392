"""Held-out prompts and pairs are drawn from those that a run can use, and a dry run counts what it will."""

import json

import numpy as np
import pytest

import dualign
from dualign import data
from dualign.common.errors import UserError
from dualign.config import build
from dualign.training.heldout import key_of
from dualign.training.pairs import make_pairs
from dualign.training.plan import print_plan
from runs_common import reward_file, tree, vowels, write_pairs


@pytest.mark.parametrize("seed", [0, 1])
def test_a_draw_of_what_fits_is_the_draw_where_everything_does(seed):
    items = list(range(100))
    plain = data.draw(items, 10, seed)
    assert plain == sorted(np.random.default_rng(seed).permutation(100)[:10].tolist())
    assert data.draw(items, 10, seed, lambda i: True) == plain
    even = data.draw(items, 10, seed, lambda i: i % 2 == 0)
    assert len(even) == 10 and not any(i % 2 for i in even) and set(even) >= {i for i in plain if i % 2 == 0}
    assert data.draw(items, 80, seed, lambda i: i % 2 == 0) == data.draw(items, None, seed, lambda i: i % 2 == 0)
    assert len(data.draw(items, 80, seed, lambda i: i % 2 == 0)) == 50, "all there are"
    asked = []
    data.draw(items, 3, seed, lambda i: asked.append(i) or True)
    assert len(asked) == 3, "no more is looked at than it takes"


@pytest.fixture
def some_too_long(tiny, tmp_path):
    """Of 24 prompts, 16 have more tokens than are allowed."""
    rows = [{"id": f"p{i}", "prompt": f"say {'a' * (40 if i % 3 else 2)}{i}"} for i in range(24)]
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = tree(tiny, path, tmp_path / "run", {"name": "dar"}, online_batches=1)
    config["data"]["max_prompt_tokens"] = 20
    config["eval"] = {"prompts": 6}
    return config


def test_as_many_are_held_out_as_asked_for(some_too_long, capsys):
    run = dualign.train(some_too_long, reward=vowels)
    rows, stats = run.read_evaluation(0)
    assert stats["prompts"] == stats["asked"] == len(rows) == 6
    assert all(int(row.rollout.prompt.id[1:]) % 3 == 0 for row in rows) and len({key_of(row) for row in rows}) == 6
    assert "8 training prompts (0.5 epochs), 6 held out" in " ".join(capsys.readouterr().out.split())


def test_a_dry_run_counts_what_the_run_will_use(some_too_long, tmp_path, capsys):
    config = some_too_long | {"reward": [reward_file()]}
    print_plan(build(config))
    said = capsys.readouterr().out
    assert "data: 8 rows" in said and "0.50 epochs" in said and "held out: 6 rows" in said
    config["eval"] = {"prompts": 10, "k": 2}
    print_plan(build(config))
    said = capsys.readouterr().out
    assert "held out: 8 rows" in said and "16 to train, 32 to evaluate" in said, "8 prompts, twice, k 2"
    config["model"] = {"name": str(tmp_path / "still-to-come")}
    print_plan(build(config))
    said = capsys.readouterr().out
    assert "data: at most 24 rows" in said and "held out: at most 10 rows" in said


def test_evaluations_of_a_run_that_drew_otherwise_are_paired_by_prompt(some_too_long, tmp_path):
    """A run begun when fewer were left: its prompts are compared with themselves, wherever they stand now."""
    run = dualign.train(some_too_long, reward=vowels, quiet=True)
    rows, stats = run.read_evaluation(0)
    fewer = [row for row in rows if row.rollout.group in (2, 5)]
    moved = [
        type(row)(type(row.rollout)(**vars(row.rollout) | {"group": g, "index": g}), row.label)
        for g, row in enumerate(fewer)
    ]
    run.write_evaluation(0, moved, stats)
    for path in (run.folder / "summary.json", *run.evaluations_dir.glob("000001*")):
        path.unlink()
    run = dualign.train(some_too_long, reward=vowels, resume=True, quiet=True)
    summary = json.loads((run.folder / "summary.json").read_text())
    after = {key_of(row): row.label.value for row in run.read_evaluation(1)[0]}
    assert summary["n"] == 2 and len(after) == 6
    assert summary["gain"] == pytest.approx(np.mean([after[key_of(row)] - row.label.value for row in fewer]))


def test_pairs_are_made_of_as_many_prompts_as_were_asked_for(some_too_long, tmp_path):
    config = build(some_too_long | {"reward": [reward_file()]})
    assert " pairs of 5 prompts in " in make_pairs(config, tmp_path / "pairs.jsonl", 5)
    made = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    assert made and all(int(pair["id"][1:]) % 3 == 0 for pair in made)


def test_a_dry_run_says_that_plain_prompts_have_no_template(tiny, tmp_path, capsys):
    prompts = tmp_path / "plain.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"say {i}"}) + "\n" for i in range(8)))
    config = tree(tiny, prompts, tmp_path / "run", {"name": "dar"}) | {"reward": [reward_file()]}
    print_plan(build(config))
    assert "prompts are plain text and reach the model as they are" in capsys.readouterr().out
    config["data"] |= {"chat": True}
    print_plan(build(config))
    assert "plain text" not in capsys.readouterr().out


def test_a_dry_run_leaves_room_for_answers_only_where_some_are_sampled(tiny, tmp_path):
    """A fixed set without a reward is evaluated on its own completions."""
    config = tree(tiny, write_pairs(tmp_path), tmp_path / "run", {"name": "offline_dpo"})
    config["rollout"] = {"max_new_tokens": 5000}
    print_plan(build(config))
    with pytest.raises(UserError, match="5000 new ones exceed"):
        print_plan(build(config | {"reward": [reward_file()]}))


@pytest.mark.parametrize(("key", "row"), [("train", "long.jsonl:3"), ("eval", "long.jsonl:3"), (None, "reward: none")])
def test_a_dry_run_finds_what_would_end_the_run_once_its_model_is_loaded(tiny, tmp_path, capsys, key, row):
    """A prompt that does not fit into the model's context; no reward."""
    for name, longest in (("short", 9), ("long", 900)):
        rows = [{"prompt": "a" * n} for n in (3, 4, longest)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = tree(tiny, tmp_path / "short.jsonl", tmp_path / "run", {"name": "dar"}) | {"reward": [reward_file()]}
    config["eval"] = {"prompts": 3}
    print_plan(build(config))
    assert "would not run" not in capsys.readouterr().out
    config |= {"reward": []} if key is None else {}
    config["data"] |= {key: str(tmp_path / "long.jsonl")} if key else {}
    with pytest.raises(UserError, match=row):
        print_plan(build(config))
