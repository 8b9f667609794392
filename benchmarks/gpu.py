"""One CUDA device: model FLOPs utilisation of the update phase, seconds per online batch by phase, memory.

    python benchmarks/gpu.py [--shapes 0.5b 1.5b 7b] [--batches 2] [--shard full] [--no-compile] [--no-cuda-graphs]
        [--kernels]

Models with the shapes of Qwen2.5-0.5B and 1.5B and of Qwen2-7B (with gradient checkpointing) and random weights (what
they say does not matter to time: no answer ends early), bf16 autocast over fp32 masters; DAR on 512 completions (128
prompts of 128 tokens, K = 4, 256 new tokens), updates of 128. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common import RESULTS, forward_flops, machine, matmul_rate, online_batch, pairs_of, save, spread, table
from dualign import rollout
from dualign.common.types import Prompt, Rollout
from dualign.config import Config, build
from dualign.rollout.base import Request
from dualign.training.engine import Engine
from dualign.training.machine import Machine
from dualign.training.parallelize import load_policy

COMMON = {"vocab_size": 151936, "num_key_value_heads": 2, "max_position_embeddings": 32768, "tie_word_embeddings": True}
LARGE = {"vocab_size": 152064, "num_key_value_heads": 4, "tie_word_embeddings": False}
SHAPES: dict[str, dict[str, Any]] = {
    "0.5b": COMMON
    | {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14},
    "1.5b": COMMON
    | {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12},
    "7b": COMMON
    | LARGE
    | {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28},
}
CHECKPOINTED = {"7b": 8192}  # shapes whose activations are made again, and the tokens of their micro-batches
# dense bf16, from the vendor's data sheets; the first name that the device's holds
PEAK_TFLOPS = {"H100 PCIe": 756, "H200": 989, "H100": 989, "A100": 312, "L40S": 362, "L4": 121, "A10": 125}
PHASES = ("sample", "score π_t", "score π_0", "update")


def make_model(shape: dict[str, Any], folder: Path) -> None:
    """Random weights and a tokenizer of three words: prompts are made of ids."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    words = Tokenizer(WordLevel({"<unk>": 0, "<pad>": 1, "<end>": 2}, unk_token="<unk>"))
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = Qwen2ForCausalLM(Qwen2Config(**shape, eos_token_id=2, pad_token_id=1, bos_token_id=None))
    model.to(torch.bfloat16).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", pad_token="<pad>").save_pretrained(folder)


def configure(folder: Path, name: str, o: argparse.Namespace) -> Config:
    return build(
        {
            "model": {"name": str(folder), "gradient_checkpointing": name in CHECKPOINTED},
            "data": {"train": "random ids"},
            "rollout": {
                "k": 4,
                "max_new_tokens": o.tokens,
                "rows": o.online_batch,
                "options": {"cuda_graphs": not o.no_cuda_graphs},
            },
            "algo": {"name": "dar"},
            "train": {
                "online_batches": o.batches,
                "online_batch": o.online_batch,
                "update_size": o.online_batch // 4,
                "micro_batch_tokens": CHECKPOINTED.get(name, o.micro_batch_tokens),
                "shard": o.shard,
                "compile": not o.no_compile,
            },
        }
    )


class Meter:
    """Seconds and peak memory by phase, the device's queue emptied at both ends; if told so, also the milliseconds of
    each kernel."""

    def __init__(self, kernels: bool = False) -> None:
        self.seconds: dict[str, float] = {}
        self.gib: dict[str, float] = {}
        self.kernels: dict[str, dict[str, list[float]]] = {}  # milliseconds of each launch, by phase and kernel
        self.watched = kernels

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        cuda = torch.cuda.is_available()
        if cuda:
            torch.cuda.reset_peak_memory_stats()
            torch.cuda.synchronize()
        activities = [torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) if self.watched else nullcontext() as profiler:
            start = time.perf_counter()
            yield
            if cuda:
                torch.cuda.synchronize()
                self.gib[phase] = max(self.gib.get(phase, 0.0), torch.cuda.max_memory_allocated() / 2**30)
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start
        if profiler:
            kernels = self.kernels.setdefault(phase, {})
            for event in profiler.events():
                if event.device_type == torch.autograd.DeviceType.CUDA:
                    kernels.setdefault(event.name, []).append(event.device_time / 1e3)

    def by_kernel(self, phase: str) -> list[tuple[str, float, int]]:
        """(kernel, milliseconds, launches), the longest first."""
        return sorted(((name, sum(ms), len(ms)) for name, ms in self.kernels[phase].items()), key=lambda x: -x[1])


