"""Completions of a model outside training: `dualign sample`, and the outputs that evaluation judges."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from dualign import data
from dualign.common import cpu
from dualign.common.durable import write_text
from dualign.common.errors import UserError, clean
from dualign.common.types import Prompt, Rollout, user_prompt
from dualign.data.settings import DataConfig
from dualign.models.load import context_of, load_model
from dualign.models.policy import Policy
from dualign.models.settings import ModelConfig
from dualign.models.tokenizer import Tokenizer
from dualign.rollout.base import Request, Sampling
from dualign.rollout.hf.sampler import HFSampler, decoding_of
from dualign.rollout.requests import requests_of


def sample_from(
    model: ModelConfig,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    seed: int,
    left_out: dict[int, str] | None = None,
    data_config: DataConfig | None = None,
    count: int | None = None,
) -> list[Rollout]:
    """K rollouts of each prompt, in order. A prompt that the model cannot be asked is left out and its number and the
    reason put into `left_out`; without one it raises UserError. With `data_config`, `count` of the prompts are drawn
    from those that a run by it would use."""
    import torch

    try:
        hf, tokenizer = load_model(model)
    except UserError as error:
        raise UserError(str(error).removeprefix("model.name: ")) from None  # here it is no recipe's key
    if torch.cuda.is_available():
        hf.to("cuda")
    else:
        cpu.keep_memory()
    policy = Policy(hf, model.precision)
    decoding_of(policy)  # while its weights are exact
    policy = policy.frozen_copy()
    context = context_of(hf.config)
    if left_out is None:
        d, new_tokens = data_config, sampling.max_new_tokens
        limit, bad_rows = (d.max_prompt_tokens, d.bad_rows) if d else (None, None)
        requests = requests_of(prompts, tokenizer, context, new_tokens, limit, print, count, seed, bad_rows)
    else:
        requests = askable(prompts, tokenizer, context, sampling.max_new_tokens, left_out)
    rollouts: list[Rollout] = []
    if requests:
        HFSampler(policy, tokenizer, 256).sample(requests, sampling, (seed, 0), rollouts.append)
    return sorted(rollouts, key=lambda r: r.index)


def askable(
    prompts: Sequence[Prompt], tokenizer: Tokenizer, context: int, new_tokens: int, left_out: dict[int, str]
) -> list[Request]:
    """The prompts that the model can be asked, each under its number among all, so that no other one's random numbers
    move. Of the others, `left_out` gets the reason by number."""
    if tokenizer.hf.chat_template is None and any(prompt.conversational for prompt in prompts):
        raise UserError(
            "the prompts are conversations and the model has no chat template: put one into its folder "
            "(chat_template.jinja), or ask in plain text"
        )
    requests = []
    for i, prompt in enumerate(prompts):
        try:
            ids = tokenizer.prompt(prompt)
        except UserError as error:  # its template objects
            left_out[i] = str(error)
            continue
        if len(ids) + new_tokens > context:
            tokens = f"{len(ids)} tokens and {new_tokens} new ones"
            left_out[i] = f"its {tokens} exceed the model's context of {context} (fewer new ones: --max-new-tokens)"
        else:
            requests.append(Request(i, prompt, ids))
    return requests


def sample_to(
    model: str,
    source: str,
    out: Path | None,
    k: int,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    limit: int | None,
    seed: int,
    chat: bool,
    prompt_column: str = "prompt",
    system_prompt: str | None = None,
) -> None:
    if not source.strip():
        raise UserError("the prompt is empty")
    known = data.names_data(source)
    asked = DataConfig(
        train=source, chat=chat, prompt_column=prompt_column, system_prompt=system_prompt, bad_rows="skip"
    )
    prompts = data.load_prompts(source, asked, "test") if known else [user_prompt("prompt", source, system_prompt)]
    if data.lost_system_prompt(prompts, asked):
        raise UserError(f"{source}: every prompt is plain text, so --system-prompt needs --chat")
    sampling = Sampling(k, max_new_tokens, temperature, top_p)
    prompts, left_out = prompts[:limit], dict[int, str]()
    rollouts = sample_from(ModelConfig(name=model), prompts, sampling, seed, left_out)
    if left_out:
        i, reason = next(iter(left_out.items()))
        told = f"{len(left_out)} of {len(prompts)} prompts cannot be asked; the first, {prompts[i].id}: {reason}"
        if not rollouts:
            raise UserError(told)
        print(clean(told))
    if out is None:
        for r in rollouts:
            print(
                f"[{clean(r.prompt.id)}] {clean(r.prompt.text)}\n  -> {clean(r.text)}{'' if r.finish == 'eos' else ' …'}\n"
            )
        return
    lines = [
        json.dumps(
            {
                "id": r.prompt.id,
                "prompt": r.prompt.messages if r.prompt.conversational else r.prompt.content,
                **r.prompt.for_template,
                "completion": [{"role": "assistant", "content": r.text}] if r.prompt.conversational else r.text,
                "finish": r.finish,
                "tokens": len(r.completion_ids),
                "completion_ids": r.completion_ids,
                "model": model,
            },
            ensure_ascii=False,
        )
        for r in rollouts
    ]
    write_text(out, "\n".join(lines) + "\n")
    print(f"{len(lines)} completions in {out}")
