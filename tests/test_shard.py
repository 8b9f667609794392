"""A policy divided over processes is the policy: the same log-probs, losses, norms and weights, in files that any number
of processes resumes from."""

import json
import random
from dataclasses import fields

import pytest
import torch
import yaml

from dualign.common.errors import UserError
from dualign.models.policy import Policy
from dualign.models.shard import divide
from dualign.run.folder import Run
from dualign.training.machine import check_alike
from killing import Case, Zygote, bought_twice, prepare, readable
from runs_common import metrics, reward_file, tree, weights, write_prompts


@pytest.fixture(scope="module")
def zygote():
    started = Zygote()
    yield started
    started.close()


@pytest.fixture
def train(zygote, tiny, tmp_path):
    """Runs a system in `world` processes, its weights divided as `shard` says; gives the run's folder."""

    def started(algo, shard, world, nodes=1, precision="fp32", lora=None, checkpointing=False, **changes):
        name = f"{algo}-{shard}-{world}"
        config = tree(tiny, write_prompts(tmp_path), tmp_path / name, {"name": algo}, shard=shard, **changes)
        config["train"]["micro_batch_tokens"] = 64  # some processes have more passes than others
        config["model"] |= {"precision": precision, "lora": lora, "gradient_checkpointing": checkpointing}
        config["reward"] = [reward_file(), reward_file("whitened")]
        recipe, log = tmp_path / f"{name}.yaml", tmp_path / f"{name}.log"
        recipe.write_text(yaml.safe_dump(config))
        done = zygote.run("train", str(recipe), log=log, processes=world, nodes=nodes)
        assert done["status"] == 0, log.read_text()[-3000:]
        return tmp_path / name

    return started


def numbers(b):
    """All tensors of a batch: rewards, log π_t, log π_0, advantages, weights."""
    found = {field.name: getattr(b.batch, field.name) for field in fields(b.batch)} | b.batch.columns
    return {name: value for name, value in found.items() if isinstance(value, torch.Tensor)}


def check_same(run, whole):
    """To 1e-5: what was sampled, log π, π_0 and weights of every batch, losses, norms, and the weights at the end."""
    for step in range(len(metrics(whole))):
        a, b = Run.open(run).batch(step), Run.open(whole).batch(step)
        assert a.tokens == b.tokens
        for name, expected in numbers(b).items():
            assert torch.allclose(numbers(a)[name], expected, atol=1e-5, rtol=1e-5), (step, name)
    for found, expected in zip(metrics(run), metrics(whole), strict=True):
        for key in {"loss", "grad_norm", "kl"} & expected.keys():
            assert found[key] == pytest.approx(expected[key], rel=1e-4, abs=1e-5), key
    one, other = weights(run), weights(whole)
    assert set(one) == set(other)
    assert all(torch.allclose(one[key], other[key], atol=1e-5) for key in other)


ROUNDED = {"precision": "bf16", "online_batches": 1}  # a last bit may choose another token in the next batch
CASES = {
    "dar": ("dar", {}),
    "dar, bf16, checkpointing": ("dar", ROUNDED | {"checkpointing": True}),
    "grpo, AdamW": ("grpo", {"optimizer": "adamw"}),
    "ppo": ("ppo", {}),
    "dpo": ("dpo", {}),
    "LoRA, three batches": ("dar", {"lora": {"r": 4}}),
    "ppo, LoRA": ("ppo", {"lora": {"r": 4}}),
    "ppo, LoRA, bf16": ("ppo", ROUNDED | {"lora": {"r": 4}}),
}


FEW = [(case, 3 if "grpo" in case else 2) for case in CASES if "LoRA" not in case]
# the sum of four gradients depends on their order by a last bit, of which PPO's many updates make more in bf16
FOUR = [pytest.param(case, 4, marks=pytest.mark.slow) for case in CASES if case != "ppo, LoRA, bf16"]
TWO = [pytest.param("ppo, LoRA, bf16", 2, marks=pytest.mark.slow)]


@pytest.mark.parametrize(("case", "world"), FEW + FOUR + TWO)
def test_divided_is_whole(case, world, train):
    """In bf16 what is sampled depends on the rows decoded beside it, so the whole model then has as many processes."""
    algo, changes = CASES[case]
    rounded = changes.get("precision") == "bf16"
    check_same(train(algo, "full", world, **changes), train(algo, "none", world if rounded else 1, **changes))


def test_one_process_alone_may_divide(train):
    check_same(train("dar", "full", 1, **ROUNDED), train("dar", "none", 1, **ROUNDED))


def test_hybrid_is_whole(train):
    changes = {"online_batches": 1}
    check_same(train("dar", "hybrid", 4, nodes=2, **changes), train("dar", "none", 1, **changes))


def test_a_killed_divided_run_is_the_same_run(zygote, tiny, tmp_path):
    case = Case(zygote, tmp_path, tiny, "dar", 2, shard="full")
    result = case.disturbed(iter([{"kill_at": random.Random(3).randrange(case.writes // 4, case.writes)}]))
    assert result.kills > 0
    assert (result.unreadable, result.different, result.bought_twice) == ([], [], 0)


def test_resumes_with_another_number_of_processes(zygote, tiny, tmp_path):
    still = Case(zygote, tmp_path, tiny, "dar", 1, shard="none")
    recipe, run, labels = prepare(tmp_path, tiny, "dar", "moved", shard="full")
    labels.touch()
    commands = [(("train", str(recipe)), 2, still.writes // 2), (("resume", str(run)), 1, still.writes // 3)]
    for argv, world, at in commands:
        assert zygote.run(*argv, log=tmp_path / "log", processes=world, kill_at=at)["status"] == -9
        assert readable(run) == []
    done = zygote.run("resume", str(run), log=tmp_path / "log", processes=3)
    assert done["status"] == 0, (tmp_path / "log").read_text()[-3000:]
    one, other = weights(run), weights(still.still)
    assert all(torch.allclose(one[key], other[key], atol=1e-5) for key in other)
    assert bought_twice(labels, still.labels) == 0
    steps = [record["step"] for record in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())]
    assert steps == sorted(set(steps))


def test_layers_that_share_weights_are_refused(tiny):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny)
    model.model.layers[1].mlp = model.model.layers[0].mlp
    with pytest.raises(UserError, match="share weights"):
        divide(Policy(model, "fp32"), None)


def test_weights_that_are_not_finite_stop_all_processes_with_the_place(zygote, tiny, tmp_path):
    recipe, _, _ = prepare(tmp_path, tiny, "dar", "wild", shard="full")
    log = tmp_path / "log"
    done = zygote.run("train", str(recipe), "train.lr=1e38", "train.warmup=0", log=log, processes=2)
    assert done["status"] != 0
    assert "not finite" in log.read_text() and "the weight" in log.read_text()


def test_nodes_of_unlike_sizes_are_refused_before_anything_is_lost(zygote, tiny, tmp_path):
    recipe, run, _ = prepare(tmp_path, tiny, "dar", "odd", shard="hybrid")
    done = zygote.run("train", str(recipe), log=tmp_path / "log", processes=3, nodes=2)
    assert "train.shard: hybrid wants equally many processes on every node" in (tmp_path / "log").read_text()
    assert (done["status"], run.exists()) == (2, False)


def test_unlike_gpus_are_refused():
    check_alike(["H100", "H100"])
    with pytest.raises(UserError, match="2 x A100, 1 x H100"):
        check_alike(["A100", "H100", "A100"])
