"""What Python takes and gives in place of files and names."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

import dualign
from command import dualign as command
from dualign.common.errors import UserError
from dualign.rollout.hf.sampler import HFSampler
from runs_common import tree, vowels, weights, write_prompts

EXAMPLE = Path(__file__).parents[1] / "examples" / "system.py"


def test_names_are_there_and_typed():
    for name in dualign.__all__:
        assert getattr(dualign, name) is not None and name in dir(dualign)
    with pytest.raises(AttributeError, match="no_such"):
        dualign.no_such  # noqa: B018


def test_rows_and_a_model_in_memory_train_as_files_do(tiny, tmp_path):
    prompts = write_prompts(tmp_path)
    config = tree(tiny, prompts, tmp_path / "a", {"name": "dar"})
    dualign.train(config, reward=vowels, quiet=True)
    rows = [json.loads(line) for line in prompts.read_text().splitlines()]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny), AutoTokenizer.from_pretrained(tiny)
    other = tree(tiny, prompts, tmp_path / "b", {"name": "dar"})
    given = {"model": model, "tokenizer": tokenizer, "data": Dataset.from_list(rows), "eval_data": rows}
    run = dualign.train(other, reward=vowels, quiet=True, **given)
    a, b = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert all(torch.equal(a[name], b[name]) for name in a)
    longer = {**other, "train": {**other["train"], "online_batches": 4}}
    dualign.train(longer, reward=vowels, quiet=True, resume=True, **given)
    assert len(run.metrics()) == 4
    with pytest.raises(UserError, match=r"data\.train cannot change|data\.train: .* changed"):
        dualign.train(longer, reward=vowels, quiet=True, resume=True, **{**given, "data": rows[1:]})
    with pytest.raises(UserError, match="give its tokenizer"):
        dualign.train(other, reward=vowels, model=model)


def test_a_system_as_an_object_is_recorded_by_its_place(tiny, tmp_path):
    spec = importlib.util.spec_from_file_location("own_system", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    sys.modules["own_system"] = module
    spec.loader.exec_module(module)
    config = tree(tiny, write_prompts(tmp_path), tmp_path / "run", {"name": "dar"})
    algo = module.LinearlyWeighted(name="mine", scale=0.5)
    run = dualign.train(config, reward=vowels, algo=algo, quiet=True)
    assert run.config.algo.name == f"{EXAMPLE}:LinearlyWeighted" and run.config.algo.scale == 0.5
    assert command("verify", run.folder).code == 0


class Counting:
    """A sampler that another does the work of."""

    def __init__(self, inner):
        self.inner, self.synced = inner, []

    def sample(self, *given):
        self.inner.sample(*given)

    def sync(self, weights):
        self.synced.append({name: value.clone() for name, value in weights()})


def test_a_sampler_as_an_object_gets_every_weight_before_it_samples_from_new_ones(tiny, tmp_path, monkeypatch):
    """For the first evaluation and batch, two more batches, and the last evaluation."""
    config = tree(tiny, write_prompts(tmp_path), tmp_path / "run", {"name": "dar"})
    counting = Counting(None)

    def build(options, policy, tokenizer, given):
        counting.inner = HFSampler(policy, tokenizer, 64)
        return counting

    monkeypatch.setattr("dualign.rollout.build", build)  # it needs the policy, which the run loads
    run = dualign.train(config, reward=vowels, quiet=True)
    saved = AutoModelForCausalLM.from_pretrained(run.checkpoint()).state_dict()
    assert len(counting.synced) == 4 and counting.synced[-1].keys() == saved.keys()
    assert all(torch.equal(counting.synced[-1][name].float(), value.float()) for name, value in saved.items())
    monkeypatch.undo()
    longer = {**config, "train": {**config["train"], "online_batches": 4}}
    with pytest.raises(UserError, match=r"its sampler came from rollout.engine, now .*test_python.Counting"):
        dualign.train(longer, reward=vowels, sampler=counting, resume=True, quiet=True)


def test_a_run_can_be_read(tiny, tmp_path):
    config = tree(tiny, write_prompts(tmp_path), tmp_path / "run", {"name": "dar"})
    run = dualign.train(config, reward=vowels, quiet=True)
    again = dualign.Run.open(str(tmp_path / "run"))
    assert repr(again) == f"Run({str(run.folder)!r}: dar, 3 of 3 online batches, finished)"
    assert again.metrics() == run.metrics() and again.steps() == [0, 1, 2] and again.evaluated() == [0, 3]
    assert repr(again.batch(1)).startswith("WeightedBatch(1: 16 completions of 4 prompts, 0 absent, mean reward ")
    first, last = again.evaluations()
    assert (first.done, last.done) == (0, 3) and first.stats["reward"] == again.summary["before"]["reward"]
    assert repr(last).startswith("Evaluated(after 3 online batches: 4 completions, reward ") and len(repr(last)) < 99
    assert repr(again.evaluations()) == f"Records(2; the last: {last!r}; .table(), .frame())"
    assert repr(again.metrics()).startswith("Records(3; the last: step 2, reward ") and "{" not in repr(again.metrics())
    assert len(first.rows) == 4 and again.checkpoint("latest") == again.checkpoint(3)
    with pytest.raises(UserError, match="online batch 7 is not stored; there are 0 to 2"):
        again.batch(7)
    with pytest.raises(UserError, match="no checkpoint 1; there are 3"):
        again.checkpoint(1)
    record = run.metrics()[0]
    assert (
        record["entropy"] > 0 and record["positive_mass"] > 0 and record["negative_mass"] == 0
    )  # DAR never pushes down


def test_numbers_of_a_run_of_before_are_read_by_their_new_names(tiny, tmp_path):
    config = tree(tiny, write_prompts(tmp_path), tmp_path / "run", {"name": "dar"})
    run = dualign.train(config, reward=vowels, quiet=True)
    now = [record["truncated"] for record in run.metrics()]
    for file in (run.metrics_file, run.folder / "summary.json"):
        file.write_text(file.read_text().replace('"truncated"', '"missing_eos"'))
    old = dualign.Run.open(run.folder)
    assert [record["truncated"] for record in old.metrics()] == now and "truncated" in old.summary["after"]
    assert command("report", run.folder).code == 0


def test_a_sampler_that_runs_out_of_memory_is_not_blamed(tiny, tmp_path):
    class Full(Counting):
        def sample(self, *given):
            raise torch.OutOfMemoryError("CUDA out of memory")

    config = tree(tiny, write_prompts(tmp_path), tmp_path / "run", {"name": "dar"})
    with pytest.raises(dualign.StopRun, match="out of memory while sampling"):
        dualign.train(config, reward=vowels, sampler=Full(None), quiet=True)


@pytest.mark.parametrize(("given", "said"), [
    ({"config": "quickstart"}, "config: expected a dict or what dualign.load gives, not a value of type str"),
    ({"algo": "grpo"}, "algo: expected an instance of a dualign.Algorithm, not a value of type str; one of ours: algo.name"),
    ({"algo": dualign.Algorithm}, "not the class Algorithm"),
    ({"sampler": Counting}, "sampler: expected an object with the methods sample and sync, not the class Counting"),
    ({"sampler": dualign.SamplerSettings()}, "not a value of type SamplerSettings; .* rollout.engine=FILE.py:NAME"),
    ({"callbacks": dualign.Callback()}, "callbacks: expected a list of dualign.Callback objects"),
    ({"callbacks": [print]}, "callbacks: expected a list of dualign.Callback objects"),
    ({"model": "tiny", "tokenizer": "tiny"}, "model: expected one of transformers, not a value of type str; a name"),
    ({"tokenizer": object()}, "tokenizer: give its model, too"),
    ({"data": ["hi", "ho"]}, "data, row 1: expected a mapping"),
    ({"data": [{"prompt": "hi"}, None]}, r"data, row 2: expected a mapping .* got nothing"),
    ({"data": [{"prompt": "hi", "x": {1}}]}, "data: a row cannot be written as JSON"),
])  # fmt: skip
def test_what_is_given_and_is_none_of_its_kind_is_named(tiny, tmp_path, given, said):
    config = tree(tiny, write_prompts(tmp_path), tmp_path / "run", {"name": "dar"})
    with pytest.raises(UserError, match=said):
        dualign.train(**{"config": config, "reward": vowels} | given)
    assert not (tmp_path / "run").exists()