def measure(name: str, o: argparse.Namespace) -> list[dict[str, Any]]:
    """Seconds, memory and FLOPs of each counted online batch; the first, which is not counted, warms up."""
    shape = SHAPES[name]
    gc.collect()
    torch.cuda.empty_cache()
    with tempfile.TemporaryDirectory() as folder:
        make_model(shape, Path(folder))
        config = configure(Path(folder), name, o)
        machine = Machine(config)
        policy, tokenizer = load_policy(config, machine.device)
        sampler = rollout.build(config.rollout, policy, tokenizer)
        engine = Engine(config, machine, policy, tokenizer)
    numbers, found = np.random.default_rng(0), []
    for step in range(o.batches + 1 + o.kernels):
        ids = numbers.integers(3, shape["vocab_size"], (config.prompts_per_batch, o.prompt_tokens)).tolist()
        requests = [Request(g, Prompt(str(g), "random ids"), tuple(row)) for g, row in enumerate(ids)]
        meter = Meter(kernels=step > o.batches)
        b = online_batch(config, engine, sampler, requests, step, _reward, meter)
        pairs = pairs_of(b)
        tokens = sum(sum(lengths) for _, lengths in pairs)
        flop = 3 * forward_flops(engine.policy.model.config, pairs)  # forward, and twice that for backward
        if meter.kernels:
            print(f"\n{kernel_table(meter)}\n")
        else:
            found.append({"seconds": meter.seconds, "gib": meter.gib, "tokens": tokens, "update_flop": flop})
    return found[1:]


def kernel_table(meter: Meter) -> str:
    """For each phase its kernels, and for how much of its time (longer than without a profiler) the device was busy."""
    rows = []
    for phase in meter.kernels:
        kernels = meter.by_kernel(phase)
        busy = sum(ms for _, ms, _ in kernels)
        rows.append([phase, "all", f"{busy:.1f}", str(sum(n for *_, n in kernels)), f"of {meter.seconds[phase]:.2f} s"])
        rows += [[phase, name[:110], f"{ms:.1f}", str(n), f"{ms / busy:.0%}"] for name, ms, n in kernels[:30]]
    return table(["phase", "kernel", "ms", "launches", "share"], rows)


def _reward(rollout: Rollout) -> float:
    return float(np.mean(rollout.completion_ids))


def peak(name: str) -> float | None:
    return next((tflops * 1e12 for known, tflops in PEAK_TFLOPS.items() if known in name), None)


def row(shape: str, found: list[dict[str, Any]], rates: dict[str, float]) -> list[str]:
    def seconds(phase: str) -> float:
        return statistics.median(x["seconds"][phase] for x in found)

    total = spread([sum(x["seconds"].values()) for x in found])
    use = [spread([x["update_flop"] / x["seconds"]["update"] / rate for x in found]) for rate in rates.values()]
    speed = spread([x["tokens"] / x["seconds"]["sample"] for x in found], 0)
    gib = max(value for x in found for value in x["gib"].values())
    return [shape, total, *(f"{seconds(p):.2f}" for p in PHASES), *use, speed, f"{gib:.1f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--batches", type=int, default=2, help="online batches counted, after one to warm up")
    parser.add_argument("--online-batch", type=int, default=512)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--micro-batch-tokens", type=int, default=16384)
    parser.add_argument("--shard", choices=["none", "full"], default="none", help="full: by FSDP2, with one process")
    parser.add_argument("--no-compile", action="store_true", help="layers as they are")
    parser.add_argument("--no-cuda-graphs", action="store_true", help="every step of decoding launched by hand")
    parser.add_argument("--kernels", action="store_true", help="one more batch, with a table of the kernels' times")
    parser.add_argument("--peak", type=float, help="the device's dense bf16 TFLOP/s, where it is not known here")
    parser.add_argument("--out", type=Path, default=RESULTS)
    o = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit(
            "benchmarks/gpu.py measures one CUDA device, and torch sees none here. On a machine with one, install the "
            "CUDA build of torch (constraints.txt pins the CPU build) and run it again; `make bench` is for CPUs."
        )
    device = torch.cuda.get_device_name()
    rates = {"matmul": matmul_rate([(8192, 8192, 8192)], "cuda", 3.0)}
    if known := o.peak * 1e12 if o.peak else peak(device):
        rates["data sheet"] = known
    about = machine() | {"gpu": device, "tflop_per_second": {k: round(v / 1e12, 1) for k, v in rates.items()}}
    record: dict[str, Any] = {"machine": about, "options": vars(o) | {"out": str(o.out)}, "shapes": {}}
    head = ["model", "s per online batch", *PHASES, *(f"update's share of {r} rate" for r in rates)]
    head += ["decoded tokens/s", "peak GiB"]
    rows = []
    for shape in o.shapes:
        record["shapes"][shape] = measure(shape, o)
        rows.append(row(shape, record["shapes"][shape], rates))
        page = save("gpu" if o.shard == "none" else "gpu-divided", record, table(head, rows), o.out)
    print(f"{table(head, rows)}\n{page}")


if __name__ == "__main__":
    main()
