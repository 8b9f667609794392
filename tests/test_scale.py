"""The memory that a dry run predicts: for GPUs that are not here, with a verdict, and as docs/scale.md says."""

from __future__ import annotations

import fnmatch
import re
import shlex
from pathlib import Path

import pytest

from command import dualign
from dualign import config as configs
from dualign.common.errors import UserError
from dualign.models.architectures import on_meta
from dualign.training.fits import Asked, memory_of, peak, predict, remedy
from dualign.training.memory import Place
from dualign.training.plan import print_plan

ROOT = Path(__file__).resolve().parents[1]
PAPER = sorted(name for name in configs.recipes() if name.startswith("paper/"))
HELPFUL = "paper/helpful-qwen2-7b"


def table() -> dict[str, dict[int, str]]:
    """docs/scale.md's set-ups: what to add, by recipe (and system) and number of GPUs."""
    text = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
    (block,) = (part for part in text.split("\n\n") if part.startswith("| recipes | 1 × 80 GB"))
    head, _, *lines = ([cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines())
    counts = [int(cell.split()[0]) for cell in head[1:]]
    found = {}
    for pattern, *cells in lines:
        recipes, *system = pattern.strip("`").split()
        for name in fnmatch.filter(PAPER, recipes):
            found[" ".join([name, *system])] = dict(zip(counts, cells, strict=True))
    return found


def smaller() -> list[tuple[int, int, str]]:
    """The page's set-ups for other GPUs: how many, GB of each, what to add."""
    text = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) × (\d+) GB \| `([^`]+)` \|$", text, re.MULTILINE)
    return [(int(gpus), int(size), more) for gpus, size, more in rows]


def overrides(cell: str) -> list[str]:
    return re.split(r" (?=\w+\.)", cell.strip("`")) if "=" in cell else []


SETUPS = [(name, gpus, cell) for name, row in table().items() for gpus, cell in row.items()]


def test_every_paper_recipe_has_a_set_up_for_one_two_and_eight():
    assert {name.split()[0] for name in table()} >= set(PAPER)
    assert all(set(row) == {1, 2, 8} for row in table().values()) and len(smaller()) == 2


@pytest.mark.parametrize(("name", "gpus", "cell"), SETUPS, ids=str)
def test_the_set_ups_of_the_page_fit(name, gpus, cell, capsys):
    """`as it is`, or what is to be added."""
    recipe, *system = name.split()
    config = configs.load(recipe, [*system, *overrides(cell)])
    print_plan(config, gpus, 1, 80)
    out = capsys.readouterr().out
    assert "fits on 80 GB: peak" in out and "not at hand; its shape is that of qwen2" in out


@pytest.mark.parametrize(("gpus", "size", "more"), smaller())
def test_the_set_ups_for_smaller_gpus_fit(gpus, size, more, capsys):
    print_plan(configs.load(HELPFUL, overrides(more)), gpus, 1, size)
    assert f"fits on {size} GB" in capsys.readouterr().out
    with pytest.raises(UserError, match="does not fit"):
        print_plan(configs.load(HELPFUL), gpus, 1, size)


@pytest.mark.parametrize(("system", "said"), [("dar", 40), ("ppo", 43)])
def test_on_eight_gpus_loading_is_the_peak_that_the_docs_name(system, said):
    config = configs.load(HELPFUL, [f"algo.name={system}", "train.shard=full"], bf16=True)
    record = predict(config, Asked(8, 1, 80)).record
    assert round(record["peak"] / 1e9) == said and sum(record["phases"]["load"].values()) == record["peak"]
    assert re.search(rf"\b{said} GB\b", (ROOT / "docs/scale.md").read_text(encoding="utf-8"))


def test_a_run_that_does_not_fit_is_told_what_makes_it_fit():
    """What is proposed was tried, and the command with it fits."""
    wrong = [HELPFUL, "train.optimizer=adamw", "--dry-run", "--gpus", "2", "--gpu-memory", "80"]
    said = dualign("train", *wrong)
    assert said.code == 2 and "does not fit on 80 GB: needs " in said.err
    (proposed,) = re.findall(r"set ((?:\S+=\S+ ?)+)\(", said.err)
    assert dualign("train", wrong[0], *wrong[1:2], *proposed.split(), *wrong[2:]).code == 0


@pytest.mark.parametrize("more", ["", "train.shard=full", "model.lora={r: 8}"])
def test_weights_of_four_bits_are_proposed_where_nothing_else_fits(more):
    wrong = [*filter(None, [more]), "--dry-run", "--gpus", "1", "--gpu-memory", "24"]
    said = dualign("train", HELPFUL, *wrong)
    (proposed,) = re.findall(r"set (.*quantize: nf4.*) \(", said.err)
    assert said.code == 2 and dualign("train", HELPFUL, *wrong[:-5], *shlex.split(proposed), *wrong[-5:]).code == 0
    assert "no setting" in dualign("train", HELPFUL, "algo.name=ppo", *wrong[-5:]).err  # its value model cannot be


def test_without_a_memory_that_was_asked_for_it_is_only_told(capsys):
    said = dualign("train", HELPFUL, "--dry-run")
    assert said.code == 0 and re.search(r"(fits|does not fit) on \d+ GB", said.out)
    said = dualign("train", HELPFUL, "--dry-run", "--gpus", "8")
    assert said.code == 0 and "--gpu-memory 80 says whether that fits" in said.out


