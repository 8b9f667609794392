"""A batch whose rewards tell nothing: said, and by a setting left out, with the rate's schedule as it was."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

import dualign
from dualign.algos import ALGORITHMS, Batch
from dualign.training.view import warnings_of
from runs_common import metrics, tree, vowels, weights, write_prompts


def by_prompt(completions, prompts, **columns):
    """Equal within a prompt: nothing for systems that compare its completions, something for the others."""
    return [float(len(p[-1]["content"]) % 3) for p in prompts]


def flat(completions, **columns):
    return [0.1] * len(completions)


def fit(tiny, folder, algo, reward, **train):
    folder.mkdir(exist_ok=True)
    config = tree(tiny, write_prompts(folder), folder / "run", algo, **train)
    config["data"]["eval"] = None
    return config, dualign.train(config, reward=reward, quiet=True)


@pytest.mark.parametrize("name", ["dar", "grpo", "iter_sft", "dpo", "ppo"])
def test_skipped_such_batches_leave_the_weights_and_the_schedule(name, tiny, tmp_path):
    """And a replay of the stored batches comes to the same."""
    more = {"missing_eos_penalty": 0.0} if "ppo" in name else {}
    config, run = fit(tiny, tmp_path, {"name": name, **more}, flat, no_signal="skip", decay=1.0)
    records = metrics(run.folder)
    assert all(r["without_signal"] == r["skipped"] == 1 and r["grad_norm"] == 0 for r in records)
    rates = [r["lr"] for r in records]
    assert len(set(rates)) == 3 and min(rates) == rates[-1], "a rise, and the fall to 0"
    first = AutoModelForCausalLM.from_pretrained(tiny).state_dict()
    assert all(
        torch.equal(first[k], v) for k, v in AutoModelForCausalLM.from_pretrained(run.saved()[-1]).state_dict().items()
    )
    (said,) = [w for w in warnings_of(records[0] | {"truncated": 0}, ALGORITHMS[name]()) if "nothing to learn" in w]
    assert "all rewards are equal" in said and "the batch was left out" in said

    shutil.rmtree(run.folder / "checkpoints")
    dualign.train(config, reward=flat, resume=True, quiet=True)
    assert metrics(run.folder) == records


def test_by_default_the_step_is_made_and_named(tiny, tmp_path):
    """DAR's: exp(0) · (π_0/π_t)^α, which is SFT on its own samples."""
    _, run = fit(tiny, tmp_path, {"name": "dar"}, by_prompt)
    first, *_, last = metrics(run.folder)
    assert first["without_signal"] == last["without_signal"] == 1 and first["grad_norm"] > 0 and "skipped" not in first
    b = run.read_batch(2)
    assert torch.allclose(b.batch["weight"], (0.1 * (b.batch.seq_ref_N - b.batch.seq_old_N)).exp(), rtol=1e-5)
    (said,) = [w for w in warnings_of(first, ALGORITHMS["dar"]()) if "nothing to learn" in w]
    assert "of each prompt have equal rewards" in said and "(π_0/π_t)^0.1: SFT on its own samples" in said


def test_one_difference_is_a_signal(tiny, tmp_path):
    def once(completions, **columns):
        return [1.0 if i == 3 else 0.1 for i in range(len(completions))]

    _, run = fit(tiny, tmp_path, {"name": "dar"}, once, no_signal="skip", online_batches=1)
    (record,) = metrics(run.folder)
    assert "without_signal" not in record and "skipped" not in record and record["grad_norm"] > 0


@pytest.mark.parametrize(
    ("algo", "within", "between"),
    [
        ({"name": "dar"}, True, False),
        ({"name": "dar", "baseline": "batch"}, True, True),
        ({"name": "dar", "baseline": "none"}, True, True),
        ({"name": "grpo"}, True, False),
        ({"name": "iter_sft"}, True, False),
        ({"name": "dpo"}, True, False),
        ({"name": "ppo"}, True, True),
        ({"name": "rwr"}, True, True),
    ],
    ids=str,
)
def test_what_is_a_signal_depends_on_what_a_reward_is_held_against(algo, within, between):
    system = ALGORITHMS[algo["name"]](**algo)

    def signal(rewards):
        reward_N = torch.tensor(rewards, dtype=torch.float64)
        return system.has_signal(Batch(torch.tensor([0, 0, 1, 1]), torch.ones(4, 2), reward_N))

    assert signal([0.0, 1.0, 0.5, 0.5]) == within
    assert signal([0.0, 0.0, 1.0, 1.0]) == between
    assert not signal([0.3, 0.1 + 0.2, 0.3, 0.3]), "rounding is none"


def test_a_penalty_is_a_signal_too():
    batch = Batch(
        torch.tensor([0, 0]),
        torch.ones(2, 2),
        torch.zeros(2, dtype=torch.float64),
        missing_eos_N=torch.tensor([True, False]),
    )
    assert ALGORITHMS["ppo"]().has_signal(batch) and not ALGORITHMS["ppo"](missing_eos_penalty=0.0).has_signal(batch)


def test_training_with_signal_is_what_it_was(tiny, tmp_path):
    runs = [fit(tiny, tmp_path / how, {"name": "dar"}, vowels, no_signal=how)[1] for how in ("train", "skip")]
    one, two = (weights(run.folder) for run in runs)
    assert all(torch.equal(one[k], two[k]) for k in one) and metrics(runs[0].folder) == metrics(runs[1].folder)
    assert "without_signal" not in json.dumps(metrics(runs[0].folder))
