"""A run goes on only with what it was made from."""

import json
import shutil
from datetime import datetime

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

import dualign
from command import dualign as command
from conftest import TEMPLATE, save_tiny
from dualign.common.errors import UserError
from dualign.config import build, dump, load
from dualign.models.dates import freeze_date
from dualign.run import digests
from dualign.run.folder import Run
from dualign.training.resume import check_changes
from runs_common import metrics, tree, vowels, write_pairs, write_prompts

REWARD = "def scored(completions, **columns):\n    return [float(len(c[0]['content'])) for c in completions]\n"
MORE = "train.online_batches=4"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A finished run and all that it was made from, in one folder."""
    folder = tmp_path_factory.mktemp("made")
    save_tiny(folder / "model", "llama")
    write_prompts(folder)
    shutil.copy(folder / "prompts.jsonl", folder / "heldout.jsonl")
    (folder / "rewards.py").write_text(REWARD)
    (folder / "template.jinja").write_text(TEMPLATE)
    config = tree(folder / "model", folder / "prompts.jsonl", folder / "run", {"name": "dar"})
    config["model"]["chat_template"] = str(folder / "template.jinja")
    config["data"]["eval"] = str(folder / "heldout.jsonl")
    config["reward"] = [{"type": "function", "path": f"{folder / 'rewards.py'}:scored"}]
    dualign.train(config, quiet=True)
    return folder


@pytest.fixture
def there(made):
    """The same, put back afterwards."""
    kept = {p: p.read_bytes() for p in made.rglob("*") if p.is_file()}
    yield made
    shutil.rmtree(made / "run")
    for path, data in kept.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def add_space(path):
    path.write_bytes(path.read_bytes() + b" ")


def other_weights(path):
    weights = load_file(path)
    save_file({k: v + 1e-3 * torch.ones_like(v) for k, v in weights.items()}, path, {"format": "pt"})


CHANGES = {
    "data.train": ("prompts.jsonl", lambda p: p.write_text(p.read_text().replace("say", "sing"))),
    "data.eval": ("heldout.jsonl", add_space),
    "model.name": ("model/model.safetensors", other_weights),
    "model.chat_template": ("template.jinja", add_space),
    "reward.0.path": ("rewards.py", lambda p: p.write_text(REWARD.replace("float(len", "2 * float(len"))),
}


@pytest.mark.parametrize("key", CHANGES)
def test_what_a_run_was_made_from_may_not_change(key, there):
    name, change = CHANGES[key]
    change(there / name)
    before = {p: p.read_bytes() for p in (there / "run").rglob("*") if p.is_file() and p.name != ".lock"}
    said = command("resume", there / "run", MORE)
    assert said.code == 2 and f"{key}: {name.split('/')[-1]}" in said.err and "since the run began" in said.err
    assert {p: p.read_bytes() for p in (there / "run").rglob("*") if p.is_file() and p.name != ".lock"} == before
    checked = command("verify", there / "run")
    assert checked.code == 1 and f"changed: {key}: {name.split('/')[-1]}" in checked.out


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "config.json", "chat_template.jinja"])
def test_nor_what_comes_with_a_model(name, there):
    add_space(there / "model" / name)
    said = command("resume", there / "run", MORE)
    assert said.code == 2 and f"model.name: {name} (sha256" in said.err


def test_what_is_the_same_may_be_written_anew(there):
    for path in [p for p in there.rglob("*") if p.is_file() and "run" not in p.parts[-3:]]:
        path.write_bytes(path.read_bytes())
    assert command("verify", there / "run").code == 0
    assert command("resume", there / "run", MORE).code == 0 and len(metrics(there / "run")) == 4


def test_a_place_may_change_where_what_is_there_is_the_same(there):
    for name in ("prompts.jsonl", "rewards.py"):
        (there / "run" / name).write_bytes((there / name).read_bytes())
    (there / "rewards.py").unlink()
    moved = [f"data.train={there / 'run/prompts.jsonl'}", f"reward.0.path={there / 'run/rewards.py'}:scored"]
    assert command("resume", there / "run", MORE).code == 2
    assert command("resume", there / "run", MORE, *moved).code == 0 and len(metrics(there / "run")) == 4
    for other in (f"data.train={there / 'run/rewards.py'}", f"reward.0.path={there / 'run/rewards.py'}:other"):
        said = command("resume", there / "run", "train.online_batches=5", other)
        assert said.code == 2 and f"{other.partition('=')[0]} cannot change on resume" in said.err


def test_a_run_that_never_said_what_it_was_made_from_goes_on_and_says_so(there):
    run = Run.open(there / "run")
    run.note(inputs=None, begun=None)
    add_space(there / "heldout.jsonl")
    said = command("resume", run.folder, MORE)
    assert said.code == 0 and "does not say what it was made from" in said.out
    # but prompts that are stored must be those that the data give now
    (there / "prompts.jsonl").write_text((there / "prompts.jsonl").read_text().replace("say", "sing"))
    said = command("resume", run.folder, "train.online_batches=5")
    assert said.code == 2 and "is not tokenized as it was" in said.err and "say" in said.err and "sing" in said.err


def test_completions_of_a_fixed_set_must_be_the_stored_ones(tiny, tmp_path):
    pairs = write_pairs(tmp_path)
    config = tree(tiny, pairs, tmp_path / "run", {"name": "offline_dpo"})
    dualign.train(config, quiet=True)
    Run.open(tmp_path / "run").note(inputs=None)
    pairs.write_text(pairs.read_text().replace("xyz", "xyy"))
    said = command("resume", tmp_path / "run", MORE)
    assert said.code == 2 and "completion of prompt" in said.err and "xyz" in said.err and "xyy" in said.err


def test_a_python_reward_is_what_it_does_not_what_it_is_called(tiny, tmp_path):
    def named(function):
        function.__name__ = "reward"
        return function

    config = tree(tiny, write_prompts(tmp_path), tmp_path / "run", {"name": "dar"})
    dualign.train(config, reward=named(lambda completions, **columns: vowels(completions)), quiet=True)
    more = {**config, "train": {**config["train"], "online_batches": 4}}
    other = named(lambda completions, **columns: [2 * v for v in vowels(completions)])
    with pytest.raises(UserError, match=r"reward function 0 \(reward\): its code has changed since the run began"):
        dualign.train(more, reward=other, resume=True, quiet=True)
    assert len(metrics(tmp_path / "run")) == 3
    same = named(lambda completions, **columns: vowels(completions))
    assert len(metrics(dualign.train(more, reward=same, resume=True, quiet=True).folder)) == 4


def test_a_reward_that_stopped_its_run_may_be_mended_once_and_the_summary_says_so(there):
    config = load(there / "run" / "config.yaml", [f"run.dir={there / 'run/second'}"])
    recipe, file = there / "run" / "recipe.yaml", there / "rewards.py"
    recipe.write_text(dump(config))
    file.write_text(REWARD + "    1 / (len(completions) != 16)\n")  # it returned before
    broken = REWARD.replace("    return", "    1 / (len(completions) != 16)\n    return")  # in training alone
    file.write_text(broken)
    assert command("train", recipe).code == 2
    file.write_text(REWARD)
    said = command("resume", there / "run/second")
    assert said.code == 0 and "reward.0.path: rewards.py has changed" in said.out
    summary = json.loads((there / "run/second/summary.json").read_text())
    assert summary["mended"] == [{"inputs": ["reward.0.path"], "batches": 0}]
    assert "before and after were not labelled by the same code" in " ".join(said.out.split())
    file.write_text(broken)
    said = command("resume", there / "run/second", MORE)
    assert said.code == 2 and "reward.0.path: rewards.py has changed" in said.err


def test_a_template_writes_the_day_on_which_the_run_began(tiny):
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    dates = "{{ strftime_now('%d %b %Y') }} {% if strftime_now is defined %}{{ strftime_now('%-d/%m/%y %H:%M:%S') }}{% endif %}|"
    tokenizer.chat_template = dates + TEMPLATE
    freeze_date(tokenizer, datetime(2024, 2, 3, 4, 5, 6))
    asked = [{"role": "user", "content": "say strftime_now('%d')"}]
    text = tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
    assert text == "03 Feb 2024 3/02/24 04:05:06|<|u|>say strftime_now('%d')<|end|><|a|>"
    assert tokenizer.chat_template == dates + TEMPLATE  # what is saved with a checkpoint writes its own day


def test_prompts_of_a_later_day_are_those_of_the_first(there):
    template = there / "model" / "chat_template.jinja"
    template.write_text("{{ strftime_now('%c %f') }}" + TEMPLATE)
    config = load(there / "run" / "config.yaml", [f"run.dir={there / 'run/dated'}", "model.chat_template=null"])
    run = dualign.train(config, quiet=True)
    first = run.read_batch(0).rows[0].rollout.prompt_ids
    longer = config.model_copy(update={"train": config.train.model_copy(update={"online_batches": 4})})
    dualign.train(longer, resume=True, quiet=True)
    written = AutoTokenizer.from_pretrained(there / "model").decode(first)
    assert run.begun.strftime("%c %f") in written
    run.note(begun=None)  # as of a run that did not record it
    longer = config.model_copy(update={"train": config.train.model_copy(update={"online_batches": 5})})
    with pytest.raises(UserError, match="its chat template writes the date"):
        dualign.train(longer, resume=True, quiet=True)


def test_a_reward_head_may_move(tmp_path):
    tree = {"model": {"name": "builtin:none"}, "data": {"train": "prompts.jsonl"}, "train": {"online_batches": 2}}
    for name, bias in (("one", 0.0), ("same", 0.0), ("other", 1.0)):
        (tmp_path / name).mkdir()
        save_file({"weight": torch.full((1, 4), bias)}, tmp_path / name / f"{name}.safetensors")

    def config(name):
        head = {"type": "head", "path": str(tmp_path / name / f"{name}.safetensors")}
        return build(tree | {"reward": [head], "run": {"dir": str(tmp_path / "run")}})

    run = Run(tmp_path / "run")
    run.create(dump(config("one")), [], digests.of_run(config("one")))
    run.unlock()
    check_changes(run, config("same"))
    with pytest.raises(UserError, match=r"reward\.0\.path cannot change"):
        check_changes(run, config("other"))
