"""One run of one system for against_trl.py, in a process of its own: `one_run.py SYSTEM WORK FOLDER`.

Writes FOLDER/result.json: seconds (wall clock) and tokens per counted online batch, seconds by phase, peak memory.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

from dualign.common import cpu

os.environ["HF_HUB_OFFLINE"] = "1"
if sys.argv[1].startswith("dualign"):  # what its command line does; TRL's environment is left as it is
    cpu.tune()

from against_trl import RANDOM, SYSTEMS, Work
from common import DTYPES, forward_flops, matmul_rate, pairs_of
from dualign import assets
from dualign.data.rows import load_prompts
from dualign.data.settings import DataConfig

LR, WARMUP, TEMPERATURE = 1e-5, 15, 0.9
BETA = {"GRPO": 0.04, "RLOO": 0.03}  # dualign's defaults, given to TRL
PASSES = 5  # decoding, log π_0, and an update's forward and backward (twice a forward)
RESCORED = 0.5  # of a pass more: log π_t of the rows that are not in the first of the two updates, unless recorded


def share_of_e(completions: list[Any], **columns: Any) -> list[float]:
    """A reward that costs nothing and differs from completion to completion."""
    texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
    return [text.count("e") / max(1, len(text)) for text in texts]


def run_dualign(overrides: list[str], work: Work, model: str, prompts: Path, folder: Path) -> dict[str, Any]:
    from dualign import trainer
    from dualign.config import load

    class Timed(trainer.Trainer):
        """Notes when each online batch was done, before the last one's checkpoint is written."""

        def _finish_batch(self, b: Any, losses: Any, clock: Any) -> None:
            ends.append(time.perf_counter())
            seconds.append(dict(clock.seconds))
            pairs = pairs_of(b)
            tokens.append(sum(sum(lengths) for _, lengths in pairs))
            passes = PASSES + RESCORED * (self.config.rollout.log_probs == "recomputed")
            tflop.append(passes * forward_flops(self.engine.policy.model.config, pairs) / 1e12)
            peaks.append(peak_mb())
            super()._finish_batch(b, losses, clock)

    ends: list[float] = []
    seconds: list[dict[str, float]] = []
    tokens: list[int] = []
    tflop: list[float] = []
    peaks: list[float] = []
    trainer.Trainer = Timed  # type: ignore[misc]
    n = work.prompts * work.k
    train = {"online_batches": work.batches + 1, "online_batch": n, "update_size": n // 2}
    train |= {"lr": LR, "warmup": WARMUP, "decay": 0.0}
    config = load(
        "quickstart",
        [
            "rollout.log_probs=recomputed",  # as TRL does: equal work, unless the overrides say otherwise
            *overrides,
            f"model.name={model}",
            f"model.precision={work.precision}",
            f"data.train={prompts}",
            "data.eval=null",
            "data.shuffle=false",
            "reward=[]",
            f"rollout.k={work.k}",
            f"rollout.max_new_tokens={work.tokens}",
            f"rollout.temperature={TEMPERATURE}",
            f"run.dir={folder / 'run'}",
            *(f"train.{key}={value}" for key, value in train.items()),
        ],
    )
    trainer.train(config, reward=share_of_e, quiet=True)
    phases = {p: sum(s[p] for s in seconds[1:]) / work.batches for p in seconds[-1]}
    return {
        "seconds": (ends[-1] - ends[0]) / work.batches,
        "tokens": sum(tokens[1:]) / work.batches,
        "phases": phases,
        "peak_mb": peaks[-1],
        "peak_with_checkpoint_mb": peak_mb(),  # TRL writes none here
        "tflop": sum(tflop[1:]) / work.batches,
        "tflop_per_second": rate(model, work.precision),
    }


def run_trl(options: list[str], work: Work, model: str, prompts: Path, folder: Path) -> dict[str, Any]:
    import torch
    import trl
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl.extras.profiling import ProfilingContext

    kind, checkpointing = options[0], options[1:] != ["off"]
    n = work.prompts * work.k
    size = next(s for s in (8, 4, 2, 1) if n // 2 % s == 0)  # rows of one forward pass: 8 is the default
    ends: list[float] = []
    spent: dict[str, float] = {}
    tokens: list[int] = []

    def counted(completion_ids: list[list[int]], completions: list[Any], **columns: Any) -> list[float]:
        tokens.append(sum(map(len, completion_ids)))
        return share_of_e(completions)

    def note(self: Any, duration: float) -> None:
        name = self.name.partition(".")[2]
        spent[name] = spent.get(name, 0.0) + duration

    class Timer(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            ends.append(time.perf_counter())
            if len(ends) == 2:  # the warm-up
                spent.clear()

    ProfilingContext._log_metrics = note  # what TRL would send to a tracker
    settings = getattr(trl, f"{kind}Config")(
        output_dir=str(folder / "run"),
        use_cpu=not torch.cuda.is_available(),
        gradient_checkpointing=checkpointing,
        bf16=work.precision == "bf16",
        optim="adafactor",
        learning_rate=LR,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=WARMUP,
        per_device_train_batch_size=size,
        gradient_accumulation_steps=n // 2 // size,
        generation_batch_size=n,
        num_generations=work.k,
        max_completion_length=work.tokens,
        temperature=TEMPERATURE,
        shuffle_dataset=False,
        beta=BETA[kind],
        max_steps=2 * (work.batches + 1),
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        **({"loss_type": "grpo"} if kind == "GRPO" else {}),
    )
    rows = [json.loads(line) for line in prompts.read_text(encoding="utf-8").splitlines()]
    trainer = getattr(trl, f"{kind}Trainer")(
        model=assets.resolve(model),
        reward_funcs=counted,
        args=settings,
        train_dataset=Dataset.from_list(rows),
        callbacks=[Timer()],
    )
    trainer.train()
    total = ends[-1] - ends[1]
    prepared = spent.get("_prepare_inputs", 0.0)
    sample, label = spent.get("transformers.generate", 0.0), spent.get("_calculate_rewards", 0.0)
    phases = {"sample": sample, "label": label, "score": prepared - sample - label, "update": total - prepared}
    return {
        "seconds": total / work.batches,
        "tokens": sum(tokens[1:]) / work.batches,
        "phases": {name: value / work.batches for name, value in phases.items()},
        "peak_mb": peak_mb(),
    }


def peak_mb() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used / (2**20 if sys.platform == "darwin" else 2**10)


def rate(model: str, precision: str) -> float:
    """TFLOP/s of products in that precision: the better of a large square one and the model's own shapes at 1024 tokens."""
    from transformers import AutoConfig

    c = AutoConfig.from_pretrained(assets.resolve(model))
    d = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    h, q, kv, inner = c.hidden_size, c.num_attention_heads * d, c.num_key_value_heads * d, c.intermediate_size
    layer = [(1024, h, q), (1024, h, kv), (1024, h, kv), (1024, q, h), (1024, h, inner), (1024, h, inner)]
    own = [*layer, (1024, inner, h), (1024, h, c.vocab_size)]
    return max(matmul_rate(shapes, dtype=DTYPES[precision]) for shapes in ([(4096, 4096, 4096)], own)) / 1e12


def random_model(vocabulary: int, folder: Path) -> str:
    """A small Llama with random weights and SmolLM2's tokenizer."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(assets.resolve(Work.model))
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            hidden_size=256,
            intermediate_size=768,
            num_hidden_layers=6,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=vocabulary,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            tie_word_embeddings=True,
        )
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def main() -> None:
    system, work, folder = sys.argv[1], Work(**json.loads(sys.argv[2])), Path(sys.argv[3])
    source = "builtin:quickstart/train"
    chosen = load_prompts(source, DataConfig(train=source), "train")
    wanted = work.prompts * (work.batches + 1)
    prompts = folder / "prompts.jsonl"
    lines = [json.dumps({"prompt": chosen[i % len(chosen)].messages}) for i in range(wanted)]
    prompts.write_text("\n".join(lines) + "\n", encoding="utf-8")
    made = work.model.startswith(RANDOM)
    model = random_model(int(work.model.removeprefix(RANDOM)), folder / "model") if made else work.model
    function = run_dualign if system.startswith("dualign") else run_trl
    result = function(SYSTEMS[system], work, model, prompts, folder)
    (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main()
