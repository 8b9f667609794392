"""Memory of each process with a model of random weights, whole and divided over 1, 2 and 4 (train.shard).

    python benchmarks/shard_memory.py [--worlds 1 2 4] [--hidden 1024 --layers 28]      # 0.4B; 768 and 16: 0.2B

One online batch of DAR with AdamW, fp32, on gloo: bytes of the tensors that stay (weights and fp32 masters, gradients,
optimizer state, π_0), and resident memory between phases and at its peak within the updates. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

from common import RESULTS, machine, save, table

OVERRIDES = {
    "model.precision": "fp32",  # a processor without bf16 units takes minutes for what this does in seconds
    "reward": "[]",
    "rollout.log_probs": "recomputed",
    "rollout.k": 2,
    "rollout.max_new_tokens": 4,
    "algo.skip_below": 0,
    "data.eval": "null",
    "train.online_batches": 1,
    "train.online_batch": 8,
    "train.update_size": 8,
    "train.micro_batch_tokens": 64,
    "train.optimizer": "adamw",
}


def length(completions: list[Any], **columns: Any) -> list[float]:
    return [float(len(c[-1]["content"])) for c in completions]


def random_model(folder: Path, hidden: int, layers: int) -> None:
    """Random weights, untied, with SmolLM2's tokenizer."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from dualign import assets

    tokenizer: Any = AutoTokenizer.from_pretrained(assets.resolve("smollm2-135m-instruct"))
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    torch.manual_seed(0)
    sizes = {"hidden_size": hidden, "intermediate_size": hidden * 11 // 4, "num_hidden_layers": layers}
    heads = {"num_attention_heads": 16, "num_key_value_heads": 4, "vocab_size": 49152}
    LlamaForCausalLM(LlamaConfig(**sizes, **heads, **ids)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def status(name: str) -> int:
    """A number of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def size(tensors: Iterable[Any]) -> int:
    """Bytes of the memory behind tensors, each counted once."""
    local = [t.to_local() if hasattr(t, "to_local") else t for t in tensors]
    return sum({s.data_ptr(): s.nbytes() for t in local if t.numel() for s in [t.untyped_storage()]}.values())


def worker(folder: Path, shard: str) -> None:
    """One process of a run: writes what it held to `folder`/RANK.json."""
    from dualign import trainer
    from dualign.config import load
    from dualign.training.engine import Engine

    found: dict[str, int] = {}

    class Watched(Engine):
        def _gradients(self, *args: Any) -> Any:
            found["peak before updates"] = status("VmHWM")
            found["resident before updates"] = status("VmRSS")
            Path("/proc/self/clear_refs").write_text("5")
            return super()._gradients(*args)

        def _step(self, loss: float) -> float:
            masters = self.masters.named.values()
            stays = [p for m in self.modules for p in m.parameters()]
            found["weights and masters"] = size([*stays, *masters, *self.masters.lower.values()])
            found["gradients"] = size(p.grad for p in masters if p.grad is not None)
            found["π_0"] = size(self.reference.parameters()) if self.reference else 0
            norm = super()._step(loss)
            state = [v for entry in self.optimizer.state.values() for v in entry.values() if hasattr(v, "numel")]
            found["optimizer state"] = size(state)
            found["peak of an update"] = status("VmHWM")
            return norm

    trainer.Engine = Watched  # type: ignore[misc]
    set_to = [f"{key}={value}" for key, value in OVERRIDES.items()]
    config = load(
        "quickstart", [f"model.name={folder / 'model'}", f"run.dir={folder / 'run'}", f"train.shard={shard}", *set_to]
    )
    trainer.train(config, reward=length, quiet=True)
    (folder / f"{os.environ.get('RANK', 0)}.json").write_text(json.dumps(found))


def measured(shard: str, world: int, model: Path) -> list[dict[str, int]]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "model").symlink_to(model)
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"] if world > 1 else []
        command = [sys.executable, *launcher, __file__, "--worker", str(folder), shard]
        subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(world)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worlds", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--worker", nargs=2, metavar=("FOLDER", "SHARD"), help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=RESULTS)
    o = parser.parse_args()
    if o.worker:
        return worker(Path(o.worker[0]), o.worker[1])
    record: dict[str, Any] = {"machine": machine(), "overrides": OVERRIDES, "runs": []}
    record |= {"hidden": o.hidden, "layers": o.layers}
    lines: list[list[str]] = []
    head: list[str] = []
    with tempfile.TemporaryDirectory() as name:
        make = f"import pathlib, shard_memory as s; s.random_model(pathlib.Path({name!r}), {o.hidden}, {o.layers})"
        subprocess.run([sys.executable, "-c", make], check=True, cwd=Path(__file__).parent)
        for shard, world in [("none", 1), *(("full", world) for world in o.worlds)]:
            found = measured(shard, world, Path(name))
            record["runs"].append({"shard": shard, "world": world, "processes": found})
            head = ["train.shard", "processes", *found[0]]
            most = [max(each[key] for each in found) / 1e9 for key in found[0]]
            lines.append([shard, str(world), *(f"{value:.2f}" for value in most)])
            print(lines[-1], flush=True)
            about = f"{o.layers} layers of width {o.hidden}; GB, of the process that holds most.\n\n"
            page = save(f"shard-memory-{o.hidden}", record, about + table(head, lines), o.out)
    print(table(head, lines), page, sep="\n")


if __name__ == "__main__":
    main()
