"""Small models made here: a Llama and a GPT-2 with random weights and a byte-level tokenizer."""

from __future__ import annotations

import functools
import os
from pathlib import Path

from dualign.common import cpu

cpu.tune()
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import typer.main
import typer.testing

from dualign.annotate import dialect
from killing import Zygote
from tiny import TEMPLATE, make_model, make_tokenizer

# commands are made of their functions once, not for each call
typer.main.get_command = typer.testing._get_command = functools.cache(typer.main.get_command)

__all__ = ["TEMPLATE", "make_model", "make_tokenizer"]
LONG = ("test_shard.py", "test_kill.py", "test_compare.py", "test_faults.py", "test_trainer.py", "test_vllm.py")


def pytest_collection_modifyitems(items):
    """The longest files first: a file is one worker's, and the others would wait for it at the end."""
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))


@pytest.fixture(autouse=True)
def strangers(monkeypatch) -> None:
    """Nothing is known of a judge: a server of an earlier test may have had the same port."""
    monkeypatch.setattr(dialect, "_dialects", {})


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """A folder with a tiny chat Llama, as `from_pretrained` opens it."""
    return save_tiny(tmp_path_factory.mktemp("tiny"), "llama")


@pytest.fixture(scope="session")
def tiny_gpt2(tmp_path_factory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("gpt2"), "gpt2")


@pytest.fixture(scope="session")
def zygote():
    """Processes that start at once and can be killed."""
    started = Zygote()
    yield started
    started.close()


def save_tiny(folder: Path, kind: str) -> Path:
    tokenizer = make_tokenizer()
    make_model(kind, len(tokenizer), tokenizer.eos_token_id).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def compile_by(monkeypatch):
    """Compiles a policy's layers by a backend, CUDA device or not."""
    import functools

    import torch

    from dualign.models import compile as fused

    def compile_layers(policy, backend):
        monkeypatch.setattr(fused, "can_compile", lambda: True)
        monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
        fused._compiled.cache_clear()
        torch._dynamo.reset()
        fused.compile_layers(policy.base)

    yield compile_layers
    fused._compiled.cache_clear()
