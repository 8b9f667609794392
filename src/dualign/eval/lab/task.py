"""The files of a laboratory's task that are there before anything is trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from dualign.common.durable import durable, write_text
from dualign.common.settings import Settings
from dualign.eval.lab.world import MARK, World, gold

END, UNKNOWN = "<end>", "<unk>"
SLACK = 4  # tokens that an answer may have beyond the longest sentence's


class Task(Settings):
    """What makes one task another. The proxy is good with many pairs and little noise."""

    seed: int = Field(0, ge=0, description="of the language, the gold reward and everything drawn for the task")
    clauses: int = Field(2, ge=1, le=12, description="of the longest sentence: four words each")
    pairs: int = Field(6000, ge=20, le=8000, description="gold preferences that the proxy is fitted on")
    noise: float = Field(0.1, ge=0, description="of a preference: the better answer wins with σ(difference / noise)")
    demonstrations: int = Field(8192, ge=1, description="sentences that π_0 is taught")
    prompts: int = Field(1024, ge=8, description="to train on")
    heldout: int = Field(512, ge=8, description="prompts to evaluate on")


def write_data(folder: Path, task: Task) -> None:
    """Demonstrations, and prompts to train on, to evaluate on, to make pairs of and to measure the proxy on: of these
    four files no two share a prompt."""
    world, rng = World.of(task.seed, task.clauses), np.random.default_rng([0xDA7A, task.seed])
    sizes = {
        "demonstrations": task.demonstrations,
        "train": task.prompts,
        "eval": task.heldout,
        "asked": task.pairs,
        "asked_heldout": 500,
    }
    seen: set[str] = set()
    for name, size in sizes.items():
        rows: list[str] = []
        while len(rows) < size:
            prompt = world.prompt(rng)
            row: dict[str, Any] = {"id": f"{name}-{len(rows)}", "prompt": prompt}
            if name == "demonstrations":
                row["completion"] = world.sentence(prompt, rng)
            elif prompt in seen:
                continue
            else:
                seen.add(prompt)
                row |= {"world_seed": task.seed, "clauses": task.clauses, "noise": task.noise}
            rows.append(json.dumps(row) + "\n")
        write_text(folder / f"{name}.jsonl", "".join(rows))


def write_model(folder: Path, task: Task) -> None:
    """A small Llama with random weights, and a tokenizer of the language's words."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = make_tokenizer(World.of(task.seed, task.clauses))
    end = tokenizer.eos_token_id
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=end,
        pad_token_id=end,
    )
    torch.manual_seed(task.seed)
    model = LlamaForCausalLM(config)
    model.generation_config.eos_token_id = end

    def write(aside: Path) -> None:
        model.save_pretrained(aside)
        tokenizer.save_pretrained(aside)

    durable(folder / "empty", write)


def make_tokenizer(world: World) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate([END, UNKNOWN, MARK, *world.words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END, unk_token=UNKNOWN)


def recipe_text(folder: Path, task: Task) -> str:
    """The recipe that every system on this task starts from."""
    where = {
        "model": {"name": f"{folder}/sft/model"},
        "data": {"train": f"{folder}/train.jsonl", "eval": f"{folder}/eval.jsonl"},
        "rollout": {"max_new_tokens": 4 * task.clauses + SLACK},
        "reward": [
            {"type": "head", "path": f"{folder}/proxy.safetensors", "name": "proxy"},
            {"type": "function", "path": f"{gold.__module__}:{gold.__name__}", "name": "gold", "weight": 0.0},
        ],
    }
    lines = [f"{section}: {json.dumps(keys)}\n" for section, keys in where.items()]
    return f"# One task of the laboratory: {task!r}\nbase: lab/task\n" + "".join(lines)
