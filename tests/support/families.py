"""Every causal family of the installed transformers, as a tiny model with random weights, and what dualign makes of it.

`python tests/support/families.py [NAME ...]` says a line of each; with `--markdown` it prints docs/models.md.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from dualign.common.errors import UserError
from dualign.common.types import Prompt
from dualign.models.adapters import with_lora
from dualign.models.critic import Critic
from dualign.models.packing import Tokens
from dualign.models.policy import Policy, load_model
from dualign.models.settings import LoraConfig, ModelConfig
from dualign.rollout.base import Request, Sampling
from dualign.rollout.hf.sampler import HFSampler
from tiny import make_tokenizer

TINY: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "embedding_size", "lru_width"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim"), 48),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "rotary_dim"), 4),
    **dict.fromkeys(("head_dim", "v_head_dim", "qk_rope_head_dim", "qk_nope_head_dim", "query_pre_attn_scalar"), 8),
    **dict.fromkeys(("state_size", "mamba_d_state", "mamba_n_heads", "mamba_d_head"), 8),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "hidden_size_per_layer_input"), 8),
    **dict.fromkeys(("sliding_window", "attention_chunk_size"), 8),
    **dict.fromkeys(("num_key_value_heads", "num_experts_per_tok", "linear_num_key_heads", "mamba_expand"), 2),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "shared_expert_intermediate_size"), 16),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace", "num_shared_experts", "mamba_n_groups"), 1),
    **dict.fromkeys(("attention_dropout", "hidden_dropout", "dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
    **dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob", "activation_dropout"), 0.0),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), 512),
    **dict.fromkeys(("initializer_range", "init_std"), 0.2),
    "moe_intermediate_size": 24,
    "linear_num_value_heads": 4,
    "encoder_layers": 1,
    "is_decoder": True,
    "tie_word_embeddings": True,
}
MORE: dict[str, dict[str, Any]] = {  # what a family needs beside, or in place, of these
    "falcon": {"head_dim": None},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 8},
    "mamba2": {"num_heads": 8, "chunk_size": 16, "n_groups": 1},
    "opt": {"word_embed_proj_dim": 16},
    "recurrent_gemma": {"num_hidden_layers": 3, "attention_window_size": 8},
    "xlnet": {"max_position_embeddings": None},
}
VARIANTS = {  # families whose settings change how attention sees
    "qwen2 (windows)": ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
    "qwen3 (windows)": ("qwen3", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
    "mistral (no window)": ("mistral", {"sliding_window": None}),
    "phi3 (no window)": ("phi3", {"sliding_window": None}),
    "falcon (alibi)": ("falcon", {"head_dim": None, "alibi": True}),
    "gemma2 (caps of 2)": ("gemma2", {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 2.0}),
    "llama (biases, untied)": ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False}),
    "granite (multipliers)": ("granite", {"embedding_multiplier": 3.0, "logits_scaling": 2.0}),
}
LARGE = 4_000_000  # parameters of a model that could not be made small
PROMPTS = ("hello there, how are you today", "a", "tell me: the quick brown fox jumps over the lazy dog, twice")


def configuration(family: str, more: dict[str, Any], tokenizer: Any) -> Any:
    """A tiny configuration of a family, with one layer at least of every kind that it has."""
    cls = CONFIG_MAPPING[family]
    default = cls()
    ids = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    wanted = TINY | ids | {"bos_token_id": None, "vocab_size_per_layer_input": len(tokenizer)}
    settings = {k: v for k, v in wanted.items() if _has(default, k)} | more
    settings = {k: v for k, v in settings.items() if v is not None or k in ("sliding_window", "bos_token_id")}
    kinds = list(dict.fromkeys(getattr(default, "layer_types", None) or ()))
    if kinds and "max_window_layers" not in more:
        layers = max(2, len(kinds))
        with contextlib.suppress(Exception):
            return cls(**settings | {"num_hidden_layers": layers, "layer_types": (kinds * layers)[:layers]})
    return cls(**settings)


def _has(config: Any, name: str) -> bool:
    try:
        return hasattr(config, name)
    except Exception:  # a property that speaks of another layout
        return False


def models() -> dict[str, tuple[str, dict[str, Any]]]:
    """(family, settings) by name."""
    return {f: (f, MORE.get(f, {})) for f in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)} | VARIANTS


def build(name: str, folder: Path) -> bool:
    """Saves the tiny model; False where the family cannot be built small."""
    family, more = models()[name]
    tokenizer = make_tokenizer()
    try:
        config = configuration(family, more, tokenizer)
        with torch.device("meta"):
            size = sum(p.numel() for p in transformers.AutoModelForCausalLM.from_config(config).parameters())
        if size > LARGE:
            return False
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            model(torch.arange(4)[None])
    except Exception:  # not ours: the family does not build from a configuration, or not without more packages
        return False
    for parameter_name, p in model.named_parameters():
        if p.dim() == 1 and "norm" in parameter_name and "bias" not in parameter_name:
            p.data.add_(torch.randn_like(p) * 0.1)
    if model.generation_config is not None:
        model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return True


def alone(model: Any, prompt: tuple[int, ...], completion: tuple[int, ...], precision: str) -> torch.Tensor:
    """(T,) log-probs of a completion by one plain forward pass."""
    ids = torch.tensor([[*prompt, *completion]])
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        logits = model(input_ids=ids, use_cache=False).logits
    logp = torch.log_softmax(logits.float(), -1)[0, len(prompt) - 1 : -1]
    return logp.gather(1, ids[0, len(prompt) :, None])[:, 0]


def sampled(policy: Policy, tokenizer: Any, new: int = 24) -> list[Any]:
    requests = [Request(i, Prompt(str(i), t), tokenizer.prompt(Prompt(str(i), t))) for i, t in enumerate(PROMPTS)]
    out: list[Any] = []
    HFSampler(policy, tokenizer, 64).sample(requests, Sampling(2, new, 1.0), (0, 0), out.append)
    return sorted(out, key=lambda r: r.index)


def tokens_of(rollouts: list[Any]) -> Tokens:
    return Tokens(
        tuple(r.prompt_ids for r in rollouts),
        tuple(r.completion_ids for r in rollouts),
        tuple(r.group for r in rollouts),
    )


def off(found: list[torch.Tensor], expected: list[torch.Tensor], precision: str) -> float:
    """The largest mean distance of a completion's log-probs, in nats a token. In bf16 the median completion's: rounding
    may choose another expert, in some, and what is wrong is wrong in most."""
    gaps = [float((a[: len(b)] - b).abs().mean()) for a, b in zip(found, expected, strict=True)]
    if any(gap != gap for gap in gaps):
        return float("nan")
    return max(gaps) if precision == "fp32" else median(gaps)


def check(name: str, folder: Path, precision: str) -> dict[str, str]:
    """What is found, by column: a word where it is right, what is wrong behind an exclamation mark."""
    try:
        model, tokenizer = load_model(ModelConfig(name=str(folder), precision=precision))
        policy = Policy(model, precision).eval()
        rollouts = sampled(policy, tokenizer)
    except UserError as error:
        return {"decode": f"refused: {error}"}
    attention = "eager" if model.config._attn_implementation == "eager" else "sdpa"
    plain = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation=attention
    ).eval()
    expected = [alone(plain, r.prompt_ids, r.completion_ids, precision) for r in rollouts]
    way = policy.decoding
    limit = max(1e-3, way.allowance(precision))
    tokens = tokens_of(rollouts)
    micro = policy.pack(tokens, range(len(rollouts)), tokenizer.pad_id)
    logp = policy(micro)
    found = {}
    gap = off([torch.tensor(r.sampler_logp) for r in rollouts], [e.detach() for e in expected], precision)
    words = "our loop" if way.own else "its own cache"
    found["decode"] = words if gap <= limit else f"! {words}: off by {gap:.2g} nats a token"
    gap = off(list(logp.detach()), [e.detach() for e in expected], precision)
    shared = "shared prompts" if policy.share else "plain rows"
    found["score"] = shared if gap <= limit else f"! {shared}: off by {gap:.2g} nats a token"
    if precision == "fp32":
        found["gradient"] = gradient(policy, plain, logp, expected)
    found["LoRA"] = tried(lambda: lora(folder, precision))
    found["PPO"] = tried(lambda: ppo(policy, micro))
    return found


def gradient(policy: Policy, plain: Any, logp: torch.Tensor, expected: list[torch.Tensor]) -> str:
    weight = torch.zeros_like(logp)
    for i, e in enumerate(expected):
        weight[i, : len(e)] = torch.linspace(0.5, 1.5, len(e))
    sum((e * w[: len(e)]).sum() for e, w in zip(expected, weight, strict=True)).backward()
    (logp * weight).sum().backward()
    theirs = {n: p.grad for n, p in plain.named_parameters() if p.grad is not None}
    ours = {n: p.grad for n, p in policy.model.named_parameters() if p.grad is not None}
    scale = max(float(g.norm()) for g in theirs.values())
    gaps = {n: float((ours.get(n, torch.zeros_like(g)) - g).norm()) / scale for n, g in theirs.items()}
    where = max(gaps, key=lambda n: gaps[n])
    return "right" if gaps[where] <= 1e-3 and set(ours) <= set(theirs) else f"! off by {gaps[where]:.2g} at {where}"


def lora(folder: Path, precision: str) -> str:
    """Adapters that say something, sampled with and scored."""
    config = ModelConfig(name=str(folder), precision=precision, lora=LoraConfig(r=4))
    model, tokenizer = load_model(config)
    policy = Policy(model, precision)
    decoding = HFSampler(policy, tokenizer, 64).decoding
    policy.take_adapters(with_lora(policy.model, config, None))
    torch.manual_seed(1)
    for n, p in policy.model.named_parameters():
        if "lora_B" in n:
            p.data.normal_(std=0.1)
    policy.eval()
    rollouts = sampled(policy, tokenizer, 12)
    tokens = tokens_of(rollouts)
    logp = policy(policy.pack(tokens, range(len(rollouts)), tokenizer.pad_id))
    merged = policy.model.merge_and_unload()
    with torch.no_grad():
        expected = [alone(merged, r.prompt_ids, r.completion_ids, precision) for r in rollouts]
    sampler = [torch.tensor(r.sampler_logp) for r in rollouts]
    gap = max(off(found, expected, precision) for found in (sampler, list(logp.detach())))
    limit = max(1e-3, 2 * decoding.allowance(precision))
    return "right" if gap <= limit else f"! off by {gap:.2g} nats a token"


def ppo(policy: Policy, micro: Any) -> str:
    critic = Critic(policy)
    torch.nn.init.normal_(critic.value.weight)
    value = critic(micro)
    value.sum().backward()
    return "right" if value.isfinite().all() and bool(value.any()) else "! values are not finite"


def tried(work: Any) -> str:
    try:
        return work()
    except UserError as error:
        return f"refused: {error}"


def sweep(names: list[str], precision: str) -> dict[str, dict[str, str]]:
    found = {}
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            if not build(name, Path(folder)):
                continue
            try:
                found[name] = check(name, Path(folder), precision)
            except Exception as error:
                found[name] = {"decode": f"! {type(error).__name__}: {error}"}
    return found


INTRODUCTION = """# Models

