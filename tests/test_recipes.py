"""Every recipe and grid that ships is valid, says what it is, and the small ones run."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path

import pytest

import dualign
from command import dualign as command
from dualign import config as configs
from dualign.algos import ALGORITHMS
from dualign.annotate.head import file_of
from dualign.common.errors import UserError
from dualign.eval.compare import grid as grids
from dualign.eval.compare.plan import plan_lines
from dualign.training.plan import print_plan
from runs_common import metrics, vowels, write_pairs

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = configs.recipes()
GRIDS = sorted(name for name in SHIPPED if name.startswith("compare/"))
RECIPES = sorted(name for name in SHIPPED if name not in GRIDS)
SMALL = [name for name in RECIPES if name.startswith("small/")]


@pytest.mark.parametrize("name", sorted(SHIPPED))
def test_the_first_line_says_what_it_is(name):
    first = SHIPPED[name].read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith("# ") and len(first) > 20


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_valid_and_priced(name, capsys, monkeypatch, tmp_path):
    if name.startswith("lab/"):  # whose head `dualign lab` makes
        monkeypatch.chdir(tmp_path)
        Path("runs/lab").mkdir(parents=True)
        shutil.copy(file_of("builtin:helpful"), "runs/lab/proxy.safetensors")
    config = configs.load(name)
    print_plan(config)
    out = capsys.readouterr().out
    assert f"{config.train.online_batches} online batches of {config.train.online_batch} completions" in out
    assert "labels needed: " in out


def test_a_plan_is_one_document_for_programs():
    priced = "price_prompt: 1, price_completion: 2"
    judge = f"reward=[{{type: judge, rubric: helpfulness, model: m, base_url: 'http://x/v1', {priced}}}]"
    planned = ["train", "quickstart", judge, "rollout.log_probs=recomputed", "--dry-run"]
    said, told = command(*planned, "--gpus", "2", "--json"), command(*planned, "--gpus", "2").out
    plan = json.loads(said.out)
    config = configs.load("quickstart")
    assert said.code == 0 and not plan["faults"] and plan["algo"]["name"] == "dar"
    assert f"data: {plan['rows']} rows of" in told and f"held out: {plan['held_out']} rows of" in told
    assert f"labels needed: {plan['labels']['train']} to train, {plan['labels']['evaluate']} to evaluate" in told
    assert plan["labels"]["train"] == config.train.online_batches * config.train.online_batch
    assert f"about {plan['dollars']['reward.0']:.2f} dollars" in told
    memory = plan["memory"]
    assert memory["processes"] == 2 and memory["fits"] is None and memory["limit"] is None
    assert memory["peak"] == max(sum(parts.values()) for parts in memory["phases"].values())
    assert command("train", "quickstart", "--json").code == 2  # a run itself is no document


def test_a_dry_run_finds_what_is_wrong(tmp_path, capsys):
    (tmp_path / "bad.jsonl").write_text('{"prompt": "fine"}\nnot json\n')
    (tmp_path / "held").mkdir()
    (tmp_path / "held" / "config.yaml").write_text("model: {}\n")
    judge = "{type: judge, rubric: helpfulnes, model: m, base_url: 'http://x/v1'}"
    rewards = f"[{{type: function, path: nofile.py:f}}, {{type: head, path: nohead}}, {judge}]"
    wrong = [f"data.train={tmp_path / 'bad.jsonl'}", f"reward={rewards}", f"run.dir={tmp_path / 'held'}"]
    with pytest.raises(UserError) as told:
        print_plan(configs.load("quickstart", wrong))
    for words in ("row 2", "reward.0: reward function", "nofile.py", "nohead", "helpfulnes", "already holds a run"):
        assert words in str(told.value), words
    said = command("train", "quickstart", *wrong, "--dry-run", "--json")
    faults = json.loads(said.out)["faults"]
    assert said.code == 2 and all(fault in said.err for fault in faults)
    assert sum("reward.2" in fault and "helpfulnes" in fault for fault in faults) == 1
    print_plan(configs.load("quickstart", ["data.eval=missing.jsonl"]))
    assert "NOT HERE, the run needs it: missing.jsonl" in capsys.readouterr().out


@pytest.mark.parametrize("name", GRIDS)
def test_every_grid_is_valid_and_priced(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    grid = grids.load(name)
    lines = plan_lines(grid)
    assert lines[0].startswith(f"{len(lines) - 3} runs in {grid.out}")
    assert all("to do" in line for line in lines[1:-2])


def test_one_reward_needs_no_list(tmp_path):
    (tmp_path / "one.yaml").write_text("base: quickstart\nreward: {type: head, path: builtin:harmless}\n")
    config = configs.load(tmp_path / "one.yaml", ["reward.0.weight=2"])
    assert [(r.type, r.weight) for r in config.reward] == [("head", 2)]
    assert configs.load("quickstart", ["reward={type: head, path: builtin:hh}"]).reward[0].path == "builtin:hh"
    with pytest.raises(UserError, match=r"reward\.0\.pth: no such key; did you mean reward\.0\.path"):
        configs.load("quickstart", ["reward={type: head, pth: builtin:hh}"])


def test_grids_do_not_share_a_folder():
    folders = [grids.load(name).out for name in GRIDS]
    assert len(set(folders)) == len(folders)


def test_every_system_has_a_small_recipe():
    assert {configs.load(name).algo.name for name in SMALL} == set(ALGORITHMS)
    assert all(configs.load(f"small/{name}").algo.name == name for name in ALGORITHMS)


def test_small_recipes_follow_the_quickstart():
    base = configs.load("quickstart")
    for name in SMALL:
        config = configs.load(name)
        assert (config.model, config.rollout, config.reward, config.eval) == (
            base.model, base.rollout, base.reward, base.eval
        ), name  # fmt: skip


def test_the_papers_settings():
    """ICLR 2026, App. B."""
    for task, tokens in {"tldr": 64, "helpful": 256, "harmless": 256}.items():
        for model in ("qwen2-7b", "qwen2.5-7b"):
            c = configs.load(f"paper/{task}-{model}")
            assert (c.train.online_batch, c.train.update_size, c.train.lr, c.train.warmup) == (512, 128, 1e-6, 15)
            assert (c.rollout.k, c.rollout.max_new_tokens, c.rollout.temperature) == (4, tokens, 0.9)
            assert (c.algo.name, c.algo.alpha, c.algo.beta, c.algo.w_clip) == ("dar", 0.1, 0.05, 20)
            assert c.train.optimizer == "adafactor" and c.eval.prompts == 1000
    c = configs.load("paper/helpsteer2-qwen2-7b-instruct")
    assert (c.algo.alpha, c.algo.beta, c.train.weight_decay, c.rollout.max_new_tokens) == (0.5, 0.5, 0.01, 1000)
    found = {cell.system: cell.config for cell in grids.cells(grids.load("paper/helpful"), {})}
    assert found["dual_ppo"].train.lr == 3e-6 and found["ppo"].algo.epochs == 4
    for name in ("dpo", "ipo", "slic"):
        assert (
            found[name].rollout.k == 2 and found[name].train.lr == 5e-7 and found[name].reward[0].type == "preference"
        )
        assert found[name].train.online_batches * 256 == pytest.approx(5 * 43835, rel=1e-3)  # five epochs of pairs
    assert found["ipo"].algo.beta == 1.0


def test_a_base_is_laid_under_and_its_system_not_mixed_in(tmp_path):
    (tmp_path / "one.yaml").write_text(
        "model: {name: m, precision: fp32}\ndata: {train: t}\n"
        "algo: {name: dar, beta: 0.7}\ntrain: {online_batches: 3}\n"
    )
    (tmp_path / "two.yaml").write_text("base: one.yaml\nmodel: {name: n}\nalgo: {name: rloo}\n")
    (tmp_path / "three.yaml").write_text("base: one.yaml\nalgo: {alpha: 0.3}\n")
    two, three = configs.load(tmp_path / "two.yaml"), configs.load(tmp_path / "three.yaml")
    assert (two.model.name, two.model.precision, two.train.online_batches) == ("n", "fp32", 3)
    assert (two.algo.name, two.algo.beta) == ("rloo", 0.03)
    assert (three.algo.name, three.algo.alpha, three.algo.beta) == ("dar", 0.3, 0.7)
    swapped = configs.load(tmp_path / "one.yaml", ["algo.beta=0.2", "algo.name=rloo"])
    assert (swapped.algo.name, swapped.algo.beta) == ("rloo", 0.2)
    assert configs.load(tmp_path / "one.yaml", ["algo.name=rloo"]).algo.beta == 0.03
    (tmp_path / "loop.yaml").write_text("base: loop.yaml\n")
    with pytest.raises(UserError, match="its own base"):
        configs.load(tmp_path / "loop.yaml")


def test_the_documents_name_what_ships():
    """Every recipe and grid that docs/ names exists, every one that ships is named, and no table is left out."""
    text = "".join((ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("recipes.md", "systems.md"))
    named = set(re.findall(r"\b(?:paper|small)/[a-z0-9._-]+[a-z0-9]", text))
    assert named <= set(SHIPPED) | {name.removeprefix("compare/") for name in GRIDS}
    assert set(SMALL) <= named and {name.removeprefix("compare/") for name in GRIDS if "/paper/" in name} <= named
    for grid in re.findall(r"dualign (?:compare|sweep) ([a-z0-9/._-]+)", text):
        assert f"compare/{grid}" in SHIPPED
    rows = [line.split("|")[1] for line in text.splitlines() if line.startswith(("| ICLR", "| v1"))]
    tables = {int(n) for row in rows if "ICLR" in row for n in numbers(row.split("v1")[0], "Table")}
    assert tables == set(range(1, 15))
    figures = {int(n) for row in rows if "ICLR" in row for n in numbers(row.split("v1")[0], "Fig")}
    assert figures == {1, 3, 4, 5, 6, 7, 8}  # 2 is a drawing


def numbers(text, what):
    """The numbers after Table(s) or Fig(s)., ranges spelled out: "Tables 9-14", "Figs. 5 a-b, 7, 8"."""
    listed = re.search(rf"{what}\w*\.? ((?:\d+(?:-\d+)?(?: [a-f](?:-[a-f])?\b)?(?:, | and )?)+)", text)
    for first, last in re.findall(r"(\d+)(?:-(\d+))?", listed[1] if listed else ""):
        yield from range(int(first), int(last or first) + 1)


@pytest.mark.parametrize("name", SMALL)
def test_every_small_recipe_runs_two_steps(name, tiny, tmp_path):
    """On the tiny model, with a Python function for the reward, at a size that takes a second."""
    config = configs.load(name, [f"run.dir={tmp_path / 'run'}", "train.warmup=1"])
    data = {"train": str(write_pairs(tmp_path))} if config.algo.source != "online" else {}
    small = {"online_batches": 2, "online_batch": 16, "update_size": 8, "micro_batch_tokens": 512}
    shrunk = configs.build(
        configs.merge(
            config.model_dump(exclude={"reward"}),
            {
                "model": {"name": str(tiny), "precision": "fp32"},
                "data": {**data, "max_prompt_tokens": 150},
                "rollout": {"max_new_tokens": 8},
                "train": small,
                "eval": {"prompts": 2, "every": 0},
            },
        )
    )
    run = dualign.train(shrunk, reward=vowels, quiet=True)
    assert [r["step"] for r in metrics(run.folder)] == [0, 1]
    assert all(math.isfinite(r["loss"]) for r in metrics(run.folder))
    assert (run.folder / "summary.json").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_every_small_recipe_runs_two_steps_on_its_own_model(name, tmp_path):
    config = configs.load(
        name,
        [
            f"run.dir={tmp_path / 'run'}",
            "train.online_batches=2",
            "train.online_batch=16",
            "train.update_size=8",
            "eval.prompts=4",
        ],
    )
    if config.algo.source != "online":
        config = configs.build(configs.merge(config.model_dump(), {"data": {"train": str(write_pairs(tmp_path))}}))
    run = dualign.train(config, quiet=True)
    assert [r["step"] for r in metrics(run.folder)] == [0, 1]
    assert all(math.isfinite(r["loss"]) for r in metrics(run.folder))
