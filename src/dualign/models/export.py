"""A checkpoint as a model for others: without the training state, adapters merged if they are to be."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from dualign import assets
from dualign.common.durable import durable
from dualign.common.errors import UserError
from dualign.models.digests import LEFT_OUT
from dualign.models.load import load_model
from dualign.models.settings import ModelConfig


def export(checkpoint: Path, out: Path, model: ModelConfig, merge: bool) -> str:
    """Writes the policy of a checkpoint into `out`, as from_pretrained opens it, and returns what it is, in words.
    `model`: of the run; its precision is that of merged weights. Raises UserError where `out` is there already."""
    if out.exists():
        raise UserError(f"{out}: already there; name another folder by --out")
    out.parent.mkdir(parents=True, exist_ok=True)
    adapter = assets.adapter_of(str(checkpoint))
    if adapter is None or not merge:
        durable(out, lambda aside: shutil.copytree(checkpoint, aside, ignore=shutil.ignore_patterns(*LEFT_OUT)))
        return (
            "the whole model" if adapter is None else f"an adapter of {adapter.base} (--merge writes the whole model)"
        )

    def write(aside: Path) -> None:
        settings = {"name": str(checkpoint), "revision": None, "reference": None, "lora": None}
        whole, tokenizer = load_model(model.model_copy(update=settings), "export")
        whole.to(torch.bfloat16 if model.precision == "bf16" else torch.float32).save_pretrained(aside)
        tokenizer.hf.save_pretrained(aside)

    durable(out, write)
    return "the whole model, its adapter merged"