@pytest.mark.parametrize("here", [False, True])
def test_precision_auto_is_that_of_the_gpus_planned_for(here, monkeypatch):
    """GPUs have units for bf16; whether this machine has any decides only what is planned for it."""
    monkeypatch.setattr("dualign.common.cpu.bf16_units", lambda: here)
    plan = ["train", HELPFUL, "model.precision=auto", "--dry-run"]
    assert "parameters, bf16\n" in dualign(*plan, "--gpus", "1", "--gpu-memory", "80").out
    assert ("parameters, bf16\n" in dualign(*plan).out) == here


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--gpus", "8", "--nodes", "3"], ["--gpus 8 --nodes 3", "no whole number", "--gpus 6"]),
        (["--gpus", "0"], []),
    ],
)
def test_gpus_that_cannot_be_are_refused(flags, words):
    said = dualign("train", HELPFUL, "--dry-run", "--gpu-memory", "80", *flags)
    assert said.code == 2 and all(word in said.err for word in words)


def test_the_flags_belong_to_a_dry_run():
    said = dualign("train", HELPFUL, "--gpus", "8")
    assert said.code == 2 and "are for --dry-run" in said.err


def test_odd_numbers_of_processes_are_told():
    config = configs.load(HELPFUL)
    assert "128 prompts on 3 processes: some sample one more" in "\n".join(predict(config, Asked(3, 1, 80)).lines)
    assert "72 sample nothing" in "\n".join(predict(config, Asked(200, 25, 80)).lines)


def test_of_gpus_that_differ_the_smallest_decides(monkeypatch):
    monkeypatch.setattr("dualign.training.fits._gpus", lambda: [int(80e9), int(40e9)])
    lines, fault, _ = predict(configs.load(HELPFUL), Asked(2))
    assert "GPUs differ (80, 40 GB)" in "\n".join(lines) and "does not fit on 40 GB" in lines[-1] and fault is None


def test_what_is_sharded_falls_with_the_processes():
    config = configs.load(HELPFUL)
    shard = config.model_copy(update={"train": config.train.model_copy(update={"shard": "full"})})
    one, two, four = (memory_of(shard, Place(n))[0].phases()["update"] for n in (1, 2, 4))
    for part in ("weights", "gradients", "optimizer"):
        assert four[part] == pytest.approx(two[part] / 2), part
    assert two["gradients"] == pytest.approx(one["gradients"] / 2) and "masters" not in two
    hybrid = shard.model_copy(update={"train": shard.train.model_copy(update={"shard": "hybrid"})})
    assert memory_of(hybrid, Place(8, 4))[0].phases()["update"]["gradients"] == two["gradients"]


def test_sizes_are_those_of_the_model(tiny):
    """Every parameter is counted once, where it belongs."""
    from transformers import AutoModelForCausalLM

    from dualign.models.architectures import Sizes

    model = AutoModelForCausalLM.from_pretrained(tiny)
    m = Sizes.of(model)
    embedding = model.get_input_embeddings().weight.numel()
    norms = sum(p.numel() for n, p in model.named_parameters() if "norm" in n)
    assert m.tied and m.rest == embedding + norms and m.parameters == m.linear + m.rest
    assert (m.layers, m.hidden, m.inner, m.queries, m.keys) == (2, 32, 48, 32, 16)
    assert m.without_head.parameters == m.parameters


def test_the_shapes_that_ship_have_the_parameters_that_their_names_say():
    from transformers import AutoModelForCausalLM

    for name, billions in {
        "Qwen/Qwen2-7B": 7.6,
        "runs/sft/x-qwen2.5-1.5b/model": 1.5,
        "org/llama-3.1-70b-RM": 70.6,
    }.items():
        model, note = on_meta(AutoModelForCausalLM, name)
        assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, abs=0.06)
        assert "as its name says" in note
    with pytest.raises(UserError, match="cannot be found"):
        on_meta(AutoModelForCausalLM, "nobody/knows-this")


def test_a_reward_model_in_process_is_counted():
    reward = "reward=[{type: classifier, model: org/llama-3.1-8b-reward}]"
    memory, _ = memory_of(configs.load(HELPFUL, [reward]), Place())
    assert memory.phases()["update"]["reward model"] == pytest.approx(15e9, rel=0.02)
    unknown, notes = memory_of(configs.load(HELPFUL, ["reward=[{type: classifier, model: nobody/rm}]"]), Place())
    assert unknown.reward == (0, 0) and "its memory is not counted" in notes[-1]


def test_a_server_on_the_same_gpu_takes_its_share_while_it_samples():
    vllm = ["rollout.engine=vllm", "rollout.options={serve: true, gpu_memory: 0.5}"]
    phases = memory_of(configs.load(HELPFUL, vllm), Place(), limit=80e9)[0].phases()
    assert phases["sample"]["server"] == 40e9 and "key-value cache" not in phases["sample"]
    assert all("server" not in parts for phase, parts in phases.items() if phase != "sample")


def test_a_proposal_is_found_among_more_gpus():
    whole = ["algo.name=ppo", "model.lora={value_model: whole}"]
    memory, _ = memory_of(configs.load(HELPFUL, whole), Place())
    proposed = remedy(memory, 80e9)
    assert proposed and "GPUs and train.shard=full" in proposed
    assert peak(memory.phases())[0] > 80e9