What dualign makes of the causal families of transformers {version}: tiny models with random weights, one of each
family that builds from a configuration, in fp32. `python tests/support/families.py --markdown` makes this page. The
slow tests hold it, and try the families in bf16, too.

- **decode**: how completions are sampled, found out on loading by comparing a few short texts with plain forward
  passes, past every window. *Our loop* keeps keys and values and says by masks what each kind of layer sees. *Its
  own cache*: transformers' `generate` with the model's own cache and masks, prompts of one length at a time. It is
  right and slower (a warning says so). *Refused*: the run does not begin, and the error says why.
- **score**: how log-probs of given completions are computed. *Shared prompts*: a prompt once for its completions.
  *Plain rows*: every completion with its own prompt.
- **gradient**: of a weighted sum of log-probs, against transformers' own model in fp32.
- **LoRA**: adapters on all linear layers are sampled with and scored as the merged model says. *Refused*: a layer
  of the family does not work with adapters; `model.lora.target_modules` names those that are to have them.
- **PPO**: the value model's width and gradient.

A family that is not in the table is tried on loading all the same. `rollout.log_probs: recorded` is allowed only
where decoding agreed in the run's own precision, and `sampler_gap` is watched in every run (docs/runs.md).

{counts}

| family | decode | score | gradient | LoRA | PPO |
|---|---|---|---|---|---|
"""


def markdown(found: dict[str, dict[str, str]]) -> str:
    """docs/models.md"""
    columns = ("decode", "score", "gradient", "LoRA", "PPO")
    rows = {name: [cells.get(c, "-").split(":")[0] for c in columns] for name, cells in found.items()}
    counts = Counter(cells[0] for cells in rows.values())
    said = "; ".join(f"{word}: {count}" for word, count in counts.most_common())
    page = INTRODUCTION.format(version=transformers.__version__, counts=f"{len(rows)} models: {said}.")
    return page + "".join(f"| {name} | {' | '.join(cells)} |\n" for name, cells in rows.items())


def quiet() -> None:
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def main(arguments: list[str]) -> None:
    quiet()
    names = [a for a in arguments if not a.startswith("--")] or list(models())
    every = {}
    for precision in ("fp32", "bf16"):
        every[precision] = {}
        for name in names:
            every[precision] |= sweep([name], precision)
            for found in [every[precision][name]] if name in every[precision] else []:
                words = " | ".join(f"{k}: {v.splitlines()[0][:150]}" for k, v in found.items())
                print(f"{precision} {name:24} {words}", file=sys.stderr, flush=True)
    if "--markdown" in arguments:
        print(markdown(every["fp32"]), end="")
    for precision, found in every.items():
        words = [
            "wrong" if any(v.startswith("!") for v in f.values()) else f["decode"].split(":")[0] for f in found.values()
        ]
        print(precision, dict(Counter(words)), file=sys.stderr)


if __name__ == "__main__":
    main(sys.argv[1:])
