"""Decoding alone: useful tokens per second of dualign's loop beside transformers' `generate`.

    python benchmarks/decode.py [--prompts 16] [--k 4] [--repeats 5]

The same model, prompts, temperature and stopping rule, in one process, alternating. Useful tokens are those up to and
including the first stop token. The model is in bf16: all of it for `generate`; for dualign its linear layers, with
autocast's numbers. Three cases: the quickstart's length, a length at which answers end by themselves, and answers that
end at their first line break or full stop, so that most rows are done long before the last one.
"""

from __future__ import annotations

from dualign.common import cpu

cpu.tune()

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common import RESULTS, machine, save, spread, table
from dualign import assets, data
from dualign.data.settings import DataConfig
from dualign.models.policy import Policy, Tokenizer, load_model
from dualign.models.settings import ModelConfig
from dualign.rollout.base import Request, Sampling
from dualign.rollout.hf.sampler import HFSampler
from dualign.training.source import requests_of

TEMPERATURE = 0.9
Lengths = list[int]


def ours(model: str, device: str) -> tuple[Tokenizer, HFSampler]:
    hf, tokenizer = load_model(ModelConfig(name=model))
    return tokenizer, HFSampler(Policy(hf.to(device), "bf16").frozen_copy(), tokenizer, rows=256)


def decode_ours(sampler: HFSampler, requests: list[Request], k: int, tokens: int, seed: int) -> Lengths:
    lengths: Lengths = []
    sampling = Sampling(k, tokens, TEMPERATURE)
    sampler.sample(requests, sampling, (0, seed), lambda r: lengths.append(len(r.completion_ids)))
    return lengths


@torch.inference_mode()
def decode_theirs(
    hf: Any, pad: int, stop: set[int], requests: list[Request], k: int, tokens: int, seed: int
) -> Lengths:
    width = max(len(r.prompt_ids) for r in requests)
    ids = torch.full((len(requests), width), pad)
    seen = torch.zeros_like(ids)
    for row, r in enumerate(requests):
        ids[row, width - len(r.prompt_ids) :] = torch.tensor(r.prompt_ids)
        seen[row, width - len(r.prompt_ids) :] = 1
    torch.manual_seed(seed)
    out = hf.generate(
        input_ids=ids.to(hf.device),
        attention_mask=seen.to(hf.device),
        do_sample=True,
        temperature=TEMPERATURE,
        top_p=1.0,
        top_k=0,
        num_return_sequences=k,
        max_new_tokens=tokens,
        eos_token_id=sorted(stop),
        pad_token_id=pad,
    )
    return [next((i + 1 for i, y in enumerate(row) if y in stop), len(row)) for row in out[:, width:].tolist()]


def sentence_ends(tokenizer: Tokenizer) -> set[int]:
    """Tokens that hold a full stop or a line break, and EOS."""
    texts = ((i, tokenizer.text([i])) for i in range(len(tokenizer.hf)))
    return {i for i, text in texts if "." in text or "\n" in text} | set(tokenizer.eos_ids)


def measured(decode: dict[str, Callable[[int], Lengths]], repeats: int) -> dict[str, Any]:
    """Alternating, the first of each not counted."""
    rates: dict[str, list[float]] = {name: [] for name in decode}
    lengths: dict[str, Lengths] = {name: [] for name in decode}
    for repeat in range(repeats + 1):
        for name in list(decode) if repeat % 2 else reversed(list(decode)):
            start = time.perf_counter()
            found = decode[name](repeat)
            if repeat:
                rates[name].append(sum(found) / (time.perf_counter() - start))
                lengths[name] += found
    ratio = [a / b for a, b in zip(rates["dualign"], rates["generate"], strict=True)]
    quartiles = {name: np.percentile(x, [0, 25, 50, 75, 100]).tolist() for name, x in lengths.items()}
    return {"tokens_per_second": rates, "ratio": ratio, "length_quartiles": quartiles}


def cases(tokenizer: Tokenizer, tokens: int) -> Iterator[tuple[str, int, set[int]]]:
    natural = set(tokenizer.eos_ids)
    yield f"to {tokens} tokens", tokens, natural
    yield f"to {5 * tokens} tokens", 5 * tokens, natural
    yield f"first sentence, to {2 * tokens} tokens", 2 * tokens, sentence_ends(tokenizer)


def main() -> None:
    from transformers import AutoModelForCausalLM

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--k", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS)
    o = parser.parse_args()
    about, device = machine(), "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer, sampler = ours(o.model, device)
    theirs = AutoModelForCausalLM.from_pretrained(assets.resolve(o.model), dtype=torch.bfloat16).to(device).eval()
    source = "builtin:quickstart/train"
    prompts = data.load_prompts(source, DataConfig(train=source), "train")[: o.prompts]
    requests = requests_of(prompts, tokenizer, sampler.policy.model.config.max_position_embeddings, 1, None, print)
    record: dict[str, Any] = {
        "machine": about,
        "options": {k: v for k, v in vars(o).items() if k != "out"},
        "cases": {},
    }
    rows = []
    for name, tokens, stop in cases(tokenizer, o.tokens):
        tokenizer.eos_ids = frozenset(stop)

        def mine(seed: int, tokens: int = tokens) -> Lengths:
            return decode_ours(sampler, requests, o.k, tokens, seed)

        def its(seed: int, tokens: int = tokens, stop: set[int] = stop) -> Lengths:
            return decode_theirs(theirs, tokenizer.pad_id, stop, requests, o.k, tokens, seed)

        found = record["cases"][name] = measured({"dualign": mine, "generate": its}, o.repeats)
        rates, low_to_high = found["tokens_per_second"], found["length_quartiles"]["dualign"]
        lengths = "/".join(f"{x:.0f}" for x in low_to_high)
        rows.append([name, lengths, spread(rates["dualign"], 0), spread(rates["generate"], 0), spread(found["ratio"])])
        print(f"{name}: {rows[-1][1:]}", flush=True)
    head = ["case", "lengths: min/quartiles/max", "dualign, useful tokens/s", "generate", "ratio (min-max)"]
    page = save("decode", record, table(head, rows), o.out)
    print(f"{table(head, rows)}\n{page}")


if __name__ == "__main__":
    main()
