"""Sampling alone: useful tokens per second of vLLM beside dualign's own loop, and what handing over weights takes.

    python benchmarks/vllm_sampler.py --python .venv-vllm/bin/python [--prompts 32] [--k 4] [--tokens 64] [--repeats 3]

A Llama of some 0.1B parameters with random weights and a head of its own, prompts of random ids; one process and the
server that it started, alternating. Useful tokens are those up to and including the first stop token; with random
weights hardly any comes.
"""

from __future__ import annotations

from dualign.common import cpu

cpu.tune()

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from common import RESULTS, machine, save, spread, table
from dualign.common.types import Prompt
from dualign.models.load import load_model
from dualign.models.policy import Policy
from dualign.models.settings import ModelConfig
from dualign.rollout.base import Request, Sampling
from dualign.rollout.hf.sampler import HFSampler
from dualign.rollout.settings import VLLMSettings
from dualign.rollout.vllm.sampler import VLLMSampler

SHAPE = {"hidden_size": 640, "intermediate_size": 1728, "num_hidden_layers": 12, "num_attention_heads": 10}
VOCABULARY, PROMPT = 32000, 64


def make_model(folder: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    said = [
        "In",
        "1847",
        "the",
        "harbour",
        "of",
        "saw",
        "ships",
        "by",
        "noon",
        "a",
        "clerk",
        "wrote",
        "and",
        "his",
        "book",
    ]
    words = ["<unk>", "<pad>", "<end>", *said]
    known = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    known.pre_tokenizer = Whitespace()
    torch.manual_seed(0)
    settings = {"vocab_size": VOCABULARY, "num_key_value_heads": 2, "max_position_embeddings": 2048}
    ends = {"eos_token_id": 2, "pad_token_id": 1, "bos_token_id": None, "tie_word_embeddings": False}
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, **settings, **ends))
    model.to(torch.bfloat16).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=known, eos_token="<end>", pad_token="<pad>").save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", required=True, help="the interpreter that has vLLM")
    parser.add_argument("--eager", action="store_true", help="vLLM without compilation: it starts sooner")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--precision", default="bf16", choices=("bf16", "fp32"))
    for name, default in {"prompts": 32, "k": 4, "tokens": 64, "repeats": 3}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    o = parser.parse_args()
    about = machine()
    with tempfile.TemporaryDirectory() as place:
        rates, gap, syncs = measure(Path(place), o)
    ratios = [theirs / own for own, theirs in zip(rates["own loop"], rates["vLLM"], strict=True)]
    rows = [[name, spread(values, 0)] for name, values in rates.items()]
    rows += [["vLLM / own loop", spread(ratios)]]
    rows += [["first sync, with the server's start and its trial, s", f"{syncs[0]:.1f}"]]
    rows += [["later syncs, s", spread(syncs[1:])], ["distance of log-probs, nats a token", f"{gap:.4f}"]]
    head = [f"{o.prompts} prompts of {PROMPT} tokens × {o.k}, {o.tokens} new tokens, {o.precision}", "median (min-max)"]
    record = {"machine": about, "options": {k: str(v) for k, v in vars(o).items()}, "rates": rates, "syncs": syncs}
    print(save("vllm", record | {"gap": gap}, table(head, rows), o.out).read_text())


def measure(place: Path, o: argparse.Namespace) -> tuple[dict[str, list[float]], float, list[float]]:
    """Useful tokens per second of each, the mean distance of their log-probs of the same tokens, seconds of each sync."""
    os.environ["DUALIGN_CACHE"] = str(place / "cache")
    make_model(place / "model")
    hf, tokenizer = load_model(ModelConfig(name=str(place / "model"), precision=o.precision))
    policy = Policy(hf.to("cuda" if torch.cuda.is_available() else "cpu"), o.precision)
    own = HFSampler(policy, tokenizer, o.prompts * o.k)
    policy.freeze()
    vllm = VLLMSampler(
        VLLMSettings(serve=True, python=o.python, max_model_len=512, args=["--enforce-eager"] * o.eager),
        policy,
        tokenizer,
    )
    draw = np.random.default_rng(0)
    ids = draw.integers(3, VOCABULARY, (o.prompts, PROMPT)).tolist()
    requests = [Request(g, Prompt(f"p{g}", ""), tuple(each)) for g, each in enumerate(ids)]
    sampling, syncs, gaps = Sampling(o.k, o.tokens, 1.0), list[float](), list[float]()

    def weights():  # type: ignore[no-untyped-def]
        return ((name, value.to(policy.dtype)) for name, value in policy.model.state_dict().items())

    def sync() -> None:
        start = time.perf_counter()
        vllm.sync(weights)
        syncs.append(time.perf_counter() - start)

    def rate(sample: Callable[..., None], batch: int) -> float:
        rollouts: list = []
        start = time.perf_counter()
        sample(requests, sampling, (0, batch), rollouts.append)
        seconds = time.perf_counter() - start
        with torch.no_grad():
            for r in rollouts[:4] if sample == vllm.sample else ():
                logp = policy.alone(r.prompt_ids, r.completion_ids)
                gaps.append(float((logp - torch.tensor(r.sampler_logp)).abs().mean()))
        return sum(len(r.completion_ids) for r in rollouts) / seconds

    found: dict[str, list[float]] = {"own loop": [], "vLLM": []}
    try:
        for batch in range(o.repeats + 1):
            sync()
            pair = {"own loop": rate(own.sample, batch), "vLLM": rate(vllm.sample, batch)}
            if batch:  # the first one warms up
                for name, value in pair.items():
                    found[name].append(value)
    finally:
        vllm.close()
    return found, float(np.mean(gaps)), syncs


if __name__ == "__main__":
    main()
