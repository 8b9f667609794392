"""A run's model handed on: exported, on a card, uploaded, as GGUF. What was written is what the run trained."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

import dualign
from command import dualign as command
from dualign.eval.card import public
from dualign.models import export as exports
from dualign.run.folder import Run
from fake_hub import FakeHub
from runs_common import reward_file, tree, write_prompts

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
TOKEN = "hf_planted0123456789"
HOSTILE = "| <script>alert(1)</script> `x`\n# head"


def trained(model, folder: Path, **more) -> Run:
    config = tree(model, write_prompts(folder), folder / "run", {"name": "dar"}, online_batches=2)
    config["model"] |= more
    config["data"]["system_prompt"] = HOSTILE
    return dualign.train(config | {"reward": [reward_file()]}, quiet=True)


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory) -> Run:
    return trained(tiny, tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def adapted(tiny, tmp_path_factory) -> Run:
    return trained(tiny, tmp_path_factory.mktemp("adapted"), lora={"r": 4})


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(10, 40)[None]).logits


def test_a_whole_model_is_exported_checked_and_told_how_to_serve(whole, tmp_path):
    said = command("export", whole.folder, "--out", tmp_path / "m")
    assert said.code == 0, said.err
    assert "the whole model" in said.out and f"vllm serve {tmp_path / 'm'} --served-model-name run" in said.out
    assert "loaded again, it says what the checkpoint says" in said.out and "differ by 0.0e+00" in said.out
    record = float(said.out.split("had these log-probs up to ")[1].split()[0])
    assert 0 < record < 1e-4  # of the run itself, whose sampler recorded them
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32)
    kept = AutoModelForCausalLM.from_pretrained(whole.checkpoint(), dtype=torch.float32)
    assert torch.equal(logits(again), logits(kept))
    assert not {path.name for path in (tmp_path / "m").iterdir()} & exports.LEFT_OUT
    told = json.loads(command("export", whole.folder, "--out", tmp_path / "j", "--json").out)
    assert (told["folder"], told["checkpoint"]) == (str(tmp_path / "j"), str(whole.checkpoint()))
    assert (told["adapter"], told["largest"], told["gguf"]) == (None, 0, None) and told["tokens"] > 0
    assert told["recorded"] == pytest.approx(record, rel=0.1) and told["serve"][0].startswith("vllm serve ")
    refused = command("export", whole.folder, "--out", tmp_path / "m", "--json")
    assert refused.code == 2 and "already there" in refused.err and not refused.out
    assert command("export", f"{whole.folder}@9", "--out", tmp_path / "n").code == 2
    assert command("export", tmp_path / "m", "--out", tmp_path / "n").code == 2  # a model, and no run


def test_adapters_take_their_base_along_and_open_elsewhere(adapted, tmp_path):
    said = command("export", adapted.folder, "--out", tmp_path / "a")
    assert said.code == 0 and "--enable-lora --lora-modules run=" in said.out, said.err
    moved = (tmp_path / "a").rename(tmp_path / "elsewhere")
    settings = json.loads((moved / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == "base" and settings["revision"] is None
    base = AutoModelForCausalLM.from_pretrained(moved / "base", dtype=torch.float32)  # as the card says
    opened = peft.PeftModel.from_pretrained(base, moved)
    assert command("export", adapted.folder, "--merge", "--out", tmp_path / "whole").code == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "whole", dtype=torch.float32)
    assert torch.allclose(logits(opened), logits(merged), atol=1e-4)
    sampled = command("sample", moved, "say something", "--max-new-tokens", "4")
    assert sampled.code == 0, sampled.err
    named = command("export", adapted.folder, "--base", tmp_path / "whole", "--out", tmp_path / "wrong")
    assert named.code == 2 and "not written" in named.err and not (tmp_path / "wrong").exists()


def test_what_says_something_else_is_not_written(adapted, tmp_path, monkeypatch):
    def noisy(checkpoint, out, model):
        merge(checkpoint, out, model)
        spoilt = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
        spoilt.model.norm.weight.data *= 1.5
        spoilt.save_pretrained(out)

    merge = exports._merge
    monkeypatch.setattr(exports, "_merge", noisy)
    said = command("export", adapted.folder, "--merge", "--out", tmp_path / "m")
    assert said.code == 2 and "does not say what" in said.err and list(tmp_path.iterdir()) == []


def test_the_card_is_the_runs(whole, tmp_path):
    assert command("eval", "cheat", whole.folder, "--second", "builtin:harmless").code == 0
    said = command("push", whole.folder, "me/it", "--dry", "--out", tmp_path / "m")
    assert said.code == 0 and "not uploaded" in said.out, said.err
    text = (tmp_path / "m" / "README.md").read_text()
    front = yaml.safe_load(text.split("---")[1])
    assert front["tags"] == ["dualign", "rlhf", "dar"] and front["library_name"] == "transformers"
    summary = whole.summary
    assert f"{summary['gain']:+.3f}" in text and f"over {summary['n']} prompts" in text
    first, last = (each.stats for each in (whole.evaluations()[0], whole.evaluations()[-1]))
    before = f"{first['reward']:.4g} ± {first['reward_ci']:.2g}"
    assert f"| reward | {before} | {last['reward']:.4g} ± {last['reward_ci']:.2g} |" in text
    assert "kl_budget" not in text.replace("\\", "")  # what is not set
    for told in ("alpha 0.1", "path runs\\_common.py:vowels", "| labels | 32 |", "builtin:harmless", "seed 0", "torch"):
        assert told in text, told
    assert "<script>" not in text and "\n# head" not in text
    assert str(whole.folder.parent) not in text and str(Path.home()) not in text  # nobody's folders


def test_the_card_of_an_earlier_checkpoint_is_that_checkpoints(tiny, tmp_path):
    config = tree(tiny, write_prompts(tmp_path), tmp_path / "run", {"name": "dar"}, online_batches=2)
    config["run"]["checkpoints"] = 2
    run = dualign.train(config | {"reward": [reward_file()]}, quiet=True)
    assert command("push", f"{run.folder}@1", "me/it", "--dry", "--out", tmp_path / "m").code == 0
    text = (tmp_path / "m" / "README.md").read_text()
    assert "after 1 of 2 online batches" in text and "| labels | 16 of the run's 32 |" in text
    assert "measured after 0, 2 online batches, not after 1" in text and "Nothing was held out" not in text


def push(hub, *arguments, token=TOKEN):
    environment = os.environ | {
        "HF_ENDPOINT": hub.url,
        "HF_HUB_OFFLINE": "0",
        "HF_TOKEN": token,
        "HF_HUB_DISABLE_XET": "1",
    }
    command_line = [sys.executable, "-m", "dualign", "push", *map(str, arguments)]
    return subprocess.run(command_line, capture_output=True, text=True, env=environment, check=False, timeout=120)


def test_an_upload_brings_every_file_and_tells_no_token(whole):
    with FakeHub(TOKEN) as hub:
        said = push(hub, whole.folder, "me/it")
        assert said.returncode == 0, said.stderr
        assert hub.made["name"] == "it" and (hub.made.get("private") or hub.made["visibility"] == "private")
        kept = whole.checkpoint()
        assert hub.files["model.safetensors"] == (kept / "model.safetensors").read_bytes()
        assert b"# me/it" in hub.files["README.md"] and "config.json" in hub.files
        assert not any(name.startswith(".push") for name in os.listdir(whole.folder))
        refused = push(hub, whole.folder, "me/it", token="hf_wrong")
        assert refused.returncode == 2 and "me/it" in refused.stderr
    for text in (said.stdout, said.stderr, refused.stderr):
        assert TOKEN not in text and "hf_wrong" not in text and "Traceback" not in text


def test_a_hub_that_is_not_there_is_a_sentence(whole):
    with FakeHub(TOKEN) as hub:
        pass
    said = push(hub, whole.folder, "me/it")
    assert said.returncode == 2 and said.stderr.strip().splitlines()[-1].startswith("dualign: me/it: ")
    assert "Traceback" not in said.stderr


def test_nothing_is_written_beside_a_checkpoint_and_no_run_is_named(whole, tmp_path):
    said = command("push", whole.checkpoint(), "me/it", "--dry")
    assert said.code == 0 and f"{whole.folder / 'push'}: the whole model" in said.out, said.text
    assert command("verify", whole.folder).code == 0
    for name in (tmp_path / "none", f"{tmp_path / 'none'}@3"):
        assert "no run here" in command("push", name, "me/it").err


@pytest.mark.parametrize(("name", "told"), [
    ("clients/acme/prompts.jsonl", "prompts.jsonl"), ("acme/prompts.jsonl", "prompts.jsonl"),
    ("runs/secret/checkpoints/000002", "secret@000002"), ("https://me:pw@host/x.jsonl?key=k", "x.jsonl"),
    ("owner/name-1.5", "owner/name-1.5"), ("gpt2", "gpt2"), ("smollm2-135m-instruct", "smollm2-135m-instruct"),
])  # fmt: skip
def test_a_card_names_no_folder_that_is_not_here_any_more(name, told):
    assert public(name) == told


def test_offline_nothing_is_uploaded(whole, monkeypatch):
    said = command("push", whole.folder, "me/it")
    assert said.code == 2 and "HF_HUB_OFFLINE is set" in said.err and not said.out  # and no model was written
